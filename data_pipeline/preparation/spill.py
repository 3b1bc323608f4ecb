"""Spill: temporary files that bring documents from the order of the sources to the order of the shards.

    documents of a unit ─▶ UnitWriter ─▶ runs, sorted by hash ─▶ Spool ─▶ documents of a shard, in order

    units/000012/               complete or absent
        run-0000, run-0001 …    records sorted by (part, hash), then four columns of uint64:
                                offsets in the run, one more than records; hashes; ordinals: documents of the
                                unit before it; ends: raw bytes of the unit up to its end
        large                   bytes of documents that are too long for memory, if there are any
        skipped.jsonl           documents that were left out, if there are any
        unit.json               counts, and where in each run the columns begin

A document's hash decides its place: each shard is an equal range of hashes, in order. Neighbours in a block therefore
come from different places, a shard's records are one range of each run, and the number of shards can be chosen after
the bytes are known.

    record = HEADER, key, sha256 of the content (when deduplicating), card of media (if MEDIA), payload

The payload is the document itself, or its place: a file of the sources, or a range of a unit's `large`.
"""

import json
import mmap
import os
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from byteloom.core.storage.files import sync
from byteloom.core.storage.state_files import read_json
from data_pipeline.documents import MODALITIES, READ_BYTES, Document
from data_pipeline.media import MediaCard
from data_pipeline.preparation.plan import PrepareOptions, begin_again, skip_line
from data_pipeline.readers import document_of, size_of
from data_pipeline.sources.source_file import LeftOutError, Skipped, SourceFile

BUFFER_BYTES = 64 << 20
"""Approximate memory for the documents that wait to be sorted into a run."""
RECORD_OVERHEAD = 400
"""Approximate memory that Python needs for each document besides its bytes."""
LARGE_BYTES = 4 << 20
"""Longer documents are written to `large` while they are read."""
COPY_BYTES = 4 << 20
DIGEST_BYTES = 32

MODALITY = {name: number for number, name in enumerate(MODALITIES)}

INLINE, IN_FILE, IN_LARGE = range(3)
MEDIA = 0x80
"""Bit of the kind of a record with a card: its length (CARD_BYTES), and its JSON."""
CARD_BYTES = struct.Struct("<H")
HEADER = struct.Struct("<BBIIQ")
"""Kind (one of the three above, and MEDIA); modality; source; bytes of the key; raw bytes of the document, 0 if
not known."""
LISTED = struct.Struct("<qH")
"""Payload of IN_FILE before version and URL: bytes as listed, -1 if not known; bytes of the version."""
SPAN = struct.Struct("<IQ")
"""Payload of IN_LARGE: unit, and offset in its `large`."""

PLACE = struct.Struct(">QQ")
"""First bytes of a digest: a document's hash, and the number that decides its part."""

RUN = np.dtype(
    [
        ("unit", "<u4"),
        ("number", "<u4"),
        ("columns", "<u8"),  # offset of the columns
        ("documents", "<u8", (2,)),  # documents of each part
        # Limits: a record is read if its ordinal and its end are not beyond these.
        ("max_ordinal", "<u8"),
        ("max_end", "<u8"),
    ]
)


class UnitWriter:
    """Writer of the folder of a unit. Memory: about BUFFER_BYTES.

    Args:
        folder: empty folder.
        unit: number of the unit.
        source: number of its source.
        options: options of the preparation.
    """

    def __init__(self, folder: Path, unit: int, source: int, options: PrepareOptions) -> None:
        self.documents = 0
        """Documents so far."""
        self.bytes = 0
        """Raw bytes of these documents, partly estimates."""
        self._folder, self._unit, self._source, self._options = folder, unit, source, options
        self._seed = f"{options.seed}\0".encode()
        self._held_out_below = int(options.holdout * 2**64)
        self._parts = len(options.parts)
        self._part_documents, self._part_bytes = [0] * self._parts, [0] * self._parts
        self._left_out = Counter[str]()
        self._runs = list[dict[str, object]]()
        self._skipped = (folder / "skipped.jsonl").open("wb")
        self._large, self._large_bytes = (folder / "large").open("wb"), 0
        self._clear()

    def _clear(self) -> None:
        self._records = list[bytes]()
        self._rows = array("Q")  # part, hash, ordinal and end of each record
        self._held = 0

    def add_unread(self, file: SourceFile, raw_bytes: int) -> None:
        """Add a file that is one document. It is read when it is packed.

        Args:
            file: the file.
            raw_bytes: estimate of its raw bytes.
        """
        self._add(IN_FILE, 0, file.key, raw_bytes, None, [_where(file)])

    def add(self, document: Document, file: SourceFile | None = None, room: int | None = None) -> bool:
        """Read a document and add it; leave it out if it is empty.

        Args:
            document: the document.
            file: the file that it is, if it can be read from there again and its bytes need not be stored here.
            room: largest number of raw bytes that it may have; None is no limit.

        Returns:
            False if the document has more bytes than there is room for, and was not added.

        Raises:
            BadDocumentError: the document cannot be read; nothing of it is stored.
        """
        pieces, size = list[bytes](), 0
        digest = sha256() if self._options.deduplicate else None
        large, kept = self._large_bytes, False
        try:
            for piece in document.read():
                size += len(piece)
                if room is not None and size > room:
                    return False
                if digest is not None:
                    digest.update(piece)
                if file is None:
                    pieces.append(piece)
                    if size > LARGE_BYTES:
                        self._large.writelines(pieces)
                        pieces.clear()
            kept = True
        finally:
            if not kept and size > LARGE_BYTES:
                self._large.seek(large)
                self._large.truncate()
        if not size:
            self.leave_out(Skipped(document.key, "empty", "it has no byte"))
            return True
        if file is not None:
            kind, payload = IN_FILE, [_where(file)]
        elif size > LARGE_BYTES:
            self._large_bytes += size
            kind, payload = IN_LARGE, [SPAN.pack(self._unit, large)]
        else:
            kind, payload = INLINE, pieces
        sha = digest.digest() if digest is not None else None
        if file is None and document.media is not None:
            card = json.dumps(document.media.as_json()).encode()
            kind, payload = kind | MEDIA, [CARD_BYTES.pack(len(card)), card, *payload]
        self._add(kind, MODALITY[document.modality], document.key, size, sha, payload)
        return True

    def leave_out(self, left_out: Skipped) -> None:
        """Count a document that is left out, and write it to skipped.jsonl."""
        self._left_out[left_out.reason] += 1
        self._skipped.write(skip_line(self._source, left_out, **self._ordinal()))

    def _ordinal(self) -> dict[str, int]:
        # Only limits need the number of documents before it.
        return {"ordinal": self.documents} if self._options.limited else {}

    def _add(self, kind: int, modality: int, key: str, size: int, digest: bytes | None, payload: list[bytes]) -> None:
        name = key.encode("utf-8", "surrogateescape")
        place, draw = PLACE.unpack_from(sha256(self._seed + (digest or name)).digest())
        part = int(self._parts == 2 and draw < self._held_out_below)
        header = HEADER.pack(kind, modality, self._source, len(name), size)
        record = b"".join((header, name, digest or b"", *payload))
        self.bytes += size
        self._rows.extend((part, place, self.documents, self.bytes))
        self._records.append(record)
        self.documents += 1
        self._part_documents[part] += 1
        self._part_bytes[part] += size
        self._held += len(record) + RECORD_OVERHEAD
        if self._held >= BUFFER_BYTES:
            self._write_run()

    def _write_run(self) -> None:
        rows = np.frombuffer(self._rows, np.uint64).reshape(-1, 4)
        order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable: equal hashes stay in the order of the sources
        sizes = np.fromiter(map(len, self._records), np.uint64, len(self._records))[order]
        part, hashes, ordinals, ends = rows[order].T
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
        path = self._folder / _run_name(len(self._runs))
        with path.open("wb", buffering=COPY_BYTES) as file:
            file.writelines(self._records[i] for i in order.tolist())
            file.write(bytes(-file.tell() % 8))
            begin = file.tell()
            for column in (offsets, hashes, ordinals, ends):
                file.write(column.tobytes())
        sync(path)
        counts = [int((part == number).sum()) for number in range(self._parts)]
        self._runs.append({"columns": begin, "documents": counts})
        self._clear()

    def close(self, **more: object) -> None:
        """Put the unit on disk, with `more` besides its counts."""
        if self._records:
            self._write_run()
        for file in (self._skipped, self._large):
            file.close()
            keep_if_any(Path(file.name))
        counts = {
            "documents": self.documents,
            "bytes": self.bytes,
            "part_documents": self._part_documents,
            "part_bytes": self._part_bytes,
            "left_out": self._left_out,
            "runs": self._runs,
            **more,
        }
        (self._folder / "unit.json").write_text(json.dumps(counts), encoding="utf-8")
        sync(self._folder / "unit.json")
        sync(self._folder)


def unit_folder(folder: Path, unit: int) -> Path:
    """Return the folder of a unit in OUT.partial."""
    return folder / "units" / f"{unit:06d}"


class _StoredRun(BaseModel):
    columns: int
    documents: list[int]


class _StoredUnit(BaseModel):
    documents: int
    bytes: int
    part_documents: list[int]
    part_bytes: list[int]
    left_out: dict[str, int]
    runs: list[_StoredRun]
    full: bool
    starts: list[int]


def read_unit(folder: Path, unit: int) -> dict[str, Any] | None:
    """Return the content of unit.json; None while the unit is not done."""
    stored = read_json(unit_folder(folder, unit) / "unit.json", _StoredUnit, begin_again(folder))
    return None if stored is None else stored.model_dump()


def keep_if_any(path: Path) -> None:
    """Put a file on disk, or remove it if it is empty."""
    if path.stat().st_size:
        sync(path)
    else:
        path.unlink()


def _where(file: SourceFile) -> bytes:
    version = (file.version or "").encode("utf-8", "surrogateescape")
    url = file.url.encode("utf-8", "surrogateescape")
    return LISTED.pack(-1 if file.size is None else file.size, len(version)) + version + url


def _run_name(number: int) -> str:
    return f"run-{number:04d}"


class SpooledDocument(NamedTuple):
    """Document of a shard before it is packed."""

    document: Document
    """The document."""
    source: int
    """Number of its source."""
    size: int | None
    """Raw bytes; None if only reading it shows them."""
    digest: bytes | None
    """Digest of its content, if copies are removed."""
    follows_equal_hash: bool
    """Whether the previous document has the same hash."""


class RunFile:
    """Columns of a run, mapped into memory: a binary search reads a few pages of a long one.

    Args:
        folder: folder of the unit.
        number: number of the run.
        documents: number of records.
        columns: offset of the columns.
    """

    def __init__(self, folder: Path, number: int, documents: int, columns: int) -> None:
        self.descriptor = os.open(folder / _run_name(number), os.O_RDONLY)
        mapped = mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)
        values = np.frombuffer(mapped, np.uint64, offset=columns)
        self.offsets = values[: documents + 1]
        """Offset of each record, and the end of the last."""
        self.hashes, self.ordinals, self.ends = values[documents + 1 :].reshape(3, documents)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


class Spool:
    """Records of one shard, copied from all runs into one file and then read in the order of their hashes.

    Memory: 40 bytes a record, and a piece of COPY_BYTES.

    Args:
        path: path of the file, which is deleted at once and ends with the process.
        folder: OUT.partial
        options: options of the preparation.
    """

    def __init__(self, path: Path, folder: Path, options: PrepareOptions) -> None:
        self._file = path.open("w+b", buffering=0)
        path.unlink()
        self._folder, self._options = folder, options
        self._hashes, self._offsets = list[NDArray[np.uint64]](), list[NDArray[np.uint64]]()
        self._lengths = list[NDArray[np.uint32]]()
        self._end = 0

    def add_run(self, run: np.void, part: int, first: int, last: int) -> None:
        """Copy the records of a run that belong to a part and have a hash from `first` to `last`.

        Args:
            run: a row of RUN.
            part: number of the part.
            first: smallest hash.
            last: greatest hash.
        """
        folder = unit_folder(self._folder, int(run["unit"]))
        counts = run["documents"]
        with RunFile(folder, int(run["number"]), int(counts.sum()), int(run["columns"])) as file:
            before, until = int(counts[:part].sum()), int(counts[: part + 1].sum())
            own = file.hashes[before:until]
            begin = before + int(np.searchsorted(own, np.uint64(first), "left"))
            end = before + int(np.searchsorted(own, np.uint64(last), "right"))
            if begin == end:
                return
            bounds = np.append(file.offsets[begin:end], file.offsets[end])
            taken = (file.ordinals[begin:end] <= run["max_ordinal"]) & (file.ends[begin:end] <= run["max_end"])
            self._hashes.append(file.hashes[begin:end][taken])
            self._offsets.append((bounds[:-1] - bounds[0] + np.uint64(self._end))[taken])
            self._lengths.append(np.diff(bounds).astype(np.uint32)[taken])
            self._copy(file.descriptor, int(bounds[0]), int(bounds[-1]))

    def _copy(self, descriptor: int, begin: int, end: int) -> None:
        for offset in range(begin, end, COPY_BYTES):
            self._end += self._file.write(os.pread(descriptor, min(COPY_BYTES, end - offset), offset))

    def records(self) -> Iterator[SpooledDocument]:
        """Yield every record, in order of hash; records of equal hash in the order of the sources."""
        if not self._hashes:
            return
        hashes = np.concatenate(self._hashes)
        self._hashes.clear()
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        repeats = np.append(False, hashes[1:] == hashes[:-1])
        del hashes
        offsets, lengths = np.concatenate(self._offsets)[order], np.concatenate(self._lengths)[order]
        self._offsets.clear()
        self._lengths.clear()
        del order
        for start in range(0, len(offsets), 4096):
            chosen = slice(start, start + 4096)
            rows = zip(offsets[chosen].tolist(), lengths[chosen].tolist(), repeats[chosen].tolist(), strict=True)
            for offset, length, repeated in rows:
                yield self._record(os.pread(self._file.fileno(), length, offset), repeated)

    def _record(self, record: bytes, repeated: bool) -> SpooledDocument:
        kind, modality, source, key_bytes, size = HEADER.unpack_from(record)
        end = HEADER.size + key_bytes
        key = record[HEADER.size : end].decode("utf-8", "surrogateescape")
        digest = None
        if self._options.deduplicate:
            digest = record[end : end + DIGEST_BYTES]
            end += DIGEST_BYTES
        media = None
        if kind & MEDIA:
            begin = end + CARD_BYTES.size
            end = begin + CARD_BYTES.unpack_from(record, end)[0]
            media = MediaCard.from_json(json.loads(record[begin:end]))
            kind &= ~MEDIA
        if kind == IN_FILE:
            listed, version_bytes = LISTED.unpack_from(record, end)
            begin = end + LISTED.size
            version = record[begin : begin + version_bytes].decode("utf-8", "surrogateescape")
            url = record[begin + version_bytes :].decode("utf-8", "surrogateescape")
            file = SourceFile(source, url, key, None if listed < 0 else listed, version or None)
            reading = self._options.reading
            document = document_of(file, reading)
            if self._options.reads_first:
                document.read = partial(_as_seen, document.read, file, size, digest)
            return SpooledDocument(document, source, size_of(file, reading), digest, repeated)
        if kind == IN_LARGE:
            unit, offset = SPAN.unpack_from(record, end)
            path = unit_folder(self._folder, unit) / "large"
            document = Document(key, MODALITIES[modality], lambda: _span(path, offset, size), media)
        else:
            content = record[end:]
            document = Document(key, MODALITIES[modality], lambda: iter((content,)), media)
        return SpooledDocument(document, source, size, digest, repeated)

    def close(self) -> None:
        """Close the file, which deletes it."""
        self._file.close()


def _as_seen(
    pieces: Callable[[], Iterator[bytes]], file: SourceFile, size: int, digest: bytes | None
) -> Iterator[bytes]:
    """Read a file that is a document, and check that it is what it was when it was scattered.

    Args:
        pieces: function that yields the document in pieces.
        file: the file that it is.
        size: raw bytes of the document at the scattering.
        digest: digest of the document at the scattering, if copies are removed.
    """
    read, sha = 0, None if digest is None else sha256()
    for piece in pieces():
        read += len(piece)
        if sha is not None:
            sha.update(piece)
        yield piece
    if read != size or (sha is not None and sha.digest() != digest):
        raise LeftOutError("changed", f"{file.url} changed while it was prepared: it was read twice, and differed")


def _span(path: Path, offset: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while size:
            piece = file.read(min(READ_BYTES, size))
            size -= len(piece)
            yield piece
