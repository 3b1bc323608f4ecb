"""Blocks: many documents in one zstd frame, with the table that says where each begins.

    Document, Document, … ─▶ pack_documents ─▶ Block ─▶ encode ─▶ frame, table
                                               Block ◀─ decode ◀─ frame, table

The raw bytes are the documents back to back with nothing between them. A document that fits into one block is never
cut; a longer one continues in the next block, and its slices say so.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property

import zstandard

from data_pipeline.documents import Document
from data_pipeline.errors import CorruptBlockError


@dataclass(frozen=True)
class DocumentSlice:
    """The part of one document that lies in one block: all of it, for a document that fits."""

    key: str
    modality: str
    start: int
    """Offset in the block's raw bytes."""
    length: int
    document_offset: int
    """Offset of this slice in its document; 0 where the document begins."""
    ends: bool
    """Whether the document ends with this slice."""
    sha256: str | None
    """Digest of the whole document, told where it ends."""


@dataclass(frozen=True)
class Block:
    raw: bytes
    slices: tuple[DocumentSlice, ...]

    @cached_property
    def document_ends(self) -> list[int]:
        """Offsets in the raw bytes just after the last byte of each document that ends here."""
        return [s.start + s.length for s in self.slices if s.ends]

    @cached_property
    def digest(self) -> bytes:
        """sha256 of the raw bytes, whatever compresses them."""
        return hashlib.sha256(self.raw).digest()


def pack_documents(documents: Iterable[Document], block_bytes: int) -> Iterator[Block]:
    """Documents in the order given, packed into blocks of at most `block_bytes` raw bytes.

    Holds one block in memory, whatever the size of a document.
    """
    raw, slices = bytearray(), list[DocumentSlice]()
    for document in documents:
        if raw and len(raw) + document.size > block_bytes:
            yield Block(bytes(raw), tuple(slices))
            raw, slices = bytearray(), []
        sha = hashlib.sha256()
        start, offset = len(raw), 0  # of the slice under way, in the block and in the document
        for piece in document.read():
            sha.update(piece)
            rest = piece
            while len(raw) + len(rest) > block_bytes:
                room = block_bytes - len(raw)
                raw += rest[:room]
                rest = rest[room:]
                slices.append(_slice(document, start, len(raw) - start, offset))
                yield Block(bytes(raw), tuple(slices))
                start, offset = 0, offset + len(raw) - start
                raw, slices = bytearray(), []
            raw += rest
        slices.append(_slice(document, start, len(raw) - start, offset, sha.hexdigest()))
    if raw:
        yield Block(bytes(raw), tuple(slices))


def _slice(document: Document, start: int, length: int, offset: int, sha256: str | None = None) -> DocumentSlice:
    """A slice of a document, the last one when the document's digest is given."""
    return DocumentSlice(document.key, document.modality, start, length, offset, sha256 is not None, sha256)


def encode(block: Block, compressor: zstandard.ZstdCompressor) -> tuple[bytes, bytes]:
    """A block as (zstd frame, JSON table). The compressor must write checksum and content size."""
    table = {
        "bytes": len(block.raw),
        "sha256": block.digest.hex(),
        "documents": [asdict(s) for s in block.slices],
    }
    return compressor.compress(block.raw), json.dumps(table, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Seal:
    """What an index knows of a block, against which its bytes are checked."""

    raw_bytes: int
    sha256: bytes
    """Of the raw bytes."""
    table_sha256: bytes


def decode(frame: bytes, table: bytes, seal: Seal) -> Block:
    """The block that `encode` was given.

    Raises:
        CorruptBlockError: frame or table is not what was written.
    """
    if hashlib.sha256(table).digest() != seal.table_sha256:
        raise CorruptBlockError("its table does not have the digest of the index")
    try:
        if zstandard.frame_content_size(frame) != seal.raw_bytes:
            raise CorruptBlockError("its length is not that of the index")
        raw = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptBlockError(str(error)) from error
    block = Block(raw, tuple(DocumentSlice(**entry) for entry in json.loads(table)["documents"]))
    if block.digest != seal.sha256:
        raise CorruptBlockError("its bytes do not have the digest of the index")
    return block
