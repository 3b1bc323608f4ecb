"""Entropies beside a corpus: for each byte, the entropy of the prediction of it by a small model of bytes.

    corpus/entropies/3f2a…c1/            one folder for a model, and for a rule of its context
        entropies.json                   the model, the corpus, the size and digest of each file; it is written last
        shard-000000.f16                 entropies of the shard's contents, block after block, then a seal a block

    Block ─▶ a model of bytes ─▶ write_entropies ─▶ StoredEntropies.read(block) ─▶ verified entropies

An entropy is a little-endian fp16 number of nats. Each byte of a block's content has one. The byte 0 after a document
has that of the prediction of a separator. A seal is a digest of a block's entropies, keyed with the digest of its
content. Entropies of another content are therefore found to be damaged.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import numpy as np
from numpy.typing import NDArray

from byteloom.core.storage.files import move_into_place, partial_path, replace_file
from data_pipeline.corpus.blocks import Block
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.storage.folder import only_writer
from data_pipeline.errors import CorpusError, CorruptBlockError, DamagedCorpusError, MissingFileError

FOLDER = "entropies"
CARD = "entropies.json"
ENTROPIES_FORMAT = "byteloom-entropies/1"
ENTROPY = np.dtype("<f2")
SEAL_BYTES = 32
AHEAD_BYTES = 2 << 20
"""Size limit of one request for the entropies of adjacent blocks at a URL, unless one block has more. It is small:
the bytes of a request stay in memory, for each lane."""
REMEDY = "write them with `byteloom entropies CORPUS --model EXPORT`, which keeps what is intact"

Entropies = NDArray[np.float16]
OfBlock = Callable[[Block], Entropies]
"""Function that returns the entropies of the content of the next block of a shard."""


class EntropiesKey(NamedTuple):
    """Identity of entropies besides the corpus: the model of bytes and the rule of its contexts."""

    model: str
    """Digest of the export of the model of bytes."""
    reset_at_newlines: bool
    """True: contexts are lines. False: they are documents."""

    @property
    def folder(self) -> str:
        """Folder in that of the corpus."""
        return f"{FOLDER}/{self.model[:16]}{'-lines' if self.reset_at_newlines else ''}"


class StoredEntropies:
    """Reader of the entropies beside a corpus. It verifies those of a block when it reads them.

    Many threads may read at once.
    """

    def __init__(self, corpus: Corpus, key: EntropiesKey) -> None:
        """Read the card of the entropies of a model.

        Raises:
            CorpusError: there are none, they are damaged, or they are of another corpus.
        """
        self._corpus, self._key = corpus, key
        try:
            self._card = _checked_card(corpus, key, corpus.storage.read_small(f"{key.folder}/{CARD}"))
        except MissingFileError as error:
            of_lines, option = (", reset at newlines,", " --reset-at-newlines") if key.reset_at_newlines else (",", "")
            raise MissingFileError(
                f"{corpus.location} has no entropies of the model {key.model[:16]}…{of_lines} and the recipe has "
                f"model.patcher.entropies: corpus; write them with `byteloom entropies {corpus.location} --model "
                f"EXPORT{option}`, or set it to inline"
            ) from error
        for entry in self._card["shards"]:
            try:
                corpus.storage.check_size(f"{key.folder}/{entry['name']}", entry["bytes"])
            except CorpusError as error:
                raise DamagedCorpusError(f"{error}; {REMEDY}") from error
        self._starts = np.concatenate([[0], np.cumsum(_sizes(corpus, range(len(corpus))))])
        self._seals: dict[int, bytes] = {}

    def read(self, block: int, through: int | None = None) -> Entropies:
        """Return the entropies of the content of a block, one a byte.

        Args:
            block: number of the block.
            through: last block that is needed soon. Remote storage fetches those up to it in the same request.

        Raises:
            CorpusError: they are damaged, or cannot be read.
        """
        corpus, shard = self._corpus, int(self._corpus.index[block]["shard"])
        blocks = corpus.blocks_of(shard)
        begin, end = self._span(blocks, block)
        name = f"{self._key.folder}/{self._card['shards'][shard]['name']}"
        seal = _seals_at(self._seals_of(shard, name), block - blocks[0])
        last = max(block, min(block if through is None else through, blocks[-1]))
        while self._span(blocks, last)[1] - begin > AHEAD_BYTES and last > block:
            last = (block + last) // 2
        ahead = self._span(blocks, last)[1]
        for attempt in range(corpus.storage.rereads):
            content = self._stored(name, begin, end, ahead, fresh=attempt > 0)
            if _seal(corpus, block, content) == seal:
                return np.frombuffer(content, ENTROPY)
        raise _damage(corpus, name, f"those of {corpus.name_of(block)} are not as they were written")

    def _span(self, blocks: range, block: int) -> tuple[int, int]:
        """Return the begin and end of a block's entropies in the file of its shard."""
        start = self._starts[blocks.start]
        return int(self._starts[block] - start), int(self._starts[block + 1] - start)

    @property
    def size(self) -> int:
        """Bytes of the files with a number for each byte."""
        return sum(entry["bytes"] for entry in self._card["shards"])

    def faults_of(self, shard: int, progress: Callable[[int], None]) -> list[str]:
        """Read the entropies of a shard, and return a message if they are damaged.

        Args:
            shard: position of the shard in the manifest.
            progress: called with the bytes read since the last call; with all of them once there is a fault.
        """
        left = int(self._card["shards"][shard]["bytes"])
        try:
            for block in self._corpus.blocks_of(shard):
                size = self.read(block).nbytes
                progress(size)
                left -= size
        except CorpusError as error:
            return [str(error)]
        finally:
            progress(left)
        return []

    def _stored(self, name: str, begin: int, end: int, span_end: int, *, fresh: bool) -> bytes:
        """Return a range of a file. Its damage is not that of the corpus, which a run may read around."""
        try:
            return self._corpus.storage.read_ahead(name, begin, end, span_end, fresh)
        except CorruptBlockError as error:
            raise DamagedCorpusError(f"{error}; {REMEDY}") from error

    def _seals_of(self, shard: int, name: str) -> bytes:
        """Return the seals of the blocks of a shard, which its file ends with."""
        if shard not in self._seals:
            entry, storage = self._card["shards"][shard], self._corpus.storage
            begin = entry["bytes"] - SEAL_BYTES * len(self._corpus.blocks_of(shard))
            for attempt in range(storage.rereads):
                found = self._stored(name, begin, entry["bytes"], entry["bytes"], fresh=attempt > 0)
                if blake3.blake3(found).hexdigest() == entry["blake3"]:
                    self._seals[shard] = found
                    break
            else:
                raise _damage(self._corpus, name, "its seals are not as they were written")
        return self._seals[shard]


def open_entropies(corpus: Corpus) -> tuple[list[StoredEntropies], list[str]]:
    """Return the entropies beside a corpus in a folder, and a message for each that cannot be opened.

    There are none beside a corpus at a URL, which lists no files.
    """
    folder, opened, faults = corpus.storage.local_folder, list[StoredEntropies](), list[str]()
    for path in sorted((folder / FOLDER).glob(f"*/{CARD}")) if folder is not None else []:
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            opened.append(StoredEntropies(corpus, EntropiesKey(card["model"], card["reset_at_newlines"])))
        except CorpusError as error:
            faults.append(str(error))
        except (OSError, ValueError, KeyError, TypeError) as error:
            faults.append(f"{path} is damaged: {error}; {REMEDY}")
    return opened, faults


def write_entropies(
    corpus: Corpus, key: EntropiesKey, of_shard: Callable[[], OfBlock], progress: Callable[[int], None]
) -> int:
    """Write the entropies of a corpus, and return the number of shards that were not there.

    Intact shards of this content are kept, and so are the first blocks of a shard that a killed process left.

    Args:
        corpus: a corpus in a folder.
        key: the model and the rule of its context.
        of_shard: returns a function that takes the blocks of a shard in order, from one that begins with a document.
        progress: called with the raw bytes done since the last call.

    Raises:
        CorpusError: the corpus is at a URL or damaged, or another process writes its entropies.
        OSError: they cannot be written.
    """
    if corpus.storage.local_folder is None:
        raise CorpusError(f"{corpus.location} is a URL; write entropies in its folder, and copy them")
    folder = corpus.storage.local_folder / key.folder
    folder.mkdir(parents=True, exist_ok=True)
    entries, new = [], 0
    with only_writer(folder, wait=False):
        _refuse_others(corpus, key, folder / CARD)
        for shard, listed in enumerate(corpus.manifest["shards"]):
            path = folder / f"{Path(listed['name']).stem}.f16"
            seals = _intact_seals(corpus, shard, path)
            if seals is None:
                new += 1
                (folder / CARD).unlink(missing_ok=True)
                seals = _write_shard(corpus, shard, path, of_shard(), progress)
            else:
                progress(int(listed["raw_bytes"]))
            entries.append(
                {"name": path.name, "bytes": path.stat().st_size, "blake3": blake3.blake3(seals).hexdigest()}
            )
        card = {
            "format": ENTROPIES_FORMAT,
            **key._asdict(),
            "content_sha256": corpus.content_sha256,
            "shards": entries,
        }
        replace_file(folder / CARD, json.dumps({**card, "blake3": _digest(card)}, indent=1) + "\n")
    return new


def _refuse_others(corpus: Corpus, key: EntropiesKey, path: Path) -> None:
    """Check that a card, if there is one, is of this model. One that is damaged is written again.

    Raises:
        CorpusError: it is of another model, or of another version.
    """
    if path.exists():
        with suppress(DamagedCorpusError):
            _checked_card(corpus, key, path.read_bytes())


def _write_shard(corpus: Corpus, shard: int, path: Path, of_block: OfBlock, progress: Callable[[int], None]) -> bytes:
    """Write the entropies of a shard, and return the seals of its blocks."""
    blocks = corpus.blocks_of(shard)
    sizes = _sizes(corpus, blocks)
    partial, marks = partial_path(path), partial_path(path.with_suffix(".seals"))
    kept = _kept(corpus, blocks, partial, marks)
    while 0 < len(kept) < len(blocks) and corpus.read(blocks[len(kept)]).slices[0].document_offset:
        kept.pop()  # the context of a document that continues is not known here
    with partial.open("ab") as file, marks.open("ab") as seals:
        file.truncate(int(sizes[: len(kept)].sum()))
        seals.truncate(SEAL_BYTES * len(kept))
        for block in blocks[: len(kept)]:
            progress(int(corpus.lengths[block]["raw_bytes"]))
        for block in blocks[len(kept) :]:
            found = of_block(corpus.read(block)).astype(ENTROPY).tobytes()
            kept.append(_seal(corpus, block, found))
            for target, content in ((file, found), (seals, kept[-1])):
                target.write(content)
                target.flush()
            progress(int(corpus.lengths[block]["raw_bytes"]))
        file.write(b"".join(kept))
    move_into_place(partial, path)
    marks.unlink()
    return b"".join(kept)


def _kept(corpus: Corpus, blocks: range, partial: Path, marks: Path) -> list[bytes]:
    """Return the seals of the first blocks of an unfinished file that are intact."""
    if not partial.exists() or not marks.exists():
        return []
    known, kept = marks.read_bytes(), list[bytes]()
    with partial.open("rb") as file:
        for number, (block, size) in enumerate(zip(blocks, _sizes(corpus, blocks).tolist(), strict=True)):
            seal = _seal(corpus, block, file.read(size))
            if _seals_at(known, number) != seal:
                break
            kept.append(seal)
    return kept


def _intact_seals(corpus: Corpus, shard: int, path: Path) -> bytes | None:
    """Return the seals of the blocks of a finished file; None if it is missing, damaged or of another content."""
    if not path.exists():
        return None
    blocks = corpus.blocks_of(shard)
    sizes = _sizes(corpus, blocks)
    if path.stat().st_size != _file_bytes(sizes):
        return None
    with path.open("rb") as file:
        pairs = zip(blocks, sizes.tolist(), strict=True)
        found = b"".join(_seal(corpus, block, file.read(size)) for block, size in pairs)
        return found if file.read() == found else None


def _seal(corpus: Corpus, block: int, entropies: bytes) -> bytes:
    """Return the digest of a block's entropies whose key is the digest of its content."""
    return blake3.blake3(entropies, key=corpus.index[block]["content_sha256"].tobytes()).digest()


def _seals_at(seals: bytes, number: int) -> bytes:
    return seals[SEAL_BYTES * number : SEAL_BYTES * (number + 1)]


def _sizes(corpus: Corpus, blocks: range) -> NDArray[np.int64]:
    """Return the bytes that the entropies of each of some blocks take up: (blocks,)."""
    lengths = corpus.lengths[blocks.start : blocks.stop]
    units: NDArray[np.int64] = lengths["raw_bytes"].astype(np.int64) + lengths["document_ends"]
    return ENTROPY.itemsize * units


def _file_bytes(sizes: NDArray[np.int64]) -> int:
    """Return the size of the file of a shard, given those of its blocks' entropies."""
    return int(sizes.sum()) + SEAL_BYTES * len(sizes)


def _checked_card(corpus: Corpus, key: EntropiesKey, content: bytes) -> dict[str, Any]:
    """Return the card of entropies.

    Raises:
        CorpusError: it is damaged, or that of other entropies.
    """
    name = f"{key.folder}/{CARD}"
    try:
        card = json.loads(content)
        digest = card.pop("blake3")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise _damage(corpus, name, f"it cannot be read: {error}") from error
    if digest != _digest(card):
        raise _damage(corpus, name, "its digest is not that of its fields")
    if card["format"] != ENTROPIES_FORMAT:
        raise CorpusError(
            f"{corpus.location}/{name} has format {card['format']!r}; this version reads {ENTROPIES_FORMAT!r}"
        )
    if (card["model"], card["reset_at_newlines"]) != tuple(key):
        raise CorpusError(f"{corpus.location}/{name} is of the model {card['model']}, not of {key.model}; {REMEDY}")
    shards = range(len(corpus.manifest["shards"]))
    sizes = [_file_bytes(_sizes(corpus, corpus.blocks_of(shard))) for shard in shards]
    # A corpus of the same content may have other shards.
    if card["content_sha256"] != corpus.content_sha256 or [each["bytes"] for each in card["shards"]] != sizes:
        raise DamagedCorpusError(
            f"{corpus.location}/{name} is of another corpus, of the content {card['content_sha256']}; {REMEDY}"
        )
    checked: dict[str, Any] = card
    return checked


def _digest(card: dict[str, Any]) -> str:
    return blake3.blake3(json.dumps(card, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _damage(corpus: Corpus, name: str, text: str) -> DamagedCorpusError:
    return DamagedCorpusError(f"{corpus.location}/{name} is damaged: {text}; {REMEDY}")
