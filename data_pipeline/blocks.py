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

    @property
    def document_ends(self) -> list[int]:
        """Offsets in the raw bytes just after the last byte of each document that ends here."""
        return [s.start + s.length for s in self.slices if s.ends]

    def digest(self) -> bytes:
        """sha256 of the raw bytes: the block's identity, whatever compressed them."""
        return hashlib.sha256(self.raw).digest()


def pack_documents(documents: Iterable[Document], block_bytes: int) -> Iterator[Block]:
    """Documents in the order given, packed into blocks of at most `block_bytes` raw bytes.

    Holds one block in memory, whatever the size of a document.
    """
    raw = bytearray()
    slices: list[DocumentSlice] = []

    def take_block() -> Block:
        block = Block(bytes(raw), tuple(slices))
        raw.clear()
        slices.clear()
        return block

    for document in documents:
        if raw and len(raw) + document.size > block_bytes:
            yield take_block()
        sha = hashlib.sha256()
        slice_start, document_offset = len(raw), 0

        def end_slice(sha256: str | None, document: Document = document) -> None:
            nonlocal slice_start, document_offset
            length = len(raw) - slice_start
            slices.append(
                DocumentSlice(
                    document.key, document.modality, slice_start, length, document_offset, sha256 is not None, sha256
                )
            )
            document_offset += length
            slice_start = 0

        for piece in document.read():
            sha.update(piece)
            while piece:
                if len(raw) == block_bytes:
                    end_slice(None)
                    yield take_block()
                room = block_bytes - len(raw)
                raw += piece[:room]
                piece = piece[room:]  # noqa: PLW2901 the rest goes into the next block
        end_slice(sha.hexdigest())
    if raw:
        yield take_block()


def encode(block: Block, compressor: zstandard.ZstdCompressor) -> tuple[bytes, bytes]:
    """A block as (zstd frame, JSON table). The compressor must write checksum and content size."""
    table = {
        "bytes": len(block.raw),
        "sha256": block.digest().hex(),
        "documents": [asdict(s) for s in block.slices],
    }
    return compressor.compress(block.raw), json.dumps(table, separators=(",", ":")).encode()


def decode(frame: bytes, table: bytes, digest: bytes, name: str) -> Block:
    """The block that `encode` was given.

    Args:
        digest: sha256 of the raw bytes, as the index has it.
        name: what to call the block in an error.

    Raises:
        CorruptBlockError: frame or table is damaged.
    """
    try:
        raw = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        entries = json.loads(table)
        slices = tuple(DocumentSlice(**entry) for entry in entries["documents"])
    except (zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
        raise CorruptBlockError(f"{name} is damaged: {error}") from error
    if hashlib.sha256(raw).digest() != digest or entries["sha256"] != digest.hex():
        raise CorruptBlockError(f"{name} is damaged: its bytes do not have the digest of the index")
    return Block(raw, slices)
