"""Tars, such as WebDataset's shards: each member is a document, decoded as a file of its name would be."""

import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import BinaryIO

from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.compression import decompressed
from data_pipeline.readers.kinds import modality_of
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.streams import copy_of
from data_pipeline.readers.whole import read_whole
from data_pipeline.sources.opening import open_file
from data_pipeline.sources.source_file import Skipped, SourceFile


def documents_in_tar(file: SourceFile, options: ReadOptions) -> Iterator[Document | Skipped]:
    """A document, or why there is none, for each member that the options take.

    A member can be read until the next document is asked for. Its bytes are copied when it is first read: to memory,
    or if they are many to the folder for temporary files.

    Raises:
        BadDocumentError: the tar cannot be read, or not further; or more follows its end.
    """
    with (
        open_file(file.url) as stored,
        decompressed(stored, file.key, file.url) as stream,
        _blaming(file.url),
        tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar,
    ):
        while header := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]  # which would grow with every member
            name = header.name.removeprefix("./").lstrip("/")
            if header.isdir() or not _is_taken(name, options):
                continue
            key = f"{file.key}/{name}"
            if not header.isfile():
                yield Skipped(key, "link", f"{file.url}/{name}: a link or device in a tar")
            elif header.issparse():  # terabytes of zeros, if it says so
                yield Skipped(key, "sparse", f"{file.url}/{name}: a sparse file in a tar, most of which is not stored")
            elif not header.size:
                yield Skipped(key, "empty", f"{file.url}/{name}: without a byte")
            else:
                with closing(_Member(tar, header, f"{file.url}/{name}")) as member:
                    yield Document(key, modality_of(key, options), partial(member.read, key, options))
        _refuse_more(tar, file.url)


def _is_taken(name: str, options: ReadOptions) -> bool:
    return options.members is None or name.lower().endswith(tuple(f".{suffix.lower()}" for suffix in options.members))


class _Member:
    """A member of a tar that is read from its beginning to its end, while the tar is at it."""

    def __init__(self, tar: tarfile.TarFile, header: tarfile.TarInfo, name: str) -> None:
        self._tar, self._header, self._name = tar, header, name
        self._copy: BinaryIO | None = None
        self._is_past = False

    def read(self, key: str, options: ReadOptions) -> Iterator[bytes]:
        """The document, in pieces; each call begins anew."""
        if self._is_past:
            raise RuntimeError(f"{self._name} must be read before the next member")
        if self._copy is None:
            with _blaming(self._name):
                content = self._tar.extractfile(self._header)
                assert content is not None, "a member that is a file has content"
                self._copy = copy_of(content)
        self._copy.seek(0)
        yield from read_whole(self._copy, key, self._name, None, options)

    def close(self) -> None:
        self._is_past = True
        if self._copy is not None:
            self._copy.close()


class _Header(tarfile.TarInfo):
    """A header whose damage is an error; tarfile takes a damaged or missing one for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # zeros: the end
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("its end mark is missing") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _refuse_more(tar: tarfile.TarFile, name: str) -> None:
    """Reads what is after the end: zeros, unless tars were put one behind the other, of which only one was read."""
    while rest := tar.fileobj.read(READ_BYTES):
        if rest.strip(b"\0"):
            raise BadDocumentError(f"{name} has more bytes after its end; if it is several tars in one file, split it")


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise BadDocumentError(f"{name} is damaged or cut short: {error}") from error
