"""Reader of images."""

import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.readers import ReadOptions, document_of, remarks
from data_pipeline.readers.formats.images import patch_scan, raster_scan, unscan
from data_pipeline.sources.listing import Selection, list_files
from tests.data_pipeline.conftest import Real
from tests.data_pipeline.readers.reading import read, reason_of


def images(draw: st.DrawFn, side: int = 1) -> np.ndarray:
    height, width = (side * draw(st.integers(1, 6)) for _ in range(2))
    return np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.slow
@given(data=st.data(), side=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_both_scans_are_invertible(data: st.DataObject, side: int):
    pixels = images(data.draw, side)
    height, width, _ = pixels.shape
    assert np.array_equal(unscan(raster_scan(pixels), height, width), pixels)
    patch_size = 3 * side * side
    scanned = patch_scan(pixels, patch_size)
    assert np.array_equal(unscan(scanned, height, width, patch_size), pixels)
    # MEGABYTE: the k-th patch is the k-th tile of p x p pixels in raster order, p = sqrt(P / 3).
    for k in range(height * width // side**2):
        y, x = divmod(k, width // side)
        tile = pixels[y * side : (y + 1) * side, x * side : (x + 1) * side]
        assert scanned[k * patch_size : (k + 1) * patch_size] == tile.tobytes()


def test_patch_scan_of_an_image_written_by_hand():
    """Two rows of four grey pixels; patches of 12 bytes are tiles of 2 x 2."""
    pixels = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.uint8)[..., None].repeat(3, axis=2)
    assert patch_scan(pixels, 12)[::3] == bytes([1, 2, 5, 6, 3, 4, 7, 8])
    assert raster_scan(pixels)[::3] == bytes([1, 2, 3, 4, 5, 6, 7, 8])
    assert raster_scan(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)) == bytes([1, 2, 3, 4, 5, 6])  # RGB, RGB


@pytest.mark.parametrize("size", [0, 3 * 5, 47, 64])
def test_patches_that_are_not_a_square_of_pixels_are_refused(size: int):
    with pytest.raises(ValueError, match="do not make a square tile"):
        patch_scan(np.zeros((8, 8, 3), np.uint8), size)


def test_real_photographs_become_their_pixels(real: Real):
    for path in [*real("images/in64_n01")[:20], *real("images/cifar32_train_cat_1")[:20]]:
        pixels = np.asarray(Image.open(path))
        height, width, _ = pixels.shape
        assert read(path) == pixels.tobytes()
        assert np.array_equal(unscan(read(path, image_scan="patch", patch_size=48), height, width, 48), pixels)


@pytest.mark.parametrize("mode", ["lanczos", "box"])
def test_shorter_side_is_scaled_and_the_centre_is_kept(tmp_path: Path, mode: str):
    image = Image.effect_noise((90, 30), 60).convert("RGB")
    for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
        path = saved(tmp_path / "a.png", turned)
        for size in (10, 15):
            whole = turned.resize(
                (turned.width * size // 30, turned.height * size // 30), getattr(Image.Resampling, mode.upper())
            )
            left, top = (whole.width - size) // 2, (whole.height - size) // 2
            middle = np.asarray(whole.crop((left, top, left + size, top + size))).astype(int)
            pixels = unscan(read(path, image_size=size, image_filter=mode), size, size)
            assert np.abs(pixels - middle).max() <= 1


def test_box_filter_is_the_mean_of_whole_pixels(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    means = pixels.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    scaled = unscan(read(tmp_path / "a.png", image_size=32, image_filter="box"), 32, 32)
    assert np.abs(scaled - means).max() <= 1  # rounded after the rows and again after the columns


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_every_mode_becomes_rgb(tmp_path: Path):
    white, red, half = bytes([255] * 3), bytes([255, 0, 0]), bytes([255, 127, 127])
    clear = Image.new("RGBA", (1, 1), (9, 9, 9, 0))
    cases = {
        "grey.png": (Image.new("L", (1, 1), 7), bytes([7] * 3)),
        "bits.png": (Image.new("1", (1, 1), 1), white),
        "clear.png": (clear, white),
        "half.png": (Image.new("RGBA", (1, 1), (255, 0, 0, 128)), half),
        "clear-grey.png": (Image.new("LA", (1, 1), (9, 0)), white),
        "palette.png": (Image.new("RGB", (1, 1), "red").convert("P"), red),
        "sixteen.png": (Image.fromarray(np.array([[0xABCD]], np.uint16)), bytes([0xAB] * 3)),
        "sixteen.tif": (Image.fromarray(np.array([[0xABCD]], np.uint16)), bytes([0xAB] * 3)),
        "cmyk.tif": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), red),
    }
    for name, (image, expected) in cases.items():
        assert (name, read(saved(tmp_path / name, image))) == (name, expected)
    keyed = saved(tmp_path / "keyed.gif", Image.new("P", (1, 1), 0), transparency=0)
    assert read(keyed) == white
    assert "floating-point" in reason_of(saved(tmp_path / "f.tif", Image.new("F", (1, 1), 0.5)))[1]


def test_images_are_rotated_upright(tmp_path: Path):
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    assert read(tmp_path / "a.png") == bytes([255, 0, 0, 0, 0, 255])  # now one above the other
    pixels = unscan(read(tmp_path / "a.png"), 2, 1)
    assert pixels[0, 0].tolist() == [255, 0, 0]


def test_damaged_and_misnamed_images(tmp_path: Path, real: Real):
    jpeg, png = real("images/tiny64_n0144")[0], real("images/in64_n01")[0]
    named = {
        "half.jpg": jpeg.read_bytes()[: jpeg.stat().st_size // 2],
        "half.png": png.read_bytes()[: png.stat().st_size // 2],
        "header.png": png.read_bytes()[:20],
        "text.jpg": b"no image at all, but a line of text\n" * 100,
        "nul.png": bytes(1000),
    }
    for name, content in named.items():
        (tmp_path / name).write_bytes(content)
        reason, detail = reason_of(tmp_path / name)
        assert (name, reason) == (name, "damaged")
        assert "cannot be decoded as an image" in detail
    (tmp_path / "png.jpg").write_bytes(png.read_bytes())  # opens by its content
    assert read(tmp_path / "png.jpg") == read(png)
    assert read(tmp_path / "text.jpg", reader="files") == named["text.jpg"]


def test_every_truncation_of_a_png_is_found(tmp_path: Path, real: Real):
    whole = real("images/in64_n01")[0].read_bytes()
    path = tmp_path / "a.png"
    for length in range(1, len(whole) - 16, 499):  # its last chunk has 12 bytes and no pixel
        path.write_bytes(whole[:length])
        assert reason_of(path)[0] == "damaged"


def image_with_damaged_exif(path: Path) -> Path:
    """Write an image about which Pillow warns."""
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0")
    return path


def test_a_warning_of_an_image_library_names_the_file(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(remarks.Remarks, "_files", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(image_with_damaged_exif(tmp_path / "a.jpg"))
    assert caplog.messages[0].startswith(f"{tmp_path}/a.jpg was decoded with a warning: Corrupt EXIF data")
    tiff = saved(tmp_path / "a.tif", Image.effect_noise((64, 64), 100), compression="tiff_lzw")
    content = bytearray(tiff.read_bytes())
    content[1000:1100] = b"\xff" * 100
    tiff.write_bytes(content)
    assert "Using code not yet in table" in reason_of(tiff)[1]
    assert capfd.readouterr().err == ""


def test_a_warning_of_a_sound_library_names_the_file(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(remarks.Remarks, "_files", 0)
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.sin(np.arange(44_100) * 0.05), 44_100, format="MP3", subtype="MPEG_LAYER_III")
    content = bytearray(path.read_bytes())
    content[3000:3600] = b"\xa5" * 600
    path.write_bytes(content)
    read(path)
    assert caplog.messages[0].startswith(f"{path} was decoded with a warning: Note: Illegal Audio-MPEG-Header")
    assert len(caplog.messages) == 1
    assert capfd.readouterr().err == ""


def test_an_image_with_a_huge_stated_size_is_refused(tmp_path: Path):
    path = saved(tmp_path / "a.png", Image.new("1", (20_000, 4_000)))
    assert path.stat().st_size < 100_000
    assert "20000 x 4000 pixels" in reason_of(path)[1]


def test_an_image_that_does_not_divide_into_tiles_is_refused(tmp_path: Path):
    path = saved(tmp_path / "a.png", Image.new("RGB", (17, 16)))
    assert "17 x 16 pixels cannot be divided into tiles of 8 x 8" in reason_of(path, image_scan="patch")[1]
    assert len(read(path, image_scan="patch", image_size=16)) == 768


def test_an_image_at_a_url_is_decoded(real: Real):
    path = real("images/in64_n01")[0]
    fsspec.filesystem("memory").pipe("/photographs/a.png", path.read_bytes())
    [file] = list_files(["memory://photographs"], Selection())
    assert b"".join(document_of(file, ReadOptions()).read()) == read(path)
