"""Samples of a run: what the model wrote after some steps.

RUN/samples/step-00001200/
    samples.json    prompts and continuations, in hexadecimal
    0.png, 1.wav    pictures and sounds, where the corpus is of that kind; the number is that of the sample
"""

import json
import re
import shutil
from pathlib import Path

from pydantic import BaseModel

from byteloom.core.storage.files import atomic_folder
from byteloom.core.storage.state_files import read_json
from byteloom.core.storage.step_folders import is_step_name, step_in, step_name

FILE = "samples.json"
NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\udc80-\udcff]")
"""Control characters, and bytes that are not UTF-8."""
TEXT_SHARE = 2 / 3
"""Share of characters from which bytes are shown as text."""
MEDIA_TYPES = {".png": "image/png", ".wav": "audio/wav"}
"""Media type of a sample's file by its suffix."""


class Sample(BaseModel, frozen=True):
    """Continuation of a prompt."""

    source: str
    """Where the prompt comes from, for people."""
    prompt_hex: str
    continuation_hex: str
    file: str | None = None
    """Name of the picture or sound in the folder of the samples."""

    @property
    def prompt(self) -> bytes:
        """Bytes that the model was given."""
        return bytes.fromhex(self.prompt_hex)

    @property
    def continuation(self) -> bytes:
        """Bytes that the model wrote."""
        return bytes.fromhex(self.continuation_hex)


class SampleSet(BaseModel, frozen=True):
    """Samples of one step."""

    step: int
    """Optimizer steps done."""
    time: float
    """When the weights were written, in seconds since 1970."""
    temperature: float
    samples: tuple[Sample, ...]


def write_samples(folder: Path, found: SampleSet, files: dict[str, bytes]) -> None:
    """Write the samples of a step. A reader sees all of them or none.

    Args:
        folder: folder of the samples of a run.
        found: the samples; those of the same step are replaced.
        files: content of each picture and sound by its name.
    """
    folder.mkdir(exist_ok=True)
    place = folder / step_name(found.step)
    if place.exists():
        remove_samples(place)
    with atomic_folder(place) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        (partial / FILE).write_text(json.dumps(found.model_dump(), indent=1), encoding="utf-8")


def remove_samples(folder: Path) -> None:
    """Remove the folder of a step. A killed process may leave files there, but no samples."""
    (folder / FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def read_samples(folder: Path) -> SampleSet:
    """Return the samples in the folder of a step.

    Raises:
        StateFileError: the file cannot be read, or is damaged.
        FileNotFoundError: there is none.
    """
    found = read_json(folder / FILE, SampleSet, "remove the folder; `byteloom samples` makes it again")
    if found is None:
        raise FileNotFoundError(f"{folder / FILE} does not exist")
    return found


def sample_folders(folder: Path, after: int = -1) -> list[Path]:
    """Return the folders of steps that have samples, oldest first.

    Args:
        folder: folder of the samples of a run.
        after: steps up to this one are left out.
    """
    found = [path.parent for path in folder.glob(f"step-*/{FILE}") if is_step_name(path.parent.name)]
    return sorted((path for path in found if step_in(path.name) > after), key=lambda path: step_in(path.name))


def has_samples(folder: Path, step: int) -> bool:
    """Return whether a step has samples, given the folder of the samples of a run."""
    return (folder / step_name(step) / FILE).exists()


def is_text(content: bytes) -> bool:
    """Return whether bytes are mostly text."""
    text = content.decode("utf-8", "surrogateescape")
    return len(NOT_TEXT.findall(text)) <= (1 - TEXT_SHARE) * len(text)


def as_text(content: bytes) -> str:
    r"""Return bytes as text, in which bytes that are not text are escapes such as \xe9.

    Bytes that are mostly not text are returned in hexadecimal.
    """
    if not is_text(content):
        return content.hex(" ")
    text = content.decode("utf-8", "surrogateescape")
    return NOT_TEXT.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", text)
