"""Entropies beside a corpus: for each byte, how uncertain a small model of bytes was of it before it read it.

    corpus/entropies/3f2a…c1/            one folder for a model, and for a rule of its context
        entropies.json                   the model, the corpus, the size and digest of each file; it is written last
        shard-000000.f16                 entropies of the shard's contents, block after block, then a digest a block

    Block ─▶ a model of bytes ─▶ write_entropies ─▶ StoredEntropies.read(block) ─▶ verified entropies

An entropy is a little-endian fp16 number of nats. There is one for each byte of a block's content, also for the byte 0
after a document: it is that of the prediction that the document ends.
"""

import json
from collections.abc import Callable, Sequence
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
DIGEST_BYTES = 32
REMEDY = "write them with `byteloom entropies CORPUS --model EXPORT`, which keeps what is intact"

Entropies = NDArray[np.float16]
OfBlock = Callable[[Block], Entropies]
"""Function that returns the entropies of the content of the next block of a shard."""


class EntropiesKey(NamedTuple):
    """What entropies depend on besides the corpus."""

    model: str
    """Digest of the export of the model of bytes."""
    reset_at_newlines: bool
    """Whether a context is a line, and not a document."""

    @property
    def folder(self) -> str:
        """Folder in that of the corpus."""
        return f"{FOLDER}/{self.model[:16]}{'-lines' if self.reset_at_newlines else ''}"


class StoredEntropies:
    """Entropies of a corpus that are open for reading. Those of a block are verified when they are read.

    Many threads may read at once.
    """

    def __init__(self, corpus: Corpus, key: EntropiesKey) -> None:
        """Read the card of the entropies of a model.

        Raises:
            CorpusError: the corpus has none, or they are damaged or those of another corpus.
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
        self._starts = _starts(corpus)
        self._digests: dict[int, bytes] = {}

    def read(self, block: int) -> Entropies:
        """Return the entropies of the content of a block, one a byte.

        Raises:
            CorpusError: they are damaged, or cannot be read.
        """
        corpus, shard = self._corpus, int(self._corpus.index[block]["shard"])
        first = int(corpus.first_blocks[shard])
        begin, end = (ENTROPY.itemsize * int(self._starts[each] - self._starts[first]) for each in (block, block + 1))
        name = f"{self._key.folder}/{self._card['shards'][shard]['name']}"
        digests = self._digests_of(shard, name)
        place = DIGEST_BYTES * (block - first)
        for _ in range(corpus.storage.rereads):
            content = self._stored(name, begin, end)
            if blake3.blake3(content).digest() == digests[place : place + DIGEST_BYTES]:
                return np.frombuffer(content, ENTROPY)
        raise _damage(corpus, name, f"those of {corpus.name_of(block)} are not as they were written")

    def verify(self, shard: int) -> None:
        """Read all entropies of a shard.

        Raises:
            CorpusError: they are damaged, or cannot be read.
        """
        for block in self._corpus.blocks_of(shard):
            self.read(block)

    def _stored(self, name: str, begin: int, end: int) -> bytes:
        """Return a range of a file. Its damage is not that of the corpus, which a run may read around."""
        try:
            return self._corpus.storage.read(name, begin, end)
        except CorruptBlockError as error:
            raise DamagedCorpusError(f"{error}; {REMEDY}") from error

    def _digests_of(self, shard: int, name: str) -> bytes:
        """Return the digests of the blocks of a shard, which its file ends with."""
        if shard not in self._digests:
            entry, storage = self._card["shards"][shard], self._corpus.storage
            size = DIGEST_BYTES * len(self._corpus.blocks_of(shard))
            for _ in range(storage.rereads):
                found = self._stored(name, entry["bytes"] - size, entry["bytes"])
                if blake3.blake3(found).hexdigest() == entry["blake3"]:
                    self._digests[shard] = found
                    break
            else:
                raise _damage(self._corpus, name, "its digests are not as they were written")
        return self._digests[shard]


def keys_of(corpus: Corpus) -> list[EntropiesKey]:
    """Return the models whose entropies are beside a corpus in a folder; none for a URL, which lists no files.

    Raises:
        CorpusError: a card is damaged.
    """
    folder = corpus.storage.local_folder
    found = []
    for path in sorted((folder / FOLDER).glob(f"*/{CARD}")) if folder is not None else []:
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            key = EntropiesKey(card["model"], card["reset_at_newlines"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCorpusError(f"{path} is damaged: {error}; {REMEDY}") from error
        found.append(key)
    return found


def verify_entropies(corpus: Corpus) -> list[str]:
    """Return a message for each fault of the entropies beside a corpus."""
    faults = []
    try:
        for key in keys_of(corpus):
            stored = StoredEntropies(corpus, key)
            for shard in range(len(corpus.manifest["shards"])):
                try:
                    stored.verify(shard)
                except CorpusError as error:
                    faults.append(str(error))
    except CorpusError as error:
        faults.append(str(error))
    return faults


def write_entropies(
    corpus: Corpus, key: EntropiesKey, of_shard: Callable[[], OfBlock], progress: Callable[[int], None]
) -> int:
    """Write the entropies of a corpus, and return the number of shards that were not there.

    Intact shards are kept, and so are the first blocks of a shard that a killed process left.

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
            digests = _intact_digests(corpus, shard, path)
            if digests is None:
                new += 1
                (folder / CARD).unlink(missing_ok=True)
                digests = _write_shard(corpus, shard, path, of_shard(), progress)
            else:
                progress(int(listed["raw_bytes"]))
            entries.append(
                {"name": path.name, "bytes": path.stat().st_size, "blake3": blake3.blake3(digests).hexdigest()}
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
    """Check that a card, if there is one, is of this corpus and this model. One that is damaged is written again.

    Raises:
        CorpusError: it is of others.
    """
    if path.exists():
        with suppress(DamagedCorpusError):
            _checked_card(corpus, key, path.read_bytes())


def _write_shard(corpus: Corpus, shard: int, path: Path, of_block: OfBlock, progress: Callable[[int], None]) -> bytes:
    """Write the entropies of a shard, and return the digests of its blocks."""
    blocks, sizes = corpus.blocks_of(shard), _sizes(corpus, shard)
    partial, marks = partial_path(path), partial_path(path.with_suffix(".digests"))
    kept = _kept(partial, marks, sizes)
    while 0 < len(kept) < len(blocks) and corpus.read(blocks[len(kept)]).slices[0].document_offset:
        kept.pop()  # the context of a document that goes on is not known here
    with partial.open("ab") as file, marks.open("ab") as digests:
        file.truncate(sum(sizes[: len(kept)]))
        digests.truncate(DIGEST_BYTES * len(kept))
        for block in blocks[: len(kept)]:
            progress(int(corpus.lengths[block]["raw_bytes"]))
        for block in blocks[len(kept) :]:
            found = of_block(corpus.read(block)).astype(ENTROPY).tobytes()
            kept.append(blake3.blake3(found).digest())
            for target, content in ((file, found), (digests, kept[-1])):
                target.write(content)
                target.flush()
            progress(int(corpus.lengths[block]["raw_bytes"]))
        file.write(b"".join(kept))
    move_into_place(partial, path)
    marks.unlink()
    return b"".join(kept)


def _kept(partial: Path, marks: Path, sizes: Sequence[int]) -> list[bytes]:
    """Return the digests of the first blocks of an unfinished file that are intact."""
    if not partial.exists() or not marks.exists():
        return []
    known, kept = marks.read_bytes(), list[bytes]()
    with partial.open("rb") as file:
        for number, size in enumerate(sizes):
            digest = blake3.blake3(file.read(size)).digest()
            if known[DIGEST_BYTES * number : DIGEST_BYTES * (number + 1)] != digest:
                break
            kept.append(digest)
    return kept


def _intact_digests(corpus: Corpus, shard: int, path: Path) -> bytes | None:
    """Return the digests of the blocks of a finished file; None if it is missing or damaged."""
    if not path.exists():
        return None
    sizes = _sizes(corpus, shard)
    with path.open("rb") as file:
        found = b"".join(blake3.blake3(file.read(size)).digest() for size in sizes)
        return found if file.read() == found else None


def _sizes(corpus: Corpus, shard: int) -> list[int]:
    """Return the bytes that the entropies of each block of a shard take up."""
    blocks = corpus.blocks_of(shard)
    units: NDArray[np.int64] = ENTROPY.itemsize * np.diff(_starts(corpus)[blocks.start : blocks.stop + 1])
    return [int(size) for size in units]


def _starts(corpus: Corpus) -> NDArray[np.int64]:
    """Return where each block's content begins among all contents, and the end of the last: (blocks + 1,)."""
    units = corpus.lengths["raw_bytes"].astype(np.int64) + corpus.lengths["document_ends"]
    return np.concatenate([[0], np.cumsum(units)])


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
    if card["content_sha256"] != corpus.content_sha256:
        raise CorpusError(
            f"{corpus.location}/{name} is of another corpus, of the content {card['content_sha256']}; remove the "
            f"folder, and {REMEDY}"
        )
    checked: dict[str, Any] = card
    return checked


def _digest(card: dict[str, Any]) -> str:
    return blake3.blake3(json.dumps(card, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _damage(corpus: Corpus, name: str, text: str) -> DamagedCorpusError:
    return DamagedCorpusError(f"{corpus.location}/{name} is damaged: {text}; {REMEDY}")
