"""Images as the bytes of their pixels: red, green, blue, 8 bits each, nothing before or after them.

    any format ─▶ upright RGB, on white ─▶ centre square, scaled ─▶ raster or patch scan ─▶ bytes
                                                                    unscan  ◀─ bytes

The patch scan is that of MEGABYTE (Yu et al. 2023, arXiv:2305.07185, on images): a patch of P bytes is a square tile of
P/3 pixels, so that what is near in the image is near in the sequence.
"""

from collections.abc import Iterator
from math import isqrt
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from byteloom.core.packages import needed_by
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.remarks import Remarks
from data_pipeline.readers.streams import pieces_of, seekable

with needed_by("an image", "pillow"):
    from PIL import Image, ImageOps

MAX_PIXELS = 1 << 26
"""Pixels of an image, at most: 192 MiB of RGB. A small file can say that it holds any number."""
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}


def read_image(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[bytes]:
    """The pixels of an image of any format that Pillow reads, whatever it is called, in pieces.

    Of an animation or of several pages the first is taken. Colour profiles are not applied.

    Raises:
        BadDocumentError: it is no image, damaged, cut short, too large, or its sides do not divide into tiles.
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


def raster_scan(pixels: NDArray[np.uint8]) -> bytes:
    """Rows from the top, pixels from the left, red before green before blue.

    Args:
        pixels: (height, width, 3)
    """
    return pixels.tobytes()


def patch_scan(pixels: NDArray[np.uint8], patch_size: int) -> bytes:
    """Square tiles of `patch_size` bytes, each a raster scan, in the order of a raster scan of the tiles.

    Args:
        pixels: (height, width, 3)
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
    """The pixels (height, width, 3) of a patch scan, or without patch size of a raster scan."""
    values = np.frombuffer(scanned, np.uint8)
    if patch_size is None:
        return values.reshape(height, width, 3)
    side = tile_side(patch_size)
    return values.reshape(height // side, width // side, side, side, 3).swapaxes(1, 2).reshape(height, width, 3)


def tile_side(patch_size: int) -> int:
    """Pixels of the side of a tile of that many bytes: sqrt(P / 3).

    Raises:
        ValueError: that is not a whole number.
    """
    side = isqrt(patch_size // 3)
    if side < 1 or 3 * side * side != patch_size:
        raise ValueError(f"{patch_size} bytes do not make a square tile of RGB pixels; take 12, 48, 192 or 768")
    return side


def _decoded(file: BinaryIO, name: str, options: ReadOptions) -> NDArray[np.uint8]:
    """The pixels (height, width, 3) of an image as the options want it."""
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
    except Exception as error:  # decoders of damaged bytes raise whatever they stumble over
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        detail = f"; {remarks}" if remarks else ""
        raise BadDocumentError(f"{name} cannot be decoded as an image: {reason}{detail}") from error
    remarks.log()
    return np.asarray(rgb if options.image_size is None else _centre_square(rgb, options.image_size, options))


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey keeps its high byte, palettes become colours, what is transparent shows white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _centre_square(image: Image.Image, size: int, options: ReadOptions) -> Image.Image:
    """The middle square of the image scaled, up or down, so that its shorter side has `size` pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), FILTERS[options.image_filter], box=(left, top, left + side, top + side))
