"""Taking documents out of a corpus without writing its shards anew: they go on its list (withdrawn.py)."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from byteloom.core.progress import Progress, Tally
from data_pipeline.corpus.blocks import DocumentSlice
from data_pipeline.corpus.shards import Corpus
from data_pipeline.corpus.storage import Folder, only_writer
from data_pipeline.corpus.withdrawn import Withdrawal, read_withdrawn, write_withdrawn
from data_pipeline.errors import CorpusError


def withdraw(corpus: Corpus, keys: Iterable[str], threads: int, progress: Progress) -> list[Withdrawal]:
    """Puts documents of a corpus on this machine on its list; those that are on it already stay as they are.

    Args:
        threads: blocks read at once.

    Returns:
        The new entries.

    Raises:
        CorpusError: a key is no document's, or not all of the document can be found; nothing is withdrawn then.
    """
    if not isinstance(corpus.storage, Folder):
        raise CorpusError(
            f"{corpus.location} is a URL; withdraw documents in the folder it was copied from, and copy the list"
        )
    found = _found(corpus, set(keys), threads, progress)
    with only_writer(corpus.storage.path, wait=True):
        listed = read_withdrawn(corpus.storage, corpus.content_sha256, corpus.lengths)
        known = set(listed)
        new = [entry for entry in found if entry not in known]
        write_withdrawn(corpus.storage.path, corpus.content_sha256, [*listed, *new])
    return new


def _found(corpus: Corpus, keys: set[str], threads: int, progress: Progress) -> list[Withdrawal]:
    """Where documents lie, in the order of the corpus.

    A damaged block is passed over, if every document is found to its end without it.
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
    if missing := sorted(key for key in keys if not _are_whole(parts_by_key[key])):
        said = f"{corpus.location} has no document {missing[0]!r}"
        if faults:
            said += ", unless it is in a part that cannot be read:"
        raise CorpusError("\n".join([said, *dict.fromkeys(map(str, faults))]))
    return found


def _are_whole(parts: Sequence[DocumentSlice]) -> bool:
    """Whether parts, in the order of the corpus, are a document from its beginning to its end."""
    size = 0
    for part in parts:
        if part.document_offset != size:
            return False
        size += part.length
    return bool(parts) and parts[-1].ends
