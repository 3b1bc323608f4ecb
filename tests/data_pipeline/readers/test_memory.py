"""Memory that readers need, and the libraries that they import."""

import io
import json
import subprocess
import sys
import tarfile
import wave
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.conftest import STDLIB

MEASURE = """
import resource, sys
from data_pipeline.readers import ReadOptions, document_of, documents_in, is_container
from data_pipeline.sources.source_file import SourceFile
file = SourceFile(0, sys.argv[1], sys.argv[1], None)
options = ReadOptions(audio_rate=16000)
list(zip(range(2), documents_in(file, options) if is_container(file, options) else document_of(file, options).read()))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
documents = documents_in(file, options) if is_container(file, options) else [document_of(file, options)]
print(sum(len(piece) for document in documents for piece in document.read()))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def big_lines(path: Path) -> int:
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
        for _ in range(5_000):
            stream.write(line.encode())
    return 50_000_000


def big_member(path: Path) -> int:
    size = 50 << 20
    with tarfile.open(path, "w") as tar:
        header = tarfile.TarInfo("big.bin")
        header.size = size
        tar.addfile(header, Zeros())
    return size


class Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def big_sound(path: Path) -> int:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(32_000)
        for _ in range(50):
            file.writeframes(bytes(1 << 20))
    return 25 << 20


def big_parquet(path: Path) -> int:
    schema = pa.schema({"text": pa.string()})
    with pq.ParquetWriter(path, schema, use_dictionary=False, compression="zstd") as writer:
        for _ in range(50):
            writer.write_table(pa.table({"text": ["x" * 10_000] * 100}, schema), row_group_size=10_000)
    return 50_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write_it"),
    [("a.jsonl.zst", big_lines), ("a.tar", big_member), ("a.wav", big_sound), ("a.parquet", big_parquet)],
)
def test_fifty_megabytes_are_read_in_a_few_megabytes_of_memory(
    tmp_path: Path, name: str, write_it: Callable[[Path], int]
):
    size = write_it(tmp_path / name)
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / name], capture_output=True, text=True, check=True)
    read_bytes, grown = map(int, done.stdout.split())
    assert read_bytes == size
    assert grown < 24, f"{grown} MiB"


@pytest.mark.slow
def test_reading_text_does_not_import_media_libraries():
    """Reading text does not import the heavy libraries."""
    code = f"""
import sys
from data_pipeline.readers import ReadOptions, document_of
from data_pipeline.sources.listing import Selection, list_files
for file in list_files([{str(STDLIB / "json" / "decoder.py")!r}], Selection()):
    list(document_of(file, ReadOptions()).read())
print(*(name for name in ("pyarrow", "PIL", "soundfile", "soxr", "aiohttp") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
