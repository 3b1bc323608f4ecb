"""A corpus of files becomes shards.

    sources ─▶ find_documents ─▶ shuffle by hash ─▶ pack_documents ─▶ CorpusWriter ─▶ OUT

Documents are put in the order of a hash of their key, so neighbours in a block are strangers and the order depends on
nothing but the keys and the seed. Memory: the list of documents and one block.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.atomic import atomic_folder
from data_pipeline.blocks import pack_documents
from data_pipeline.documents import Document, find_documents
from data_pipeline.errors import CorpusError
from data_pipeline.shards import CorpusWriter

MAX_BLOCK_BYTES = 1 << 30


@dataclass(frozen=True)
class PrepareOptions:
    include: Sequence[str] = ()
    """Glob patterns of the files to take; all when empty."""
    exclude: Sequence[str] = ()
    """Glob patterns of files and folders to leave out."""
    holdout: float = 0.0
    """Share of the documents, chosen by hash, that goes into OUT/validation; the rest goes into OUT/train.
    With 0 the whole corpus is written to OUT itself."""
    seed: int = 0
    """Changes the order of documents and the choice of the held-out ones."""
    block_bytes: int = 1 << 20
    """Raw bytes of a block, at most."""
    shard_bytes: int = 256 << 20
    """Bytes of a shard's tar, about."""
    level: int = 3
    """zstd compression level."""
    skip_unreadable: bool = False
    """Leave out files that cannot be read, and report them, instead of stopping."""


@dataclass
class PrepareReport:
    folders: list[Path] = field(default_factory=list)
    """The corpora written."""
    documents: int = 0
    empty: int = 0
    unreadable: list[tuple[Path, str]] = field(default_factory=list)


Progress = Callable[[int, int], None]
"""Called with (raw bytes done, raw bytes in all)."""


def prepare(sources: Sequence[Path], out: Path, options: PrepareOptions, progress: Progress) -> PrepareReport:
    """Writes the documents under `sources` as a corpus at `out`, which appears when it is complete.

    Raises:
        CorpusError: a source is missing or unreadable, there is no byte to write, or `out` exists.
    """
    _check(options)
    if out.exists():  # before a long listing
        raise CorpusError(f"{out} exists already; choose another --out, or remove it first")
    listing = find_documents(sources, options.include, options.exclude)
    if listing.unreadable and not options.skip_unreadable:
        path, reason = listing.unreadable[0]
        more = f" (and {len(listing.unreadable) - 1} more)" if len(listing.unreadable) > 1 else ""
        raise CorpusError(f"cannot read {path}: {reason}{more}; --skip-unreadable leaves such files out")
    if not listing.documents:
        searched = ", ".join(map(str, sources))
        raise CorpusError(f"the corpus is empty: no file with a byte in it under {searched}")

    documents = sorted(listing.documents, key=lambda document: _hash("order", options.seed, document.key))
    parts = _split(documents, options)
    total = sum(document.size for document in documents)
    done = 0
    try:
        with atomic_folder(out) as staging:
            for name, part in parts.items():
                writer = CorpusWriter(staging / name, options.shard_bytes, options.level)
                for block in pack_documents(part, options.block_bytes):
                    writer.add(block)
                    done += len(block.raw)
                    progress(done, total)
                writer.close()
    except FileExistsError as error:
        raise CorpusError(f"{error}; choose another --out, or remove it first") from error
    return PrepareReport([out / name for name in parts], len(documents), listing.empty, listing.unreadable)


def _check(options: PrepareOptions) -> None:
    if not 0 <= options.holdout < 1:
        raise CorpusError(f"--holdout is {options.holdout}; it is a share, at least 0 and less than 1")
    if not 1 <= options.block_bytes <= MAX_BLOCK_BYTES:
        raise CorpusError(f"--block-bytes is {options.block_bytes:,}; it lies between 1 and {MAX_BLOCK_BYTES:,}")
    if options.shard_bytes < 1:
        raise CorpusError(f"--shard-bytes is {options.shard_bytes:,}; it is at least 1")


def _split(documents: Sequence[Document], options: PrepareOptions) -> dict[str, list[Document]]:
    if not options.holdout:
        return {"": list(documents)}
    bound = int(options.holdout * 2**64)
    held_out = [_hash("split", options.seed, document.key) < bound for document in documents]
    parts = {
        "train": [d for d, held in zip(documents, held_out, strict=True) if not held],
        "validation": [d for d, held in zip(documents, held_out, strict=True) if held],
    }
    for name, part in parts.items():
        if not part:
            raise CorpusError(
                f"--holdout {options.holdout} leaves no document for {name}: there are {len(documents)} in all"
            )
    return parts


def _hash(purpose: str, seed: int, key: str) -> int:
    digest = hashlib.sha256(f"{purpose}\0{seed}\0{key}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")
