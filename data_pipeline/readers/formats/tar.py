"""Reader of tars: each member is a document, decoded as a file of its name would be."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, BinaryIO, cast

from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.boundary import check_time, described, is_passed
from data_pipeline.readers.compression import decompressed
from data_pipeline.readers.formats.whole import read_whole
from data_pipeline.readers.kinds import modality_of
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import Reader, register_reader
from data_pipeline.readers.streams import copy_of
from data_pipeline.sources.opening import open_file
from data_pipeline.sources.source_file import Skipped, SourceFile

MAX_EXTENSION_BYTES = 1 << 20
"""Size limit of a header that extends another one, such as a PAX header. tarfile holds it in memory."""
EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def documents_in_tar(file: SourceFile, options: ReadOptions) -> Iterator[Document | Skipped]:
    """Yield a document, or the reason why there is none, for each member that the options select.

    A member can be read until the next document is requested. Its bytes are copied when it is first read: to memory, or
    to the folder for temporary files if they are many.

    Args:
        file: the tar.
        options: which members are selected, and how they are read.

    Raises:
        BadDocumentError: the tar cannot be read, or not further; or bytes follow its end.
    """
    with open_file(file.url) as stored, decompressed(stored, file.key, file.url) as stream:
        for tar, header, name in members_of(stream, file.url):
            if not _is_selected(name, options):
                continue
            key = f"{file.key}/{name}"
            if (left_out := why_left_out(key, header, f"{file.url}/{name}")) is not None:
                yield left_out
            elif not header.size:
                yield Skipped(key, "empty", f"{file.url}/{name}: without a byte")
            else:
                with closing(_Member(tar, header, f"{file.url}/{name}")) as member:
                    yield member.document(key, options)


TAR_READER = register_reader(
    Reader(
        "tar",
        "Members of tars.",
        read_container=documents_in_tar,
        options=frozenset({"members", "skip_binary"}),
        suffixes=frozenset({".tar"}),
    )
)


def members_of(stream: BinaryIO, name: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, str]]:
    """Yield the members of a tar that are no folders: the tar, whose position is at the member, header and name.

    Args:
        stream: the tar, read from its start.
        name: its name for errors.

    Raises:
        BadDocumentError: the tar cannot be read, or not further; or bytes follow its end.
    """
    source = cast(BinaryIO, _TarStream(stream))
    with tar_errors(name), tarfile.open(fileobj=source, mode="r|", tarinfo=_Header) as tar:
        while header := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]  # it would grow with every member
            if not header.isdir():
                yield tar, header, header.name.removeprefix("./").lstrip("/")
        _refuse_more(tar, name)


def why_left_out(key: str, header: tarfile.TarInfo, name: str) -> Skipped | None:
    """Return the entry for a member that is not a plain file; None for a plain file."""
    if not header.isfile():
        return Skipped(key, "link", f"{name}: a link or device in a tar")
    if header.issparse():  # its header may state terabytes of zeros
        return Skipped(key, "sparse", f"{name}: a sparse file in a tar, most of which is not stored")
    return None


def _is_selected(name: str, options: ReadOptions) -> bool:
    return options.members is None or name.lower().endswith(tuple(f".{suffix.lower()}" for suffix in options.members))


class _Member:
    """A member of a tar. It is read from its start to its end while the tar is at it."""

    def __init__(self, tar: tarfile.TarFile, header: tarfile.TarInfo, name: str) -> None:
        self._tar, self._header, self._name = tar, header, name
        self._copy: BinaryIO | None = None
        self._is_past = False

    def document(self, key: str, options: ReadOptions) -> Document:
        """Return the document that the member is."""
        document = Document(key, modality_of(key, options), lambda: self._pieces(document, options))
        return document

    def _pieces(self, document: Document, options: ReadOptions) -> Iterator[bytes]:
        """Yield the document in pieces, from its start at each call."""
        if self._is_past:
            raise RuntimeError(f"{self._name} must be read before the next member")
        if self._copy is None:
            with tar_errors(self._name):
                content = self._tar.extractfile(self._header)
                assert content is not None, "a member that is a file has content"
                self._copy = copy_of(content)
        self._copy.seek(0)
        yield from read_whole(self._copy, document, self._name, None, options)

    def close(self) -> None:
        """Delete the copy."""
        self._is_past = True
        if self._copy is not None:
            self._copy.close()


class _Header(tarfile.TarInfo):
    """A header whose damage is an error; tarfile takes a damaged or missing header for the end of the tar."""

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

    def _proc_member(self, tarfile_: tarfile.TarFile) -> Any:
        if self.type in EXTENSIONS and self.size > MAX_EXTENSION_BYTES:
            raise tarfile.ReadError(f"a header states {self.size:,} bytes of names")
        return super()._proc_member(tarfile_)  # type: ignore[misc]

    def _proc_gnusparse_10(self, header: tarfile.TarInfo, *_: Any) -> None:
        """Mark a sparse member without reading its map, which may be damaged. Sparse members are left out."""
        header.sparse = b""


class _TarStream:
    """Bytes of a tar for tarfile, which would look for a member of 2^60 bytes behind the end of the file for years.

    A read returns what there is at once: bytes before damage are used before the damage raises an error.
    """

    MOST_EMPTY_READS = 8
    """Reads at the end of the bytes that a whole tar needs at most."""

    def __init__(self, stream: BinaryIO) -> None:
        self._read = stream.read1 if isinstance(stream, io.BufferedReader) else stream.read
        self._empty_reads = 0

    def read(self, size: int) -> bytes:
        check_time()
        piece = self._read(size)
        self._empty_reads += not piece
        if self._empty_reads > self.MOST_EMPTY_READS:
            raise tarfile.ReadError("a member is larger than the rest of the file")
        return piece


def _refuse_more(tar: tarfile.TarFile, name: str) -> None:
    """Read the bytes after the end mark. They are zeros, unless several tars were concatenated."""
    while rest := tar.fileobj.read(READ_BYTES):
        if rest.strip(b"\0"):
            raise BadDocumentError(f"{name} has more bytes after its end; if it is several tars in one file, split it")


@contextmanager
def tar_errors(name: str) -> Iterator[None]:
    """Raise a BadDocumentError with this name for a damaged tar."""
    try:
        yield
    except tarfile.TarError as error:
        raise BadDocumentError(f"{name} is damaged or cut short: {error}") from error
    except Exception as error:
        if is_passed(error):
            raise
        raise BadDocumentError(f"{name} is damaged: {described(error)}") from error
