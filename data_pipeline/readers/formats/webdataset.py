"""Reader of WebDataset shards: each sample is a document (https://github.com/webdataset/webdataset).

    000.tar: a.jpg, a.txt, b.jpg, … ─▶ members of one key ─▶ sample a: jpg, txt ─▶ Document, its members joined

The webdataset package groups members by key and runs the commands of `pipe:` sources; braceexpand expands the braces
of `{000..012}.tar`. The members are read by the reader of tars, which notices a tar that is damaged or cut short.

A source `pipe:COMMAND` runs the command in a shell. Its output must be a tar that is not compressed. A command runs
only if the user wrote it as a source: no listing, no file and no server can add one.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

from byteloom.core.packages import needed_by
from data_pipeline.documents import Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.compression import decompressed
from data_pipeline.readers.content import binary_format
from data_pipeline.readers.formats.tar import members_of, tar_errors, why_left_out
from data_pipeline.readers.formats.whole import read_whole
from data_pipeline.readers.kinds import modality_of, reader_of
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import Reader, register_reader
from data_pipeline.sources.opening import open_file
from data_pipeline.sources.roots import PIPE, is_pipe
from data_pipeline.sources.source_file import LeftOutError, Skipped, SourceFile


def documents_in_webdataset(file: SourceFile, options: ReadOptions) -> Iterator[Document | Skipped]:
    """Yield a document, or the reason why there is none, for each sample. One sample is in memory.

    The document consists of the members that `options.members` names, in that order; without this option, of all
    members in the order of the tar. Each is decoded by its suffix. Members named like `__this__` are metadata and are
    ignored.

    Args:
        file: the tar, or a command that writes one.
        options: which members make up a document, and how they are read.

    Raises:
        BadDocumentError: the tar cannot be read, or not further; bytes follow its end; a sample has two members of one
            name; or the command fails.
    """
    with needed_by("a WebDataset", "webdataset"):
        from webdataset.tariterators import group_by_keys  # noqa: PLC0415 - it imports torch

    left_out = list[Skipped]()
    with _opened(file) as stream:
        samples = group_by_keys(_members(stream, file, options, left_out))
        while (sample := _next(samples, file.url)) is not None:
            yield from left_out
            left_out.clear()
            yield _document_of(sample, file, options)
    yield from left_out


WEBDATASET_READER = register_reader(
    Reader(
        "webdataset",
        "Samples of WebDataset shards.",
        read_container=documents_in_webdataset,
        options=frozenset(
            {
                *("members", "skip_binary", "image_size", "image_filter", "image_scan", "patch_size"),
                *("audio_rate", "audio_channels"),
            }
        ),
    )
)


@contextmanager
def _opened(file: SourceFile) -> Iterator[BinaryIO]:
    """Open a tar, or run the command that writes it. Check that the command succeeds."""
    if not is_pipe(file.url):
        with open_file(file.url) as stored, decompressed(stored, file.key, file.url) as stream:
            yield stream
        return
    from webdataset.gopen import gopen_pipe  # noqa: PLC0415 - it imports torch

    try:
        # A worker's standard input brings its orders; no command may read them.
        pipe = gopen_pipe(f"{PIPE}exec </dev/null; {file.url.removeprefix(PIPE)}")
    except ValueError as error:  # the user has forbidden it by WDS_SECURE
        raise LeftOutError("unreadable", f"cannot run {file.url}: {error}") from error
    try:
        yield pipe.stream
    except BaseException:
        with suppress(OSError):  # a command whose output is not read to its end fails
            pipe.close()
        raise
    try:
        pipe.close()
    except OSError as error:
        raise LeftOutError("unreadable", f"cannot read {file.url}: it ended with status {pipe.status}") from error


def _members(
    stream: BinaryIO, file: SourceFile, options: ReadOptions, left_out: list[Skipped]
) -> Iterator[dict[str, Any]]:
    """Yield the members of a tar as webdataset wants them, and collect those that are left out."""
    from webdataset.tariterators import base_plus_ext  # noqa: PLC0415 - it imports torch

    for tar, header, name in members_of(stream, file.url):
        if name.startswith("__") and name.partition("/")[0].endswith("__"):
            continue
        place = f"{file.url}/{name}"
        _, suffix = base_plus_ext(name)
        if skipped := why_left_out(f"{file.key}/{name}", header, place):
            left_out.append(skipped)
        elif suffix is None:
            left_out.append(Skipped(f"{file.key}/{name}", "no key", f"{place}: its name has no suffix"))
        else:
            content = b""
            if options.members is None or suffix.lower() in _suffixes(options.members):
                with tar_errors(place):
                    member = tar.extractfile(header)
                    assert member is not None, "a member that is a file has content"
                    content = member.read()
            yield {"fname": name, "data": content, "__url__": file.url}


def _next(samples: Iterator[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Return the next sample; None at the end."""
    try:
        return next(samples, None)
    except ValueError as error:  # webdataset's error for two members of one name
        raise BadDocumentError(f"{name}: {error.args[0]}") from error


def _document_of(sample: dict[str, Any], file: SourceFile, options: ReadOptions) -> Document | Skipped:
    """Return the document of a sample, or the reason why there is none."""
    key = f"{file.key}/{sample['__key__']}"
    contents = {name: content for name, content in sample.items() if not name.startswith("__")}
    suffixes = list(contents) if options.members is None else _suffixes(options.members)
    if missing := [suffix for suffix in suffixes if suffix not in contents]:
        return Skipped(key, "no field", f"{file.url}/{sample['__key__']}: it has no member .{missing[0]}")
    members = [(_member(f"{key}.{suffix}", contents[suffix], options), contents[suffix]) for suffix in suffixes]
    members = [(member, content) for member, content in members if content]
    if not members:
        return Skipped(key, "empty", f"{file.url}/{sample['__key__']}: without a byte")
    modalities = {member.modality for member, _ in members}
    modality = modalities.pop() if len(modalities) == 1 else "binary"
    document = Document(key, modality, partial(iter, ()))
    document.read = partial(_read, document, members, file, options)
    return document


def _member(key: str, content: bytes, options: ReadOptions) -> Document:
    """Return a member as a document, with the modality of its content."""
    member = Document(key, modality_of(key, options), partial(iter, (content,)))
    if reader_of(key, options)[0].name == "files" and options.modality is None and binary_format(content):
        member.modality = "binary"
    return member


def _read(
    document: Document, members: list[tuple[Document, bytes]], file: SourceFile, options: ReadOptions
) -> Iterator[bytes]:
    """Yield the members of a sample. Several members have no common layout."""
    for member, content in members:
        name = f"{file.url}/{member.key.removeprefix(f'{file.key}/')}"
        yield from read_whole(io.BytesIO(content), member, name, None, replace(options, kinds=None))
    document.media = members[0][0].media if len(members) == 1 else None


def _suffixes(members: tuple[str, ...]) -> list[str]:
    return [suffix.lower() for suffix in members]
