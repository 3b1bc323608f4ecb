"""Trackers beside MLflow, with the real packages: each step once, with the time of its training, and its samples."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from data_pipeline.media import MediaCard
from data_pipeline.readers.restoring import png_of, wav_of
from pretrain.tracking import Journal, RunDescription, TrackingConfig, open_recorder
from pretrain.tracking.samples import Sample, SampleSet, write_samples

pytestmark = pytest.mark.slow

LOSS = "train/bits_per_byte"
PICTURE = png_of(bytes(range(192)), MediaCard("image", "u8", 3, width=8, height=8, scan="raster"))
SOUND = wav_of(np.arange(800, dtype="<i2").tobytes(), MediaCard("audio", "s16le", 2, 8000))


def train(run: Path, first: int, last: int, trackers: Mapping[str, Mapping[str, str]]) -> None:
    """Start an invented run after a step, log the numbers of later ones, and write samples of even ones."""
    config = TrackingConfig(enabled=False, trackers=trackers)
    after = first - 1 or -1
    journal = Journal(run / "metrics.jsonl", after if after > 0 else None)
    recorder = open_recorder(config, journal, RunDescription("run", "abc", {"a": 1}, {}, after, first, "manual", run))
    for step in range(first, last + 1):
        recorder.log(step, {LOSS: 8 / step})
        if step % 2 == 0:
            samples = [Sample(source=f"prompt {n}", prompt_hex="61", continuation_hex="ff626262", file=file)
                       for n, file in enumerate((None, "1.png", "2.wav"))]  # fmt: skip
            found = SampleSet(step=step, time=time.time(), temperature=1, samples=tuple(samples))
            write_samples(run / "samples", found, {"1.png": PICTURE, "2.wav": SOUND})
    recorder.close("FINISHED")


def times_of(run: Path) -> dict[int, float]:
    """Return the time of each step in the journal."""
    return {line["step"]: line["time"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def test_tensorboard_shows_each_step_once_although_a_start_repeats_some(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, 1, 4, {"tensorboard": {}})
    first = times_of(tmp_path)
    train(tmp_path, 3, 6, {"tensorboard": {}})
    times = {**{step: first[step] for step in (1, 2)}, **times_of(tmp_path)}
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.wall_time) for event in events.Scalars(LOSS)] == list(times.items())
    assert [event.value for event in events.Scalars(LOSS)] == pytest.approx([8 / step for step in times])
    [picture, *_] = pictures = events.Images("samples/1/media")
    assert ([each.step for each in pictures], picture.encoded_image_string) == ([2, 4, 6], PICTURE)
    assert [each.encoded_audio_string for each in events.Audio("samples/2/media")] == [SOUND] * 3
    [text, *_] = events.Tensors("samples/0/text_summary")
    assert list(text.tensor_proto.string_val) == ["prompt 0\n\n    a\u258f\\xffbbb\n".encode()]


def test_wandb_gets_each_step_once_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    messages = pytest.importorskip(
        "wandb.proto.wandb_internal_pb2",
        reason="wandb is not installed, so its tracker is not tested: pip install wandb",
    )
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    train(tmp_path, 1, 4, {"wandb": {"mode": "offline"}})
    times = times_of(tmp_path)
    train(tmp_path, 3, 6, {"wandb": {"mode": "offline"}})
    times |= {step: when for step, when in times_of(tmp_path).items() if step > 4}
    rows = [row for file in sorted(tmp_path.glob("wandb/offline-*/*.wandb")) for row in history(messages, file)]
    numbers = {row["_step"]: (row["_timestamp"], row[LOSS]) for row in rows if LOSS in row}
    assert numbers == {step: (when, 8 / step) for step, when in times.items()}
    sampled = [row for row in rows if "samples/step" in row]
    assert [row["samples/step"] for row in sampled] == [2, 4, 6]
    kinds = ("table-file", "image-file", "audio-file")
    assert tuple(sampled[0][f"samples/{name}/_type"] for name in ("text", "1", "2")) == kinds


def history(messages: ModuleType, file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run's history, as `wandb sync` would send them."""
    for content in records(file.read_bytes()):
        record = messages.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format after a header of 7 bytes.

    Blocks have 32 KiB; a part of a record has a checksum of 4 bytes, its length in 2, and its kind in 1.
    """
    at, whole = 7, b""
    while at + 7 <= len(log):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield whole
            whole = b""
