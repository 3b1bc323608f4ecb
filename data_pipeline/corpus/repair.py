"""Repair a damaged corpus from its intact parts and from a mirror.

    manifest or index damaged,    written again from the tars; copied from the mirror if a tar is damaged as well, or if
    or not those of the tars      the rest of the index lists other tars. The media card is found by its digest
    shard damaged or missing      written again from its intact blocks, and from the mirror's blocks
    withdrawn.json damaged        copied from the mirror

A file is replaced only after its replacement is on disk and has the right digest. A repair that is killed or fails does
not damage the corpus further.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byteloom.core.progress import Progress, Tally
from byteloom.core.storage.files import move_into_place, partial_path, sync
from byteloom.core.text import count
from data_pipeline.corpus.blocks import StoredBlock
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.index import BLOCK, INDEX_FILES, LENGTHS, ShardIndex, blake3_of, scan_shard
from data_pipeline.corpus.lost_card import find_card
from data_pipeline.corpus.manifest import card_of, index_header, read_manifest, write_index
from data_pipeline.corpus.storage.folder import Folder, only_writer
from data_pipeline.corpus.storage.remote import RemoteConfig
from data_pipeline.corpus.tar import ShardWriter, number_of_shard, shard_name
from data_pipeline.corpus.verify import IDENTITY, Comparison, faults_of_headers, faults_of_list, is_listed
from data_pipeline.corpus.withdrawn import WITHDRAWN_FILE, write_withdrawn
from data_pipeline.errors import CorpusError
from data_pipeline.media import MEDIA, MediaCard

Scans = dict[str, ShardIndex | CorpusError]
"""The index of each shard by name, or the reason why it cannot be made."""


def repair(
    folder: Path, mirror: str | None, threads: int, progress: Progress, remote: RemoteConfig | None = None
) -> list[str]:
    """Repair the corpus in a folder, and return a message for each repaired part.

    Args:
        folder: folder of the corpus.
        mirror: folder or URL of another copy of the corpus.
        threads: number of shards that are read at once.
        progress: called with bytes done and in all.
        remote: how a mirror at a URL is read.

    Raises:
        CorpusError: some parts cannot be repaired. The others are.
    """
    with ExitStack() as corpora:
        corpora.enter_context(only_writer(folder, wait=False))
        other = corpora.enter_context(Corpus(mirror, check_shards=False, remote=remote)) if mirror else None
        manifest = _readable_manifest(folder)
        scans = _scanned_all(folder, manifest, threads, progress)
        done = []
        if not _is_in_order(folder, manifest, scans) or _is_mirrored_better(manifest, other, scans):
            done.append(_repair_index(folder, manifest, other, scans))
        elif other is not None and manifest != other.manifest:
            raise CorpusError(f"{other.location} is not a mirror of {folder}: it has another manifest.json")
        corpus = corpora.enter_context(Corpus(folder, check_shards=False))
        results = [*_repair_shards(folder, corpus, other, scans, threads), _repair_withdrawn(corpus, other)]
        lost = [str(result) for result in results if isinstance(result, CorpusError)]
        if lost and other is None:
            lost.append("these can only be restored from a mirror: add --mirror URL_OR_FOLDER")
        if lost:
            raise CorpusError("\n".join(lost))
        return done + [result for result in results if isinstance(result, str)]


def _readable_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        with closing(Folder(folder)) as storage:
            return read_manifest(storage)
    except CorpusError:
        return None


def _scanned_all(folder: Path, manifest: dict[str, Any] | None, threads: int, progress: Progress) -> Scans:
    """Read every shard that is in the folder or in the manifest."""
    names = {path.name for path in folder.glob("shard-*.tar")} | {entry["name"] for entry in _listed(manifest)}
    paths = [folder / name for name in sorted(names)]
    done = Tally(sum(path.stat().st_size for path in paths if path.exists()), progress)
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip((path.name for path in paths), pool.map(lambda p: _scanned(p, done.add), paths), strict=True))


def _listed(manifest: dict[str, Any] | None) -> list[dict[str, Any]]:
    return manifest["shards"] if manifest is not None else []


def _is_in_order(folder: Path, manifest: dict[str, Any] | None, scans: Scans) -> bool:
    """Return whether manifest and index can be opened, and agree with the intact shards."""
    try:
        with Corpus(folder, check_shards=False) as corpus:
            comparison = Comparison(str(folder), corpus.manifest, {"lengths": corpus.lengths, "index": corpus.index})
            for entry in _listed(manifest):
                comparison.add(scans[entry["name"]])
            is_foreign = comparison.foreign(corpus.storage) is not None
            return not is_foreign and not comparison.finish() and not faults_of_headers(corpus)
    except CorpusError:
        return False


def _is_mirrored_better(manifest: dict[str, Any] | None, mirror: Corpus | None, scans: Scans) -> bool:
    """Return whether a mirror's manifest lists all shards that can be read, and this one does not."""
    found = _identities(shard.entry for shard in _whole(scans))
    is_mirror = mirror is not None and bool(found) and found <= _identities(_listed(mirror.manifest))
    return is_mirror and not found <= _identities(_listed(manifest))


def _whole(scans: Scans) -> list[ShardIndex]:
    return [shard for shard in scans.values() if isinstance(shard, ShardIndex)]


def _repair_index(folder: Path, manifest: dict[str, Any] | None, mirror: Corpus | None, scans: Scans) -> str:
    """Write manifest and index from the tars, or copy the mirror's if a tar is damaged as well."""
    if not scans:
        raise CorpusError(f"{folder} has no shards")
    whole = _whole(scans)
    found = _identities(shard.entry for shard in whole)
    if manifest is not None and whole and not found & _identities(_listed(manifest)):
        if mirror is None and not _is_index_of(folder, whole):
            raise CorpusError(
                f"{folder}/manifest.json lists none of the shards that are here; if it is of another corpus, move it "
                "away with index.npy and lengths.npy, and repair again; or add --mirror URL_OR_FOLDER"
            )
        manifest = None
    if manifest is not None and mirror is not None and manifest != mirror.manifest:
        if not found & _identities(_listed(mirror.manifest)):
            raise CorpusError(f"{mirror.location} is not a mirror of {folder}: it has another manifest.json")
        manifest = None
    listed = {entry["name"] for entry in _listed(manifest)} or {path.name for path in folder.glob("shard-*.tar")}
    shards = sorted((s for s in whole if s.entry["name"] in listed), key=lambda s: number_of_shard(s.entry["name"]))
    faults = [str(fault) for name, fault in scans.items() if name in listed and isinstance(fault, CorpusError)]
    if manifest is None and mirror is None and not faults:
        faults = _doubts(folder, shards)
    if manifest is None and mirror is not None:
        if shards and not any(shard.entry in mirror.manifest["shards"] for shard in shards):
            raise CorpusError(
                f"{mirror.location} is not a mirror of {folder}: none of the intact shards is the same there"
            )
        manifest = mirror.manifest
    if not faults and manifest is not None and _identities(s.entry for s in shards) != _identities(_listed(manifest)):
        faults = ["the shards are not those in manifest.json"]
    if not faults:
        return _write_from_tars(folder, shards, manifest)
    if mirror is None:
        advice = (
            "manifest.json or the index is damaged too, so only a mirror can restore them: add --mirror URL_OR_FOLDER"
        )
        raise CorpusError("\n".join([*faults, advice]))
    _install(folder, lambda staging: _copy_index(mirror, staging))
    return f"manifest and index were copied from {mirror.location}"


def _identities(entries: Iterable[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {tuple(entry[name] for name in IDENTITY) for entry in entries}


def _is_index_of(folder: Path, shards: Sequence[ShardIndex]) -> bool:
    """Return whether the index files in a folder are, to the byte, those of these shards."""
    for name in INDEX_FILES:
        records = _records_of(name, shards)
        path = folder / f"{name}.npy"
        if not path.exists() or path.read_bytes() != index_header(name, len(records)) + records.tobytes():
            return False
    return True


def _doubts(folder: Path, shards: Sequence[ShardIndex]) -> list[str]:
    """Return why the intact shards that were found may not be all shards, if there is no manifest.

    A damaged index file still has the number of blocks and most of its records.
    """
    has_count = False
    for name in INDEX_FILES:
        path = folder / f"{name}.npy"
        found = _records_of(name, shards)
        listed, left = _what_is_left(path)
        has_count |= listed is not None
        if listed is not None and listed != len(found):
            held = f"{count(len(shards), 'shard')} in the folder with {count(len(found), 'block')}"
            return [f"{path} lists {count(listed, 'block')}, and there {'is' if len(shards) == 1 else 'are'} {held}"]
        end = 0
        for shard in shards:
            own = slice(end, end := end + len(shard.blocks))
            if len(left[own]) and not (left[own] == found[own][: len(left[own])]).any():
                return [f"{path} lists other blocks than {folder / shard.entry['name']} has"]
    for number, shard in enumerate(shards):
        # This is no proof: preparation also skips the numbers of shards that have no document.
        if not has_count and number_of_shard(shard.entry["name"]) != number:
            return [f"{folder / shard_name(number)} may be missing; no file is left that would show it"]
    return []


def _records_of(name: str, shards: Sequence[ShardIndex]) -> NDArray[np.void]:
    """Return the records that an index file has for shards, each as plain bytes."""
    if name == "lengths":
        records = np.concatenate([shard.lengths for shard in shards])
    else:
        records = np.concatenate([shard.blocks for shard in shards])
        records["shard"] = np.repeat(np.arange(len(shards)), [len(shard.blocks) for shard in shards])
    return records.view(f"V{records.dtype.itemsize}")


def _what_is_left(path: Path) -> tuple[int | None, NDArray[np.void]]:
    """Return the number in the header of an index file that may be damaged, and its records.

    The number is None if the header is damaged or the file is missing.
    """
    dtype = np.dtype(f"V{(LENGTHS if path.stem == 'lengths' else BLOCK).itemsize}")
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            (number,), _, described = np.lib.format.read_array_header_1_0(file)
            if described.itemsize != dtype.itemsize:
                raise ValueError("its header is damaged")
            return number, np.fromfile(file, dtype)
    except (OSError, ValueError, SyntaxError, TokenError):  # NumPy parses the header as Python
        return None, np.empty(0, dtype)


def _scanned(path: Path, progress: Callable[[int], None]) -> ShardIndex | CorpusError:
    try:
        return scan_shard(path, progress)
    except CorpusError as error:
        return error


def _write_from_tars(folder: Path, shards: Sequence[ShardIndex], manifest: dict[str, Any] | None) -> str:
    index = folder / "index.npy"
    digest_before = blake3_of(index) if index.exists() else None
    counted = [name for name in INDEX_FILES if _what_is_left(folder / f"{name}.npy")[0] is not None]
    card, remark = _card(folder, shards, manifest)
    _install(folder, lambda staging: write_index(staging, shards, card))
    with Corpus(folder, check_shards=False) as corpus:
        if manifest is not None and manifest["content_sha256"] == corpus.content_sha256:
            agreement = "as in manifest.json"
        elif manifest is not None:
            agreement = "and not the one in manifest.json, which lists the same shards"
        elif digest_before == corpus.manifest["index_blake3"]:
            agreement = "as in index.npy; manifest.json was unusable"
        elif counted:
            agreement = f"with as many blocks as {counted[0]}.npy listed; manifest.json was unusable"
        else:
            agreement = "manifest.json was unusable, so it is unknown whether a shard is missing at the end"
        written = f"manifest and index were written from {count(len(shards), 'shard')}"
        return f"{written}; content sha256 {corpus.content_sha256}, {agreement}{remark}"


def _card(folder: Path, shards: Sequence[ShardIndex], manifest: dict[str, Any] | None) -> tuple[MediaCard | None, str]:
    """Return the media card of a corpus, and a clause for people if the manifest that held it cannot be read."""
    if manifest is not None:
        return card_of(manifest), ""
    modalities = {modality for shard in shards for modality in shard.entry["modalities"]}
    if len(modalities) != 1 or not modalities <= MEDIA:
        return None, ""
    with tempfile.TemporaryDirectory() as without:
        write_index(Path(without), shards)
        with closing(Folder(Path(without))) as storage:
            found = find_card(folder.absolute(), read_manifest(storage))
    if found is not None:
        return found.card, f"; its media card ({found.card}) is that of {found.place}" if found.card else ""
    return None, (
        f"; its media card (layout of each {modalities.pop()} document) is lost, if it had one. Only a mirror has it: "
        "remove manifest.json and repair again with --mirror URL_OR_FOLDER"
    )


def _copy_index(mirror: Corpus, staging: Path) -> None:
    (staging / "manifest.json").write_bytes(mirror.storage.read_small("manifest.json"))
    for name in INDEX_FILES:
        size, digest = mirror.manifest[f"{name}_bytes"], mirror.manifest[f"{name}_blake3"]
        (staging / f"{name}.npy").write_bytes(mirror.storage.read_index(f"{name}.npy", size, digest, fresh=False))
    for path in staging.iterdir():
        sync(path)
    Corpus(staging, check_shards=False).close()  # raises if the copy was damaged on the way


def _install(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the index files in a new folder, then move them into the corpus, the manifest last."""
    staging = folder / "index.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        write(staging)
        for name in (*(f"{name}.npy" for name in INDEX_FILES), "manifest.json"):
            (staging / name).replace(folder / name)
    finally:
        shutil.rmtree(staging)
    sync(folder)


def _repair_shards(
    folder: Path, corpus: Corpus, mirror: Corpus | None, scans: Scans, threads: int
) -> list[str | CorpusError | None]:
    """Return a message for each shard that was repaired, an error if it cannot be, and None if it is intact."""
    entries = corpus.manifest["shards"]

    def repaired(shard: int) -> str | CorpusError | None:
        name = entries[shard]["name"]
        if name in scans and is_listed(scans[name], entries[shard]):
            return None
        try:
            return _repair_shard(folder, corpus, shard, mirror)
        except CorpusError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(repaired, range(len(entries))))


def _repair_withdrawn(corpus: Corpus, mirror: Corpus | None) -> str | CorpusError | None:
    """Copy a damaged list of withdrawn documents from the mirror. Results are those of `_repair_shards`."""
    faults = faults_of_list(corpus.storage, corpus.content_sha256, corpus.lengths)
    if not faults:
        return None
    if mirror is None:
        return CorpusError(faults[0])
    try:
        entries = mirror.withdrawn
    except CorpusError as error:
        return error
    if not entries:
        return CorpusError(f"{faults[0]}; the mirror {mirror.location} has no list either")
    write_withdrawn(Path(corpus.location), corpus.content_sha256, entries)
    return (
        f"{corpus.location}/{WITHDRAWN_FILE} was copied from {mirror.location}, with "
        f"{count(len({entry.key for entry in entries}), 'document')}; withdraw again what was withdrawn only here"
    )


def _repair_shard(folder: Path, corpus: Corpus, shard: int, mirror: Corpus | None) -> str:
    """Write a shard again from its intact blocks and the mirror's.

    Damage in bits of a table that zstd ignores leaves the block intact and changes the tar. For this case, the second
    attempt takes all blocks from the mirror.
    """
    entry = corpus.manifest["shards"][shard]
    path = folder / entry["name"]
    staging = partial_path(path)
    for sources in [[corpus]] if mirror is None else [[corpus, mirror], [mirror]]:
        fetched = 0
        try:
            with staging.open("wb") as file:
                writer = ShardWriter(file, number_of_shard(path.name))
                for block in corpus.blocks_of(shard):
                    stored, source = _first_whole(block, corpus.blocks_of(shard)[-1], sources)
                    writer.add(stored)
                    fetched += source is mirror
                writer.finish()
            if writer.sha256.hexdigest() == entry["sha256"]:
                move_into_place(staging, path)
                origin = (
                    f", with {fetched} of {count(entry['blocks'], 'block')} from {sources[-1].location}"
                    if fetched
                    else ""
                )
                return f"{path} was written again{origin}"
        finally:
            staging.unlink(missing_ok=True)
    raise CorpusError(f"{path} is damaged in bits of a table that do not change its meaning")


def _first_whole(block: int, through: int, sources: Sequence[Corpus]) -> tuple[StoredBlock, Corpus]:
    """Return a block from the first source in which it is intact, and that source.

    Raises:
        CorpusError: it is damaged in all sources; this is the error of the last.
    """
    for source in sources[:-1]:
        try:
            return source.read_stored(block, through), source
        except CorpusError:
            continue  # the damage is known already
    return sources[-1].read_stored(block, through), sources[-1]
