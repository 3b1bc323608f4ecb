"""TensorBoard: event files in the run folder."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from byteloom.core.packages import needed_by
from pretrain.tracking.base import RunDescription, Tracker, register_tracker
from pretrain.tracking.samples import Sample, SampleSet, as_text


class TensorBoardConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Event files in RUN/tensorboard, for `tensorboard --logdir`. Needs the extra byteloom[tensorboard]."""

    flush_seconds: int = Field(default=30, ge=1)
    """Seconds between two writes to disk. They are also written after each delivery."""


@register_tracker("tensorboard", TensorBoardConfig)
class TensorBoard(Tracker):
    """Writes an event file for each start. TensorBoard drops the steps of earlier files that are sent again."""

    def __init__(self, config: TensorBoardConfig, run: RunDescription) -> None:
        with needed_by("tracking.trackers.tensorboard", "tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 few runs use it

        self._writer: Any = SummaryWriter(
            run.folder / "tensorboard", purge_step=run.taken_step + 1, flush_secs=config.flush_seconds
        )
        recipe = "".join(f"    {name}: {value}\n" for name, value in run.params.items())
        self._writer.add_text(f"start/{run.start}", f"{run.reason}\n\n{recipe}", max(run.begins_after, 0))

    def log(self, step: int, numbers: Mapping[str, float], time: float) -> None:
        """Write the numbers of a step, with its time."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, walltime=time)

    def log_samples(self, found: SampleSet, folder: Path) -> None:
        """Write each sample as text, and its picture or sound."""
        for number, sample in enumerate(found.samples):
            name = f"samples/{number}"
            self._writer.add_text(name, _markdown(sample), found.step, walltime=found.time)
            if sample.file is not None:
                summary = _media(f"{name}/media", (folder / sample.file).read_bytes(), sample.file)
                self._writer.file_writer.add_summary(summary, found.step, walltime=found.time)

    def flush(self) -> None:
        """Write to disk."""
        self._writer.flush()

    def close(self, status: str) -> None:
        """Write what is left."""
        self._writer.close()


def _markdown(sample: Sample) -> str:
    """Return a sample as Markdown, in which four spaces keep a text as it is."""
    text = f"{as_text(sample.prompt)}\u258f{as_text(sample.continuation)}"
    return f"{sample.source}\n\n" + "".join(f"    {line}\n" for line in text.splitlines())


def _media(tag: str, content: bytes, name: str) -> Any:
    """Return the summary of a PNG or WAV as it is."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415 few runs use it

    if name.endswith(".png"):
        from PIL import Image  # noqa: PLC0415 few runs use it

        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=content)
        return Summary(value=[Summary.Value(tag=tag, image=image)])
    import soundfile  # noqa: PLC0415 few runs use it

    about = soundfile.info(io.BytesIO(content))
    sound = Summary.Audio(
        sample_rate=about.samplerate,
        num_channels=about.channels,
        length_frames=about.frames,
        encoded_audio_string=content,
        content_type="audio/wav",
    )
    return Summary(value=[Summary.Value(tag=tag, audio=sound)])
