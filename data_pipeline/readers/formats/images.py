"""Reader of images: the bytes of their pixels, red, green and blue with 8 bits each, nothing before or after them.

    any format ─▶ upright RGB, on white ─▶ centre square, scaled ─▶ raster or patch scan ─▶ bytes
                                                                    unscan  ◀─ bytes

The patch scan is that of MEGABYTE (Yu et al. 2023, arXiv:2305.07185, on images): a patch of P bytes is a square tile of
P/3 pixels. Pixels that are near in the image are then near in the sequence.
"""

import io
from collections.abc import Iterator
from math import isqrt
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from byteloom.core.packages import needed_by
from data_pipeline.errors import BadDocumentError
from data_pipeline.media import MediaCard
from data_pipeline.readers.boundary import described, is_passed, timed
from data_pipeline.readers.jpeg import jpeg_fault
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import MediaPieces, Reader, register_reader
from data_pipeline.readers.remarks import Remarks
from data_pipeline.readers.streams import pieces_of, seekable

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = {
    **{".bmp": "BMP", ".gif": "GIF", ".png": "PNG", ".webp": "WEBP"},
    **dict.fromkeys((".jpe", ".jpeg", ".jpg"), "JPEG"),
    **dict.fromkeys((".pgm", ".ppm"), "PPM"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
}
"""Format of the files with each suffix. Pillow may decode no other format: EPS would run a program on the file."""
MAX_PIXELS = 1 << 26
"""Largest number of pixels of an image: 192 MiB of RGB. The header of a small file can state any number.

It bounds the memory of a worker, measured at 8,192 x 8,192 pixels: 0.3 to 0.8 GB, and 1.1 GB for WebP, whose decoder
keeps four copies. It also bounds the time of one call of a decoder, which the time limit cannot interrupt.
"""
STRIP_PIXELS = 1 << 20
"""Pixels that are converted to RGB at once. Memory besides a strip: the image as it is decoded, and its RGB."""


def read_image(stream: BinaryIO, name: str, options: ReadOptions) -> MediaPieces:
    """Yield the pixels of an image in pieces, and return their layout.

    The format is one of IMAGE_SUFFIXES, whatever the file is called. An animation gives its first frame, and a
    file of several pages its first page. Colour profiles are not applied.

    Args:
        stream: the file.
        name: its name for errors.
        options: size, filter and scan.

    Raises:
        BadDocumentError: this is no image; or it is damaged, incomplete or too large, or its sides do not divide into
            tiles.
    """
    with seekable(stream) as file:
        pixels = _decoded(file, name, options)
    scanned: bytes | memoryview
    if options.image_scan == "raster":
        scanned = raster_scan(pixels)
    else:
        try:
            scanned = patch_scan(pixels, options.patch_size)
        except ValueError as error:
            raise BadDocumentError(f"{name}: {error}") from error
    yield from pieces_of(scanned)
    height, width, channels = pixels.shape
    return MediaCard(
        "image",
        "u8",
        channels,
        width=width,
        height=height,
        scan=options.image_scan,
        patch_size=options.patch_size if options.image_scan == "patch" else None,
        filter=options.image_filter if options.image_size is not None else None,
    )


IMAGE_READER = register_reader(
    Reader(
        "images",
        "Pixels of images.",
        read_file=read_image,
        options=frozenset({"members", "image_size", "image_filter", "image_scan", "patch_size"}),
        suffixes=frozenset(IMAGE_SUFFIXES),
        modality="image",
    )
)


def raster_scan(pixels: NDArray[np.uint8]) -> memoryview:
    """Return pixels row by row from the top, from the left, red before green before blue.

    Args:
        pixels: (height, width, 3)
    """
    return np.ascontiguousarray(pixels).reshape(-1).data


def patch_scan(pixels: NDArray[np.uint8], patch_size: int) -> bytes:
    """Return square tiles of `patch_size` bytes, each a raster scan, in the order of a raster scan of the tiles.

    Args:
        pixels: (height, width, 3)
        patch_size: bytes of a tile.

    Raises:
        ValueError: height or width is not a multiple of a tile's side.
    """
    height, width, _ = pixels.shape
    side = tile_side(patch_size)
    if height % side or width % side:
        raise ValueError(
            f"{width} x {height} pixels cannot be divided into tiles of {side} x {side}; "
            f"set --image-size to a multiple of {side}"
        )
    tiles = pixels.reshape(height // side, side, width // side, side, 3).swapaxes(1, 2)
    return tiles.tobytes()


def unscan(scanned: bytes, height: int, width: int, patch_size: int | None = None) -> NDArray[np.uint8]:
    """Return the pixels (height, width, 3) of a patch scan, or of a raster scan if there is no patch size."""
    values = np.frombuffer(scanned, np.uint8)
    if patch_size is None:
        return values.reshape(height, width, 3)
    side = tile_side(patch_size)
    return values.reshape(height // side, width // side, side, side, 3).swapaxes(1, 2).reshape(height, width, 3)


def tile_side(patch_size: int) -> int:
    """Return the side of a tile in pixels: sqrt(P / 3).

    Raises:
        ValueError: this is not a whole number.
    """
    side = isqrt(patch_size // 3)
    if side < 1 or 3 * side * side != patch_size:
        raise ValueError(f"{patch_size} bytes do not make a square tile of RGB pixels; take 12, 48, 192 or 768")
    return side


def _decoded(file: BinaryIO, name: str, options: ReadOptions) -> NDArray[np.uint8]:
    """Return the pixels (height, width, 3) of an image, scaled by the options."""
    with needed_by("an image", "pillow"):
        from PIL import Image, ImageOps  # noqa: PLC0415 - few corpora have images

    remarks = Remarks(name)
    try:
        with remarks.collected(), Image.open(timed(file), formats=sorted(set(IMAGE_SUFFIXES.values()))) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadDocumentError(
                    f"{name} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are allowed"
                )
            stored = "JPEG" if image.format == "MPO" else str(image.format)  # of several photographs
            remarks.compare(IMAGE_SUFFIXES, stored)
            if stored == "JPEG":
                image.load()
                _refuse_damaged_jpeg(file, image)
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
    except Exception as error:  # damaged bytes make decoders raise errors of many kinds
        if is_passed(error):
            raise
        detail = f"; {remarks}" if remarks else ""
        raise BadDocumentError(f"{name} cannot be decoded as an image: {described(error)}{detail}") from error
    remarks.log()
    if options.image_size is None:
        return rgb
    return np.asarray(_centre_square(Image.fromarray(rgb), options.image_size, options))


def _refuse_damaged_jpeg(file: BinaryIO, pixels: "Image.Image") -> None:
    """Raise a ValueError for a JPEG whose compressed data is not that of its pixels, which Pillow does not notice."""
    from PIL import Image  # noqa: PLC0415 - few corpora have images

    def shows_the_same(content: bytes) -> bool:
        with Image.open(timed(io.BytesIO(content)), formats=("JPEG",)) as image:
            return all(map(np.array_equal, _strips(image), _strips(pixels)))

    file.seek(0)
    if fault := jpeg_fault(file.read(), shows_the_same):
        raise ValueError(fault)


def _strips(image: "Image.Image") -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels of an image, STRIP_PIXELS at a time. A copy of all would take as much memory as the image."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        is_whole = rows >= image.height
        yield np.asarray(image if is_whole else image.crop((0, top, image.width, min(top + rows, image.height))))


def _to_rgb(image: "Image.Image") -> NDArray[np.uint8]:
    """Return 8-bit RGB (height, width, 3): palettes become colours, transparent pixels show white."""
    from PIL import Image  # noqa: PLC0415 - few corpora have images

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown")
    if image.mode.startswith("I"):
        return _grey_to_rgb(image)
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if strip.has_transparency_data:
            white = Image.new("RGBA", strip.size, "white")
            strip = Image.alpha_composite(white, strip.convert("RGBA"))
        rgb[top : top + rows] = np.asarray(strip.convert("RGB"))
    return rgb


def _grey_to_rgb(image: "Image.Image") -> NDArray[np.uint8]:
    """Return integer grey as RGB: the high byte of values of 16 bits.

    A TIFF of 32-bit integers does not state their range. Values up to 255 are taken for values of 8 bits.
    """
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if not 0 <= low <= high <= 0xFFFF:
        raise ValueError(f"its pixels are integers from {low:,} to {high:,}, whose black and white are unknown")
    is_wide = image.mode != "I" or image.format != "TIFF" or high > 0xFF
    grey = (values >> 8 if is_wide else values).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 0xFF
    return grey[..., None].repeat(3, axis=2)


def _centre_square(image: "Image.Image", size: int, options: ReadOptions) -> "Image.Image":
    """Return the middle square of an image, scaled up or down to `size` pixels a side."""
    from PIL.Image import Resampling  # noqa: PLC0415 - few corpora have images

    filters = {"lanczos": Resampling.LANCZOS, "box": Resampling.BOX}
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), filters[options.image_filter], box=(left, top, left + side, top + side))
