"""Conversion of decoded bytes back to media files, and the options that decode further files in the same way.

MediaCard ─▶ options_of ─▶ ReadOptions        bytes, MediaCard ─▶ png_of, wav_of ─▶ content of a file
"""

import io

import numpy as np

from byteloom.core.packages import needed_by
from data_pipeline.media import MediaCard
from data_pipeline.readers.formats.images import unscan
from data_pipeline.readers.options import ReadOptions


def options_of(card: MediaCard | None) -> ReadOptions:
    """Return the options that decode a file as the documents of a card were decoded."""
    if card is None:
        return ReadOptions()
    if card.kind == "audio":
        return ReadOptions(audio_rate=card.rate, audio_channels=1 if card.channels == 1 else None)
    scan = ReadOptions(image_scan=card.scan or "raster", patch_size=card.patch_size or ReadOptions.patch_size)
    if card.filter is None:
        return scan
    return ReadOptions(
        image_size=card.width, image_filter=card.filter, image_scan=scan.image_scan, patch_size=scan.patch_size
    )


def png_of(scanned: bytes, card: MediaCard) -> bytes:
    """Return a PNG of an image. Pixels that are missing at its end are black.

    Args:
        scanned: at most the bytes of an image, in the scan of the card.
        card: layout, with a size and a scan.
    """
    with needed_by("PNG", "pillow"):
        from PIL import Image  # noqa: PLC0415 - few models write images

    if card.image_bytes is None or card.width is None or card.height is None:
        raise ValueError(f"no size in the card: {card}")
    pixels = unscan(scanned.ljust(card.image_bytes, b"\0"), card.height, card.width, card.patch_size)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wav_of(samples: bytes, card: MediaCard) -> bytes:
    """Return a WAV of whole frames of sound. The card must have a rate and channels."""
    with needed_by("WAV", "soundfile"):
        import soundfile  # noqa: PLC0415 - few models write sound

    if card.rate is None or card.channels is None:
        raise ValueError(f"no rate or no channels in the card: {card}")
    file = io.BytesIO()
    frames = np.frombuffer(samples, "<i2").reshape(-1, card.channels)
    soundfile.write(file, frames.astype(np.int16), card.rate, "PCM_16", format="WAV")
    return file.getvalue()
