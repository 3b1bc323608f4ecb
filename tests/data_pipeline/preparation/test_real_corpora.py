"""Photographs, speech, multilingual text and books are prepared and read back unchanged.

Damaged and misnamed files are reported by name and counted.
"""

import json
import random
import shutil
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import CorpusError
from tests.conftest import prepare_corpus
from tests.data_pipeline.conftest import Real
from tests.data_pipeline.preparation.test_prepare import documents_of

SAMPLE = 150
"""Files of each corpus, at most; all of them with `-m long`."""


def expected_bytes(path: Path) -> bytes:
    """Return the bytes that a model reads of a file, without Byteloom's code."""
    if path.suffix in (".jpg", ".png"):
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB")).tobytes()
    if path.suffix == ".wav":
        with wave.open(str(path)) as sound:
            assert sound.getsampwidth() == 2
            return sound.readframes(sound.getnframes())
    return path.read_bytes()


def copied(files: list[Path], folder: Path, count: int | None) -> list[Path]:
    folder.mkdir()
    chosen = files if count is None else random.Random(0).sample(files, min(count, len(files)))
    return [Path(shutil.copy(path, folder)) for path in chosen]


@pytest.mark.slow
@pytest.mark.parametrize("count", [SAMPLE, pytest.param(None, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("start", "modality"),
    [("images/", "image"), ("audio/", "audio"), ("multilingual/", "text"), ("books/valid/", "text")],
)
def test_real_corpus_is_read_back_unchanged(real: Real, tmp_path: Path, start: str, modality: str, count: int | None):
    paths = copied([path for path in real(start) if path.is_file()], tmp_path / "files", count)
    corpus = prepare_corpus([tmp_path / "files"], tmp_path / "out")
    assert documents_of(corpus) == {f"files/{path.name}": expected_bytes(path) for path in paths}
    assert corpus.modalities == [modality]


def test_damaged_and_misnamed_files_are_reported_by_name(real: Real, tmp_path: Path):
    images = copied(real("images/"), tmp_path / "files", 6)
    sounds = [Path(shutil.copy(path, tmp_path / "files")) for path in real("audio/fsdd_0_george")[:3]]
    good = {f"files/{path.name}": expected_bytes(path) for path in (*images[2:], *sounds[1:])}
    cut = images[0].read_bytes()
    images[0].write_bytes(cut[: len(cut) // 2])
    sounds[0].write_bytes(sounds[0].read_bytes()[:60])
    (tmp_path / "files/words.png").write_text("no picture")
    png = next(path for path in real("images/in64"))
    shutil.copy(png, tmp_path / "files/really-a-png.jpg")  # recognized by content
    good["files/really-a-png.jpg"] = expected_bytes(png)
    images[1].write_bytes(b"")
    with pytest.raises(CorpusError, match=r"--skip-bad skips such documents"):
        prepare_corpus([tmp_path / "files"], tmp_path / "out")
    corpus = prepare_corpus([tmp_path / "files"], tmp_path / "out", skip_bad=True)
    assert documents_of(corpus) == good
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").open()]
    bad = {f"files/{path.name}" for path in (images[0], sounds[0])} | {"files/words.png"}
    assert {line["key"] for line in skipped if line["reason"] == "damaged"} == bad
    assert all(Path(line["key"]).name in line["detail"] for line in skipped)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["per_source"][0]["left_out"] == dict(Counter(line["reason"] for line in skipped))
    assert report["per_source"][0]["left_out"] == {"damaged": 3, "empty": 1}
