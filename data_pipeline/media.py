"""Card of media: the layout of the bytes of decoded images and sounds.

readers ─▶ MediaCard of each document ─▶ common_card ─▶ MediaCard of a corpus, in its manifest and in its runs
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

MEDIA = frozenset({"image", "audio"})
"""Modalities of documents that have a card."""
CARD_FIELD = "media"
"""Name of the card in a manifest, in a checkpoint's state and in an export; absent where there is no card."""


@dataclass(frozen=True)
class MediaCard:
    """Layout of the bytes of a decoded document, or of all documents of a corpus; None where documents differ.

    Raises:
        ValueError: a value makes no sense.
    """

    kind: Literal["image", "audio"]
    """Kind of the media."""
    sample_format: str
    """Format of a sample: "u8" of images, "s16le" (16-bit little-endian integers) of sound."""
    channels: int | None = None
    """Interleaved channels: 3 of images (red, green, blue)."""
    rate: int | None = None
    """Frames of sound per second."""
    width: int | None = None
    """Pixels of a row of an image."""
    height: int | None = None
    """Rows of an image."""
    scan: Literal["raster", "patch"] | None = None
    """Order of an image's bytes; see `ReadOptions.image_scan`."""
    patch_size: int | None = None
    """Bytes of a tile of the patch scan."""
    filter: Literal["lanczos", "box"] | None = None
    """Filter that scaled images to their width; None if they were not scaled."""

    def __post_init__(self) -> None:
        if (self.kind, self.sample_format) not in (("image", "u8"), ("audio", "s16le")):
            raise ValueError(f"{self.kind!r} media in the format {self.sample_format!r} are not known")
        for name in ("channels", "rate", "width", "height", "patch_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}, not a whole number of at least 1")

    @property
    def image_bytes(self) -> int | None:
        """Bytes of each image; None for sound, and where images differ in size."""
        if self.kind != "image" or not (self.width and self.height and self.channels):
            return None
        return self.width * self.height * self.channels

    @property
    def frame_bytes(self) -> int | None:
        """Bytes of a frame of sound, one sample of each channel; None for images, and where channels differ."""
        return 2 * self.channels if self.kind == "audio" and self.channels else None

    def as_json(self) -> dict[str, Any]:
        """Return the card as JSON values, without absent ones."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, stored: object) -> Self:
        """Return a stored card. Fields of later versions are ignored.

        Raises:
            ValueError: this is no card.
        """
        if not isinstance(stored, dict) or not stored.keys() >= {"kind", "sample_format"}:
            raise ValueError(f"{stored!r} is not a card of media")
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})

    def __str__(self) -> str:
        if self.kind == "audio":
            parts = [f"{self.rate:,} Hz" if self.rate else "rates differ"]
            parts += [f"{self.channels} channel{'s'[: self.channels > 1]}" if self.channels else "channels differ"]
        else:
            parts = [f"{self.width} x {self.height} pixels" if self.image_bytes else "sizes differ"]
            parts += [f"{self.scan} scan" if self.scan else "scans differ"]
            parts += [f"tiles of {self.patch_size} bytes"] if self.patch_size else []
        return ", ".join([self.kind, *parts, self.sample_format])


def common_card(cards: Iterable[MediaCard | None]) -> MediaCard | None:
    """Return the card of documents, or of corpora, together; None if a part has no card, or kinds differ."""
    found: MediaCard | None = None
    for number, card in enumerate(cards):
        found = card if number == 0 else _merged(found, card)
        if found is None:
            return None
    return found


def _merged(one: MediaCard | None, other: MediaCard | None) -> MediaCard | None:
    if one is None or other is None or one.kind != other.kind:
        return None
    if one == other:
        return one
    rest = other.as_json()
    return MediaCard.from_json({name: value for name, value in one.as_json().items() if rest.get(name) == value})
