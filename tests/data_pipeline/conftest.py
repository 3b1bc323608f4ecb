"""Real corpora for tests, if available: books, photographs, speech and multilingual text."""

import os
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import zstandard

Real = Callable[[str], list[Path]]


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    """Return a function that lists files of a real corpus by a prefix of their paths."""
    unpacked = os.environ.get("BYTELOOM_CORPORA")
    archives = Path(__file__).parents[3] / "shared/corpora"

    @cache
    def files(start: str) -> list[Path]:
        folder = Path(unpacked) if unpacked else tmp_path_factory.mktemp("corpora")
        if not unpacked:
            unpack(archives / f"{start.partition('/')[0]}.tar.zst", start, folder)
        found = sorted(folder.glob(f"{start}*"))
        if not found:
            pytest.skip(f"there is no {start}* in {folder}")
        return found

    return files


def unpack(archive: Path, start: str, folder: Path) -> None:
    if not archive.exists():
        pytest.skip(f"neither $BYTELOOM_CORPORA nor {archive} is there")
    with (
        archive.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        tar.extractall(folder, (member for member in tar if member.name.startswith(start)), filter="data")
