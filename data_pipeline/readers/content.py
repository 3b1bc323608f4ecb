"""Modality of a document by its content: text or code that holds binary content becomes binary.

suffix ─▶ modality_of ─▶ text or code ─▶ first piece ─▶ settle_modality ─▶ text, code or binary
"""

from data_pipeline.documents import MODALITIES, Document
from data_pipeline.readers.encodings import encoding_of
from data_pipeline.readers.kinds import names_text
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.remarks import Remarks
from data_pipeline.sources.source_file import LeftOutError

BEGINNINGS = {
    **{"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "GIF": b"GIF8", "JPEG 2000": b"\0\0\0\x0cjP  "},
    **{"TIFF": b"II*\0", "RIFF": b"RIFF", "FLAC": b"fLaC", "Ogg": b"OggS", "MP3": b"ID3", "gzip": b"\x1f\x8b\x08"},
    **{"zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\0", "bzip2": b"BZh", "7z": b"7z\xbc\xaf'\x1c"},
    **{"zip": b"PK\x03\x04", "PDF": b"%PDF-", "ELF": b"\x7fELF", "Parquet": b"PAR1", "Arrow": b"ARROW1"},
    **{"HDF5": b"\x89HDF\r\n\x1a\n", "GGUF": b"GGUF", "SQLite": b"SQLite format 3\0", "WebAssembly": b"\0asm"},
}
"""First bytes of files of binary formats."""
ANY_BEGINNING = tuple(BEGINNINGS.values())
BASE_MEDIA = b"ftyp"
"""Bytes 4 to 8 of AVIF, HEIC, M4A and MP4 files (ISO/IEC 14496-12)."""


def binary_format(piece: bytes) -> str | None:
    """Return the binary format of a file by its first piece; None if the file may be text.

    A NUL makes a file binary, as for git, unless it has a byte order mark of UTF-16 or UTF-32.
    """
    if piece[4:8] == BASE_MEDIA:
        return "ISO base media"
    if piece.startswith(ANY_BEGINNING):
        return next(name for name, begin in BEGINNINGS.items() if piece.startswith(begin))
    return "binary" if 0 in piece and encoding_of(piece) is None else None


def settle_modality(document: Document, piece: bytes, name: str, options: ReadOptions) -> None:
    """Correct the modality of a document whose bytes are those of a file.

    Args:
        document: the document, with the modality of its suffix.
        piece: its first piece.
        name: name of the file for errors.
        options: modality and kinds that the user asked for.

    Raises:
        LeftOutError: the user did not ask for documents of this kind.
    """
    if options.modality is None and document.modality in ("text", "code") and (found := binary_format(piece)):
        if names_text(document.key):
            remarks = Remarks(name)
            remarks.add(f"its suffix is that of {document.modality}, and its content is {found}")
            remarks.log()
        document.modality = "binary"
    refuse_other_kind(document, name, options)


def refuse_other_kind(document: Document, name: str, options: ReadOptions) -> None:
    """Raise a LeftOutError if the user did not ask for documents of this modality."""
    if options.kinds is not None and document.modality not in options.kinds:
        others = ", ".join(kind for kind in MODALITIES if kind in options.kinds)
        raise LeftOutError("other kind", f"{name} is of the kind {document.modality}, not {others}")
