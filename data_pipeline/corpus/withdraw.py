"""Withdraw documents from a corpus: add them to its list (withdrawn.py). The shards do not change."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from byteloom.core.progress import Progress, Tally
from data_pipeline.corpus.blocks import DocumentSlice
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.storage.folder import only_writer
from data_pipeline.corpus.withdrawn import Withdrawal, read_withdrawn, write_withdrawn
from data_pipeline.errors import CorpusError


def withdraw(corpus: Corpus, keys: Iterable[str], threads: int, progress: Progress) -> list[Withdrawal]:
    """Add documents to the list of withdrawn documents of a corpus on this machine.

    Args:
        corpus: the corpus.
        keys: keys of documents. All documents of a key are withdrawn. Those that are on the list already are skipped.
        threads: number of blocks that are read at once.
        progress: called with raw bytes done and in all.

    Returns:
        The new entries.

    Raises:
        CorpusError: no document has this key, or a part of the document cannot be found. Nothing is withdrawn then.
    """
    folder = corpus.storage.local_folder
    if folder is None:
        raise CorpusError(
            f"{corpus.location} is a URL; withdraw documents in the folder it was copied from, and copy the list"
        )
    found = _found(corpus, set(keys), threads, progress)
    with only_writer(folder, wait=True):
        listed = read_withdrawn(corpus.storage, corpus.content_sha256, corpus.lengths)
        known = set(listed)
        new = [entry for entry in found if entry not in known]
        write_withdrawn(folder, corpus.content_sha256, [*listed, *new])
    return new


def _found(corpus: Corpus, keys: set[str], threads: int, progress: Progress) -> list[Withdrawal]:
    """Return the places of all documents of these keys, in the order of the corpus.

    A damaged block is skipped if every document is complete without it, and if no key has several documents: corpora
    of earlier versions may repeat a key, and a block that cannot be read may have another document of it.
    """
    if not keys:
        return []
    done = Tally(corpus.raw_bytes, progress)

    def parts_of(number: int) -> list[DocumentSlice] | CorpusError:
        try:
            parts = corpus.read(number).slices
        except CorpusError as error:
            return error
        finally:
            done.add(int(corpus.lengths[number]["raw_bytes"]))
        return [part for part in parts if part.key in keys]

    found, parts_by_key, faults = list[Withdrawal](), defaultdict[str, list[DocumentSlice]](list), list[CorpusError]()
    with ThreadPoolExecutor(threads) as pool:
        for number, parts in enumerate(pool.map(parts_of, range(len(corpus)))):
            if isinstance(parts, CorpusError):
                faults.append(parts)
                continue
            for part in parts:
                parts_by_key[part.key].append(part)
                found.append(Withdrawal(part.key, number, part.start, part.start + part.length + part.ends))
    repeated = sorted(key for key in keys if sum(part.ends for part in parts_by_key[key]) > 1)
    if faults and repeated:
        text = (
            f"{corpus.location} has several documents {repeated[0]!r}, and more may be in a part that cannot be read:"
        )
        raise CorpusError("\n".join([text, *dict.fromkeys(map(str, faults))]))
    if missing := sorted(key for key in keys if not _are_whole(parts_by_key[key])):
        text = f"{corpus.location} has no document {missing[0]!r}"
        if faults:
            text += ", unless it is in a part that cannot be read:"
        raise CorpusError("\n".join([text, *dict.fromkeys(map(str, faults))]))
    return found


def _are_whole(parts: Sequence[DocumentSlice]) -> bool:
    """Return whether parts, in the order of the corpus, are one or more whole documents."""
    size = 0
    for part in parts:
        if part.document_offset != size:
            return False
        size = 0 if part.ends else size + part.length
    return bool(parts) and parts[-1].ends
