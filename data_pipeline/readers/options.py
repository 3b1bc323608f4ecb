"""Options of readers: how files become documents."""

from dataclasses import dataclass, fields
from math import isqrt
from typing import Literal

from data_pipeline.documents import MODALITIES
from data_pipeline.errors import CorpusError
from data_pipeline.readers.registry import reader_named

AUTO = "auto"
"""Value of `--reader` that chooses a reader by each file's suffix."""


@dataclass(frozen=True)
class ReadOptions:
    """Options for turning files into documents.

    Raises:
        CorpusError: a value makes no sense, or the reader does not use the option.
    """

    reader: str = AUTO
    """Reader of every file, by its name in the registry; "auto" decides by each file's suffix."""
    field: str = "text"
    """The field of a JSON line or the column of a Parquet file that is the document; dots lead into nested ones."""
    target_field: str | None = None
    """The field of a JSON line that is the target of a pair, whose source is `field`. None: documents are no pairs."""
    members: tuple[str, ...] | None = None
    """Suffixes of the members of a tar that are documents, or of a WebDataset sample that make up its document, such as
    ("jpg", "txt"). None takes every member."""
    image_size: int | None = None
    """Pixels of a side: the centre square of an image is scaled to it. None keeps images as they are."""
    image_filter: Literal["lanczos", "box"] = "lanczos"
    """Filter that scales images. The downsampled ImageNet of 2017 and later (Chrabaszcz et al.) uses "box"."""
    image_scan: Literal["raster", "patch"] = "raster"
    """Order of an image's bytes: row by row, or tile by tile as MEGABYTE reads images."""
    patch_size: int = 192
    """Bytes of a tile of the patch scan, three times a square number: a tile is sqrt(patch_size / 3) pixels wide."""
    audio_rate: int | None = None
    """Samples per second to which sound is resampled. None keeps each file's own rate."""
    audio_channels: Literal[1] | None = None
    """1 mixes the channels of sound into one. None keeps them, interleaved."""
    skip_binary: bool = False
    """Leave out files read as their own bytes that are not UTF-8 text: see `readers.formats.text.is_binary`."""
    modality: str | None = None
    """One of MODALITIES for every document. None decides by reader, suffix and content."""
    kinds: tuple[str, ...] | None = None
    """Modalities of the documents to keep, such as ("code", "text"). None keeps all."""

    def __post_init__(self) -> None:
        if self.reader != AUTO:
            self._refuse_unused(reader_named(self.reader).options | {"reader", "modality", "kinds"})
        for kind in (*((self.modality,) if self.modality is not None else ()), *(self.kinds or ())):
            if kind not in MODALITIES:
                raise CorpusError(f"unknown modality {kind!r}; choose one of {', '.join(MODALITIES)}")
        if self.image_scan == "patch" and (
            self.patch_size < 3 or 3 * isqrt(self.patch_size // 3) ** 2 != self.patch_size
        ):
            raise CorpusError(
                f"--patch-size is {self.patch_size}; it must be three times a square number, such as 12, 48, 192 or "
                "768, so that tiles are square"
            )
        for name in ("image_size", "audio_rate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CorpusError(f"{name} is {value}; it must be at least 1")

    def _refuse_unused(self, used: frozenset[str]) -> None:
        for field in fields(self):
            if field.name not in used and getattr(self, field.name) != field.default:
                raise CorpusError(f"--reader {self.reader} does not use the option {field.name}; leave it out")
