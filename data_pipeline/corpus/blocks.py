"""Blocks: many documents in one zstd frame, with a table of where each begins.

    Document, Document, … ─▶ pack_documents ─▶ Block ─▶ encode ─▶ StoredBlock
                                               Block ◀─ decode ◀─ StoredBlock

The content is the documents back to back, each followed by a byte 0. This byte holds the place of the separator, so a
training row is a range of a content. Raw bytes are those of documents alone. A document that fits into one block is
never cut. A longer one continues in the next block, and its slices tell where.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import blake3
import numpy as np
import zstandard
from numpy.typing import NDArray

from data_pipeline.documents import MODALITIES, Document
from data_pipeline.errors import BadDocumentError, CorruptBlockError

ENDS = np.dtype("<u4")
DOCUMENT_END = b"\0"
"""Byte that follows each document in a block's content."""


@dataclass(frozen=True)
class DocumentSlice:
    """Part of one document in one block: all of it, for a document that fits."""

    key: str
    modality: str
    start: int
    """Offset in the block's content."""
    length: int
    document_offset: int
    """Offset of this slice in its document; 0 at the document's start."""
    ends: bool
    """Whether this slice ends the document. If so, DOCUMENT_END follows it."""
    sha256: str
    """Digest of the slice's bytes."""
    document_sha256: str | None
    """Digest of the whole document, for the last slice of a document that began in another block."""


@dataclass(frozen=True)
class Block:
    """Documents back to back."""

    content: bytes
    """The documents, each followed by DOCUMENT_END."""
    slices: tuple[DocumentSlice, ...]
    """The documents' parts, in order."""

    @property
    def raw_bytes(self) -> int:
        """Bytes of documents."""
        return len(self.content) - len(self.ends)

    @property
    def documents(self) -> int:
        """Number of documents that begin here."""
        return sum(s.document_offset == 0 for s in self.slices)

    @property
    def modalities(self) -> int:
        """One bit for each of MODALITIES that occurs here."""
        return sum({1 << MODALITIES.index(s.modality) for s in self.slices})

    @cached_property
    def ends(self) -> NDArray[np.uint32]:
        """Offset of each DOCUMENT_END in the content."""
        return np.array([s.start + s.length for s in self.slices if s.ends], ENDS)

    @cached_property
    def table(self) -> bytes:
        """The slices, as JSON."""
        entries = [s.__dict__ for s in self.slices]
        return json.dumps({"bytes": len(self.content), "documents": entries}, separators=(",", ":")).encode()

    @cached_property
    def digest(self) -> bytes:
        """Identity of the content, however it is compressed: sha256 of the table, which has those of the documents."""
        return hashlib.sha256(self.table).digest()


class StoredBlock(NamedTuple):
    """Block as it is stored in a shard. Each part is a member of the tar."""

    frame: bytes
    """The content: one zstd frame with content size and checksum."""
    ends: bytes
    """`Block.ends`, little-endian uint32."""
    table: bytes
    """`Block.table`: one zstd frame."""


def pack_documents(
    documents: Iterable[Document], block_bytes: int, leave_out: Callable[[Document, BadDocumentError], None]
) -> Iterator[Block]:
    """Pack documents, in order, into blocks of at most `block_bytes` raw bytes.

    Two blocks are in memory, whatever the size of a document. A document that is longer than a block is read twice, so
    that nothing is stored of a document that cannot be read to its end.

    Args:
        documents: the documents. Empty ones are skipped.
        block_bytes: largest size of a block, in raw bytes.
        leave_out: called with each document that cannot be read, and the error. If it raises, packing ends.
    """
    filling = _Filling()
    for document in documents:
        try:
            pieces, fits = _probed(document, block_bytes)
        except BadDocumentError as error:
            leave_out(document, error)
            continue
        size = sum(map(len, pieces))
        if filling.size and not (fits and filling.size - len(filling.slices) + size <= block_bytes):  # all slices end
            yield filling.block()
            filling = _Filling()
        if size:
            filling.add(document, pieces)
        if fits:
            continue
        for part in _parts_of(document, block_bytes):
            if filling.size:
                yield filling.block()
            filling = part
    if filling.size:
        yield filling.block()


class _Filling:
    """Content of a block that is not full. It is joined once, because each copy costs as much as reading a file."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes of the content so far."""
        self.slices = list[DocumentSlice]()
        """Slices so far."""
        self._pieces = list[bytes | memoryview]()

    def add(
        self,
        document: Document,
        pieces: Sequence[bytes | memoryview],
        offset: int = 0,
        ends: bool = True,
        document_sha256: str | None = None,
    ) -> None:
        """Add a document or a part of it. Arguments are the fields of its DocumentSlice."""
        start, sha = self.size, hashlib.sha256()
        for piece in pieces:
            sha.update(piece)
            self.size += len(piece)
        own = sha.hexdigest()
        length = self.size - start
        self.slices.append(
            DocumentSlice(document.key, document.modality, start, length, offset, ends, own, document_sha256)
        )
        self._pieces += pieces
        if ends:
            self._pieces.append(DOCUMENT_END)
            self.size += len(DOCUMENT_END)

    def block(self) -> Block:
        """Return the block."""
        return Block(b"".join(self._pieces), tuple(self.slices))


def _probed(document: Document, block_bytes: int) -> tuple[list[bytes], bool]:
    """Read a document to its end; return its pieces and True if it fits into a block, or nothing and False."""
    pieces, size = list[bytes](), 0
    for piece in document.read():
        size += len(piece)
        if size <= block_bytes:
            pieces.append(piece)
        else:
            pieces.clear()
    return pieces, size <= block_bytes


def _parts_of(document: Document, block_bytes: int) -> Iterator[_Filling]:
    """Yield the blocks of a document that is longer than a block; the last may have room for others."""
    pieces, size, offset, whole = list[memoryview](), 0, 0, hashlib.sha256()

    def part(sha256: str | None) -> _Filling:
        filling = _Filling()
        filling.add(document, pieces, offset, sha256 is not None, sha256)
        return filling

    for piece in document.read():
        whole.update(piece)
        rest = memoryview(piece)
        while size + len(rest) > block_bytes:
            room = block_bytes - size
            pieces.append(rest[:room])
            rest = rest[room:]
            yield part(None)
            offset += block_bytes
            size = 0
            pieces.clear()
        pieces.append(rest)
        size += len(rest)
    yield part(whole.hexdigest())


def encode(block: Block, compressor: zstandard.ZstdCompressor) -> StoredBlock:
    """Return a block as it is stored. The compressor must write checksum and content size."""
    return StoredBlock(compressor.compress(block.content), block.ends.tobytes(), compressor.compress(block.table))


def seal(frame: bytes | memoryview, ends: bytes | memoryview) -> bytes:
    """Return BLAKE3 of the parts that a training run reads: cryptographic, and much faster than decompression."""
    return blake3.blake3(frame).update(ends).digest()


_own = threading.local()


def decompress(frame: bytes | memoryview) -> bytes:
    """Return the content of one zstd frame with content size.

    Raises:
        CorruptBlockError: the frame is damaged, or bytes follow it.
    """
    if not hasattr(_own, "decompressor"):
        _own.decompressor = zstandard.ZstdDecompressor()
    try:
        content: bytes = _own.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptBlockError(str(error)) from error
    return content


def decode(stored: StoredBlock, digest: bytes | None = None) -> Block:
    """Return the block that `encode` stored.

    Args:
        stored: the stored block.
        digest: digest that the block must have; None accepts any.

    Raises:
        CorruptBlockError: the block is damaged, or has another digest.
    """
    content, table = decompress(stored.frame), decompress(stored.table)
    try:
        block = Block(content, tuple(DocumentSlice(**entry) for entry in json.loads(table)["documents"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptBlockError(f"its table cannot be read: {error}") from error
    if block.table != table or (digest is not None and block.digest != digest):
        raise CorruptBlockError("the digest of its table is not the one in the index")
    done = 0
    for part in block.slices:
        own = memoryview(content)[part.start : part.start + part.length]
        if hashlib.sha256(own).hexdigest() != part.sha256:
            raise CorruptBlockError(f"the digest of document {part.key} is not the one in its table")
        end = part.start + len(own)
        if part.start != done or len(own) != part.length or content[end : end + part.ends] != DOCUMENT_END * part.ends:
            raise CorruptBlockError(f"document {part.key} is not where its table says")
        done = end + part.ends
    if done != len(content):
        raise CorruptBlockError("it holds more bytes than its documents")
    if block.ends.tobytes() != stored.ends:
        raise CorruptBlockError("the ends of its documents are not those in its table")
    return block
