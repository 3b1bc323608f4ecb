"""Reader of images: the bytes of their pixels, red, green and blue with 8 bits each, nothing before or after them.

    any format ─▶ upright RGB, on white ─▶ centre square, scaled ─▶ raster or patch scan ─▶ bytes
                                                                    unscan  ◀─ bytes

The patch scan is that of MEGABYTE (Yu et al. 2023, arXiv:2305.07185, on images): a patch of P bytes is a square tile of
P/3 pixels. Pixels that are near in the image are then near in the sequence.
"""

from collections.abc import Iterator
from math import isqrt
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from byteloom.core.packages import needed_by
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import Reader, register_reader
from data_pipeline.readers.remarks import Remarks
from data_pipeline.readers.streams import pieces_of, seekable

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 1 << 26
"""Largest number of pixels of an image: 192 MiB of RGB. The header of a small file can state any number."""


def read_image(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[bytes]:
    """Yield the pixels of an image in pieces. The format is any that Pillow reads, whatever the file is called.

    An animation gives its first frame, and a file of several pages its first page. Colour profiles are not applied.

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
    if options.image_scan == "raster":
        scanned = raster_scan(pixels)
    else:
        try:
            scanned = patch_scan(pixels, options.patch_size)
        except ValueError as error:
            raise BadDocumentError(f"{name}: {error}") from error
    yield from pieces_of(scanned)


IMAGE_READER = register_reader(
    Reader(
        "images",
        "Pixels of images.",
        read_file=read_image,
        options=frozenset({"members", "image_size", "image_filter", "image_scan", "patch_size"}),
        suffixes=frozenset({".bmp", ".gif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}),
        modality="image",
    )
)


def raster_scan(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels row by row from the top, from the left, red before green before blue.

    Args:
        pixels: (height, width, 3)
    """
    return pixels.tobytes()


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
        with remarks.collected(), Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadDocumentError(
                    f"{name} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are allowed"
                )
            upright = ImageOps.exif_transpose(image)
            rgb = _to_rgb(upright)
    except BadDocumentError:
        raise
    except Exception as error:  # damaged bytes make decoders raise errors of many kinds
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        detail = f"; {remarks}" if remarks else ""
        raise BadDocumentError(f"{name} cannot be decoded as an image: {reason}{detail}") from error
    remarks.log()
    return np.asarray(rgb if options.image_size is None else _centre_square(rgb, options.image_size, options))


def _to_rgb(image: "Image.Image") -> "Image.Image":
    """Return 8-bit RGB: 16-bit grey keeps its high byte, palettes become colours, transparent pixels show white."""
    from PIL import Image  # noqa: PLC0415 - few corpora have images

    if image.mode.startswith("I"):
        grey = np.asarray(image).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _centre_square(image: "Image.Image", size: int, options: ReadOptions) -> "Image.Image":
    """Return the middle square of an image, scaled up or down to `size` pixels a side."""
    from PIL.Image import Resampling  # noqa: PLC0415 - few corpora have images

    filters = {"lanczos": Resampling.LANCZOS, "box": Resampling.BOX}
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), filters[options.image_filter], box=(left, top, left + side, top + side))
