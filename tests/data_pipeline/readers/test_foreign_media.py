"""Foreign sounds and images: data that a decoder does not use is damage, and decoding starts no program."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.readers import remarks
from data_pipeline.readers.formats.images import IMAGE_SUFFIXES
from tests.data_pipeline.conftest import Real
from tests.data_pipeline.readers.reading import read, reason_of

# Sound

NOISE = np.random.default_rng(0).integers(-3000, 3000, 20_000).astype("<i2")


def sound(path: Path, samples: np.ndarray = NOISE) -> bytes:
    soundfile.write(path, samples, 8000)
    return path.read_bytes()


def flac_with_total(content: bytes, total: int) -> bytes:
    """Return a FLAC whose header states a number of samples: the low 36 bits of bytes 18 to 25 (RFC 9639, 8.2)."""
    packed = int.from_bytes(content[18:26]) >> 36 << 36 | total
    return content[:18] + packed.to_bytes(8) + content[26:]


@pytest.mark.parametrize("name", ["a.ogg", "a.flac", "a.wav", "a.aiff", "a.au", "a.w64"])
def test_second_sound_after_the_end_of_the_first_is_damage(tmp_path: Path, name: str):
    first, second = sound(tmp_path / name), sound(tmp_path / f"b{name}", NOISE[:9000])
    assert len(read(tmp_path / name)) == 40_000
    (tmp_path / name).write_bytes(first + second)
    assert reason_of(tmp_path / name)[0] == "damaged"


@pytest.mark.parametrize("total", [1, 10_000, 19_999, 20_001, 1 << 35])
def test_a_flac_with_a_wrong_number_of_samples_is_damage(tmp_path: Path, total: int):
    path = tmp_path / "a.flac"
    path.write_bytes(flac_with_total(sound(path), total))
    assert f"states {total:,} samples, and it has 20,000" in reason_of(path)[1]


def test_a_flac_that_states_no_number_of_samples_is_decoded(tmp_path: Path):
    path = tmp_path / "a.flac"
    content = flac_with_total(sound(path), 0)
    path.write_bytes(content)
    assert read(path) == NOISE.tobytes()
    path.write_bytes(content + b"TAG" + b"x" * 125)  # an ID3v1 tag
    assert read(path) == NOISE.tobytes()
    for damaged in (content[:-1], content[: len(content) // 2], content + b"junk" * 100):
        path.write_bytes(damaged)
        assert reason_of(path)[0] == "damaged"


def test_a_long_flac_is_read_in_blocks_to_its_end(tmp_path: Path):
    long = np.tile(NOISE, 30)
    path = tmp_path / "a.flac"
    sound(path, long)
    assert read(path) == long.tobytes()


@pytest.mark.parametrize("size", [0, 20_000])
def test_bytes_after_the_stated_samples_of_a_wav_are_damage(tmp_path: Path, size: int):
    content = bytearray(sound(tmp_path / "a.wav"))
    content[40:44] = size.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    reason, detail = reason_of(tmp_path / "a.wav")
    assert reason == "damaged"
    assert "bytes that are not decoded" in detail


def test_an_au_that_states_no_samples_and_has_some_is_damage(tmp_path: Path):
    content = bytearray(sound(tmp_path / "a.au"))
    content[8:12] = bytes(4)
    (tmp_path / "a.au").write_bytes(content)
    assert "states 0 bytes of samples, and it has 40,000" in reason_of(tmp_path / "a.au")[1]


def test_chunks_after_the_samples_of_a_wav_are_not_damage(tmp_path: Path):
    content = bytearray(sound(tmp_path / "a.wav")) + b"LIST\x0e\0\0\0INFOISFT\x02\0\0\0x\0"
    content[4:8] = (len(content) - 8).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    assert read(tmp_path / "a.wav") == NOISE.tobytes()


def test_damage_in_an_ogg_is_found(tmp_path: Path):
    content = sound(tmp_path / "a.ogg")
    for damaged in (content[:9000], content[:9000] + bytes(100) + content[9100:]):
        (tmp_path / "a.ogg").write_bytes(damaged)
        assert reason_of(tmp_path / "a.ogg")[0] == "damaged"


def pages_of(ogg: bytes) -> list[bytes]:
    """Return the pages of an Ogg (RFC 3533): 27 bytes, the sizes of the segments, the segments."""
    pages, at = [], 0
    while at < len(ogg):
        segments = ogg[at + 27 : at + 27 + ogg[at + 26]]
        end = at + 27 + len(segments) + sum(segments)
        pages.append(ogg[at:end])
        at = end
    return pages


@pytest.mark.parametrize("coding", ["VORBIS", "OPUS"])
def test_an_ogg_that_is_cut_between_two_pages_is_damage(tmp_path: Path, coding: str):
    """The header states no number of samples. Only the last page is marked as the end."""
    path = tmp_path / "a.ogg"
    rate = 48_000
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, 3 * rate), rate, format="OGG", subtype=coding)
    assert len(read(path)) == 2 * 3 * rate
    pages = pages_of(path.read_bytes())
    assert len(pages) > 4
    for number in range(4, len(pages)):
        path.write_bytes(b"".join(pages[:number]))
        assert "its last page is not marked as the end" in reason_of(path)[1]


def test_file_that_repeats_its_ogg_is_damage(tmp_path: Path):
    """Both sounds have the same serial number. libsndfile decodes only one and reports no error."""
    (tmp_path / "a.ogg").write_bytes(2 * sound(tmp_path / "a.ogg"))
    assert reason_of(tmp_path / "a.ogg")[0] == "damaged"


# Images


def png(width: int, height: int, depth: int, kind: int, rows: bytes, **chunks: bytes) -> bytes:
    """Return a PNG of rows that each begin with their filter (ISO/IEC 15948)."""
    parts = [("IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)), *chunks.items()]
    parts += [("IDAT", zlib.compress(rows)), ("IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + name.encode() + data + struct.pack(">I", zlib.crc32(name.encode() + data))
        for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_no_program_runs_on_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bin").mkdir()
    for program in ("gs", "gswin64c", "djpeg", "xv"):
        (tmp_path / "bin" / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for suffix in IMAGE_SUFFIXES:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(eps)
        assert reason_of(path)[0] == "damaged"
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("kind", ["ICNS", "PCX", "TGA", "SGI", "ICO", "DDS", "JPEG2000"])
def test_other_formats_are_not_decoded(tmp_path: Path, kind: str):
    Image.new("RGB", (16, 16)).save(tmp_path / "a", format=kind)
    (tmp_path / "a").rename(tmp_path / "a.png")
    assert "cannot identify image file" in reason_of(tmp_path / "a.png")[1]


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


PHOTOGRAPH = Image.effect_noise((160, 120), 40).convert("RGB")
JPEG_KINDS = [
    {},
    {"progressive": True},
    {"optimize": True},
    {"quality": 95},
    {"quality": 5},
    {"restart_marker_blocks": 4},
    {"subsampling": 0},
]


def scan_of(content: bytes) -> tuple[int, int]:
    """Return where the compressed data of the first scan begins, and where the file's end mark is."""
    begin = content.index(b"\xff\xda")
    return begin + 2 + int.from_bytes(content[begin + 2 : begin + 4]), len(content) - 2


@pytest.mark.parametrize("options", JPEG_KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_truncated_jpeg_with_an_end_mark_is_damage_and_an_intact_one_is_not(tmp_path: Path, mode: str, options):
    image = PHOTOGRAPH.convert(mode)
    whole = jpeg(image, **options)
    path = tmp_path / "a.jpg"
    path.write_bytes(whole)
    assert read(path) == np.asarray(Image.open(path).convert("RGB")).tobytes()
    begin, end = scan_of(whole)
    for part in (0.3, 0.5, 0.9):
        path.write_bytes(whole[: int(begin + part * (end - begin))].rstrip(b"\xff") + b"\xff\xd9")
        assert "a part of its compressed data is missing" in reason_of(path)[1]


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"quality": 95}, {"quality": 5}])
def test_zeros_in_the_scan_of_a_jpeg_are_damage(tmp_path: Path, options):
    whole = jpeg(PHOTOGRAPH, **options)
    begin, end = scan_of(whole)
    for part in (0.1, 0.5, 0.8):
        at = int(begin + part * (end - begin))
        zeros = (end - begin) // 10
        (tmp_path / "a.jpg").write_bytes(whole[:at] + bytes(zeros) + whole[at + zeros :])
        assert "compressed data" in reason_of(tmp_path / "a.jpg")[1]


def test_a_jpeg_without_one_of_its_intervals_is_damage(tmp_path: Path):
    whole = jpeg(PHOTOGRAPH, restart_marker_blocks=4)
    begin, end = whole.index(b"\xff\xd2"), whole.index(b"\xff\xd3")
    (tmp_path / "a.jpg").write_bytes(whole[:begin] + whole[end:])
    assert "is missing" in reason_of(tmp_path / "a.jpg")[1]


@pytest.mark.slow
@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    shade=st.integers(0, 255),
    noise=st.sampled_from([0, 5, 60]),
    quality=st.sampled_from([1, 50, 100]),
    options=st.sampled_from([{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}]),
)
@settings(max_examples=80, deadline=None)
def test_every_intact_jpeg_is_read(tmp_path_factory, width, height, shade, noise, quality, options):
    """Some images have one colour, so that their compressed data is nearly empty."""
    values = np.random.default_rng(0).normal(shade, noise, (height, width, 3)).clip(0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("t") / "a.jpg"
    path.write_bytes(jpeg(Image.fromarray(values), quality=quality, **options))
    assert read(path) == np.asarray(Image.open(path)).tobytes()


def test_bytes_after_the_end_of_a_jpeg_are_not_damage(tmp_path: Path):
    """Cameras store films and other photographs there."""
    (tmp_path / "a.jpg").write_bytes(jpeg(PHOTOGRAPH) + b"\0\0\0\x20ftypmp42" + jpeg(PHOTOGRAPH))
    assert len(read(tmp_path / "a.jpg")) == 160 * 120 * 3
    PHOTOGRAPH.save(tmp_path / "b.jpg", "MPO", save_all=True, append_images=[PHOTOGRAPH])
    assert len(read(tmp_path / "b.jpg")) == 160 * 120 * 3


def test_real_photographs_are_intact(tmp_path: Path, real: Real):
    for path in real("images/tiny64")[:20]:
        assert read(path) == np.asarray(Image.open(path).convert("RGB")).tobytes()


def test_sixteen_bit_grey_with_a_transparent_value_keeps_its_high_bytes(tmp_path: Path):
    rows = b"\0" + bytes.fromhex("abcd 1234 1235 0000")
    (tmp_path / "a.png").write_bytes(png(4, 1, 16, 0, rows, tRNS=b"\x12\x34"))
    assert read(tmp_path / "a.png")[::3] == bytes([0xAB, 0xFF, 0x12, 0])
    alpha = b"\0" + bytes.fromhex("abcdffff 12340000")  # grey and alpha of 16 bits each
    (tmp_path / "b.png").write_bytes(png(2, 1, 16, 4, alpha))
    assert read(tmp_path / "b.png")[::3] == bytes([0xAB, 0xFF])


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 100, 255], [0, 100, 255]), ([0, 256, 65_535], [0, 1, 255]), ([0, 65_536, 1], None), ([-1, 0, 1], None)],
)
def test_a_tiff_of_32_bit_integers_is_read_by_its_range(tmp_path: Path, values: list[int], expected):
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "a.tif")
    if expected is None:
        assert "whose black and white are unknown" in reason_of(tmp_path / "a.tif")[1]
    else:
        assert list(read(tmp_path / "a.tif")[::3]) == expected


def test_dark_grey_of_16_bits_stays_dark(tmp_path: Path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n\0\xff\0\x10")
    assert read(tmp_path / "a.pgm") == bytes(6)


MEASURE = """
import re, sys
from pathlib import Path
from data_pipeline.readers import ReadOptions, document_of
from data_pipeline.sources.source_file import SourceFile
document = document_of(SourceFile(0, sys.argv[1], sys.argv[1], None), ReadOptions())
pixels = sum(len(piece) for piece in document.read())
print(pixels, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("a.png", "RGBA"), ("a.jpg", "RGB")])
def test_large_image_needs_only_its_own_memory_and_that_of_its_rgb(tmp_path: Path, name: str, mode: str):
    """4,096 x 2,048: 32 MiB as decoded, 24 MiB of RGB, and strips; 8,192 x 8,192 takes eight times as much.

    The check of a JPEG needs a second decoded image in place of the RGB.
    """
    Image.new(mode, (4096, 2048), (255, 0, 0, 128)[: len(mode)]).save(tmp_path / name)
    command = [sys.executable, "-c", MEASURE, tmp_path / name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pixels, mebibytes = map(int, done.stdout.split())
    assert pixels == 4096 * 2048 * 3
    assert mebibytes < 80 + 32 + 32 + 20  # the libraries, the image, its RGB or another image, and strips


def test_a_suffix_of_another_format_is_reported(tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remarks.Remarks, "_files", 0)
    PHOTOGRAPH.save(tmp_path / "a.jpg", "PNG")
    assert len(read(tmp_path / "a.jpg")) == 160 * 120 * 3
    (tmp_path / "a.flac").write_bytes(sound(tmp_path / "b.wav"))
    assert read(tmp_path / "a.flac") == NOISE.tobytes()
    assert [message.partition("warning: ")[2] for message in caplog.messages] == [
        "its suffix is .jpg, and its content is PNG",
        "its suffix is .flac, and its content is WAV",
    ]
