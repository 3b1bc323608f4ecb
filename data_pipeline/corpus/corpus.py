"""A written corpus: shards, the index that finds every block without opening a tar, and the manifest.

    corpus/
        manifest.json         format, totals, the shards, digests of the index files and of itself
        lengths.npy           for each block (LENGTHS) what the stream's order depends on
        index.npy             for each block (BLOCK) where it lies and its digests
        shard-000000.tar      000000-000000.bytes.zst, 000000-000000.ends, 000000-000000.json.zst, 000000-000001.…
        withdrawn.json        documents that must not be read any more, if there are any

    Storage ─▶ read_manifest, open_index_file ─▶ Corpus ─▶ read_content(block) ─▶ verified bytes

`tar` or any WebDataset reader opens a shard; `zstd -d` opens a block.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.corpus.blocks import ENDS, Block, StoredBlock, decode, decompress, seal
from data_pipeline.corpus.index import open_index_file
from data_pipeline.corpus.manifest import card_of, read_manifest
from data_pipeline.corpus.storage.remote import RemoteConfig
from data_pipeline.corpus.storage.storage import open_storage
from data_pipeline.corpus.tar import TAR_HEADER, block_key, number_of_shard, padded
from data_pipeline.corpus.withdrawn import Withdrawal, read_withdrawn
from data_pipeline.documents import MODALITIES, Document, Piece
from data_pipeline.errors import CorruptBlockError, DamagedCorpusError
from data_pipeline.media import MediaCard

T = TypeVar("T")

BLOCKS_AHEAD = 7
"""Blocks after the one being read that a request for whole documents of a remote corpus also brings."""
SPAN_BYTES = 16 << 20
"""Size limit of one request for adjacent blocks of a remote shard."""


class Corpus:
    """A corpus that is open for reading. Every block is verified when it is read.

    Many threads may read at once. Opening reads the index files into memory: 100 bytes a block.

    Args:
        location: a folder, or a URL that fsspec opens (https://host/corpus, s3://bucket/corpus).
        check_shards: check that every shard of a folder is there and has its length. Shards at a URL are checked when
            they are read.
        remote: how shards at a URL are fetched.
        digest: digest that the corpus must have; None accepts any.

    Raises:
        CorpusError: there is no corpus, its manifest or index is damaged, or it has another digest.
    """

    def __init__(
        self,
        location: str | Path,
        check_shards: bool = True,
        remote: RemoteConfig | None = None,
        digest: str | None = None,
    ) -> None:
        self.storage = open_storage(location, remote or RemoteConfig())
        self.location = self.storage.location
        with ExitStack() as on_failure:
            on_failure.callback(self.storage.close)
            self.manifest = read_manifest(self.storage)
            if digest not in (None, self.digest):
                raise DamagedCorpusError(
                    f"{self.location} has the digest {self.digest}, and {digest} is asked for; name the corpus of that "
                    "digest, or, if the change is wanted, set shards_sha256 to the new one"
                )
            self.lengths = open_index_file(self.storage, self.manifest, "lengths")
            self.index = open_index_file(self.storage, self.manifest, "index")
            if check_shards:
                for shard in self.manifest["shards"]:
                    self.storage.check_size(shard["name"], shard["bytes"])
            on_failure.pop_all()
        self._shard_names = [shard["name"] for shard in self.manifest["shards"]]

    @property
    def digest(self) -> str:
        """Digest of the manifest, and by it of every file of the corpus but the list of withdrawn documents."""
        return str(self.manifest["manifest_sha256"])

    @property
    def content_sha256(self) -> str:
        """Identity of the raw content, in order."""
        return str(self.manifest["content_sha256"])

    @property
    def raw_bytes(self) -> int:
        """Bytes of all documents."""
        return int(self.manifest["raw_bytes"])

    @property
    def modalities(self) -> list[str]:
        """Modalities of the documents, in the order of MODALITIES."""
        found = {name for shard in self.manifest["shards"] for name in shard["modalities"]}
        return [name for name in MODALITIES if name in found]

    @property
    def card(self) -> MediaCard | None:
        """Layout of the bytes of all documents; None if they are no media, or an earlier version wrote the corpus."""
        return card_of(self.manifest)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.index)

    def documents(self) -> Iterator[Document]:
        """Yield the documents in order, each with all its bytes in memory. Withdrawn documents are skipped.

        Raises:
            CorruptBlockError: a block is damaged.
            CorpusError: a shard cannot be read.
        """
        parts: list[bytes] = []
        for piece in self.pieces():
            parts.append(piece.content)
            if piece.ends:
                yield Document(piece.key, piece.modality, partial(iter, (b"".join(parts),)), self.card)
                parts = []

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents in order, in pieces: a document that is longer than a block has several.

        Withdrawn documents are skipped. Errors are those of `read`.
        """
        withdrawn = {entry.key for entry in self.withdrawn}
        for number in range(len(self)):
            block = self.read(number, through=number + BLOCKS_AHEAD)
            for part in block.slices:
                if part.key not in withdrawn:
                    content = block.content[part.start : part.start + part.length]
                    yield Piece(part.key, part.modality, part.document_offset, content, part.ends)

    @cached_property
    def first_blocks(self) -> NDArray[np.int64]:
        """(shards,) number of each shard's first block."""
        counts = [shard["blocks"] for shard in self.manifest["shards"]]
        return np.concatenate([[0], np.cumsum(counts[:-1], dtype=np.int64)])

    @cached_property
    def withdrawn(self) -> list[Withdrawal]:
        """Documents that must not be read any more. The list is read once, at the first access.

        Raises:
            CorpusError: the list cannot be read, is damaged, or belongs to another corpus.
        """
        return read_withdrawn(self.storage, self.content_sha256, self.lengths)

    def blocks_of(self, shard: int) -> range:
        """Return the numbers of the blocks of a shard, given its position in the manifest."""
        first = int(self.first_blocks[shard])
        return range(first, first + int(self.manifest["shards"][shard]["blocks"]))

    def read_content(self, block: int, through: int | None = None) -> tuple[bytes, NDArray[np.uint32]]:
        """Return the content of a block and where documents end in it. Training reads this.

        Args:
            block: number of the block.
            through: last block that is needed soon. Remote storage fetches the blocks up to it in the same request.

        Raises:
            CorruptBlockError: the bytes are not those that were written.
            CorpusError: the shard cannot be read.
        """
        seal_of_index = self.index[block]["stored_blake3"].tobytes()

        def checked(members: list[memoryview]) -> tuple[bytes, NDArray[np.uint32]]:
            frame, ends = members
            if seal(frame, ends) != seal_of_index:
                raise CorruptBlockError("its digest is not the one in the index")
            return decompress(frame), np.frombuffer(ends, ENDS)

        return self._read(block, through, 2, checked)

    def read_ends(self, block: int) -> NDArray[np.int64]:
        """Return where documents end in the content of a block, without reading it. They are checked, not verified.

        Raises:
            CorruptBlockError: they contradict the lengths of the block.
            CorpusError: the shard cannot be read.
        """
        lengths = self.lengths[block]
        if not lengths["document_ends"]:
            return np.empty(0, np.int64)
        record, (start, stop) = self.index[block], self.members(block)[1]
        begin = int(record["frame_offset"])
        stored = self.storage.read(self._shard_names[record["shard"]], begin + start, begin + stop)
        ends = np.frombuffer(stored, ENDS).astype(np.int64)
        content = int(lengths["raw_bytes"]) + len(ends)
        if (np.diff(ends, prepend=-1) <= 0).any() or ends[-1] >= content:
            raise CorruptBlockError(f"{self.name_of(block)} is damaged: its ends of documents are not in order")
        return ends

    def read(self, block: int, through: int | None = None) -> Block:
        """Return a block with its table.

        Args:
            block: number of the block.
            through: last block that is needed soon. Remote storage fetches the blocks up to it in the same request.

        Raises:
            CorruptBlockError: the bytes are not those that were written.
            CorpusError: the shard cannot be read.
        """
        return self._read(block, through, 3, lambda members: self._decoded(block, members)[1])

    def read_stored(self, block: int, through: int | None = None) -> StoredBlock:
        """Return a block as it is stored in its shard, verified. Arguments and errors are those of `read`."""
        return self._read(block, through, 3, lambda members: self._decoded(block, members)[0])

    def _decoded(self, block: int, members: list[memoryview]) -> tuple[StoredBlock, Block]:
        record = self.index[block]
        stored = StoredBlock(*map(bytes, members))
        if seal(stored.frame, stored.ends) != record["stored_blake3"].tobytes():
            raise CorruptBlockError("its digest is not the one in the index")
        return stored, decode(stored, record["content_sha256"].tobytes())

    def _read(self, block: int, through: int | None, count: int, checked: Callable[[list[memoryview]], T]) -> T:
        """Return `checked` of the first `count` members of a block. Fetch wrong bytes of remote storage again."""
        record = self.index[block]
        begin, name = int(record["frame_offset"]), self._shard_names[record["shard"]]
        spans = self.members(block)[:count]
        ahead = self._span_end(block, block if through is None else through)
        for attempt in range(1, self.storage.rereads + 1):
            try:
                span = memoryview(self.storage.read_ahead(name, begin, begin + spans[-1][1], ahead, attempt > 1))
                return checked([span[start:end] for start, end in spans])
            except CorruptBlockError as error:
                if attempt == self.storage.rereads:
                    raise type(error)(f"{self.name_of(block)} is damaged: {error}") from error
        raise AssertionError("the last attempt returns or raises")

    def members(self, block: int) -> list[tuple[int, int]]:
        """Return the begin and end of each member of a block, relative to its frame."""
        record = self.index[block]
        ends_bytes = int(self.lengths[block]["document_ends"]) * ENDS.itemsize
        spans, begin = [], 0
        for size in (int(record["frame_bytes"]), ends_bytes, int(record["table_bytes"])):
            spans.append((begin, begin + size))
            begin += padded(size) + TAR_HEADER
        return spans

    def _span_end(self, block: int, through: int) -> int:
        """Return the end of a request that begins at `block` and includes blocks up to `through`, within limits.

        The limits are the end of the shard and SPAN_BYTES.
        """
        begin = int(self.index[block]["frame_offset"])
        last = max(block, min(through, self.blocks_of(int(self.index[block]["shard"]))[-1]))
        while True:
            end = int(self.index[last]["frame_offset"]) + self.members(last)[-1][1]
            if last == block or end - begin <= SPAN_BYTES:
                return end
            last = (block + last) // 2

    def name_of(self, block: int) -> str:
        """Return the name of a block for messages: its key and its shard."""
        shard = int(self.index[block]["shard"])
        name = self._shard_names[shard]
        key = block_key(number_of_shard(name), block - self.blocks_of(shard)[0])
        return f"block {key} of {self.location}/{name}"

    def close(self) -> None:
        """Close the storage."""
        self.storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
