"""Reader and modality of a file, by the reader that was requested or by the file's suffix."""

from functools import lru_cache
from typing import NamedTuple

from data_pipeline.errors import CorpusError
from data_pipeline.readers.options import AUTO, ReadOptions
from data_pipeline.readers.registry import Reader, own_reader_of, own_readers, reader_named
from data_pipeline.sources.roots import is_pipe
from data_pipeline.sources.source_file import SourceFile

COMPRESSIONS = frozenset({".bz2", ".gz", ".xz", ".zst"})
TARS = frozenset({".tbz2", ".tgz", ".txz"})
"""Suffixes of compressed tars."""
MAX_SUFFIX = 16
"""Longest suffix that reports count by itself."""
BY_SUFFIX = frozenset({AUTO, "webdataset"})
"""Readers that decode each document, or each member, by its suffix."""
# fmt: off
CODE = frozenset({
    ".asm", ".bash", ".c", ".cc", ".clj", ".cmake", ".cpp", ".cs", ".css", ".cu", ".cuh", ".cxx", ".dart", ".el",
    ".erl", ".ex", ".exs", ".f", ".f90", ".for", ".fs", ".go", ".gradle", ".h", ".hh", ".hpp", ".hs", ".html", ".hxx",
    ".inl", ".ipynb", ".java", ".jl", ".js", ".jsx", ".kt", ".kts", ".less", ".lisp", ".lua", ".m", ".mjs", ".ml",
    ".mli", ".mm", ".nim", ".pas", ".php", ".pl", ".pm", ".proto", ".ps1", ".py", ".pyi", ".pyx", ".r", ".rb", ".rkt",
    ".rs", ".s", ".sass", ".scala", ".scm", ".scss", ".sh", ".sql", ".sv", ".swift", ".tcl", ".ts", ".tsx", ".v", ".vb",
    ".vhd", ".vhdl", ".vue", ".xsl", ".zig",
})
TEXT = frozenset({
    ".cfg", ".conf", ".csv", ".ini", ".json", ".log", ".md", ".rst", ".srt", ".tex", ".toml", ".tsv", ".txt", ".vtt",
    ".xml", ".yaml", ".yml",
})
BINARY = frozenset({
    ".7z", ".a", ".bin", ".bz2", ".class", ".dll", ".doc", ".docx", ".dylib", ".eot", ".exe", ".gz", ".ico", ".jar",
    ".lz4", ".mkv", ".mov", ".mp4", ".npy", ".npz", ".o", ".pack", ".parquet", ".pdf", ".pkl", ".pt", ".pyc", ".so",
    ".tar", ".tgz", ".ttf", ".wasm", ".webm", ".whl", ".woff", ".woff2", ".xls", ".xlsx", ".xz", ".zip", ".zst",
})
# fmt: on


class _Kind(NamedTuple):
    """Readers and modality of the files of one suffix."""

    container: Reader | None
    """Reader of such a file, if it holds many documents."""
    reader: Reader
    """Reader of such a file or member of a tar, if it is one document."""
    is_decompressed: bool
    """True if the file is decompressed before that reader reads it."""
    modality: str
    """Modality of that document by its suffix."""


def container_of(file: SourceFile, options: ReadOptions) -> Reader | None:
    """Return the reader of a file that holds many documents; None if the file is one document.

    Raises:
        CorpusError: the file is a command, and the reader is not that of WebDataset.
    """
    if is_pipe(file.url):
        if options.reader not in BY_SUFFIX:
            raise CorpusError(f"{file.url} runs a program, which only --reader webdataset reads")
        return own_readers()["webdataset"]
    return _kind(*_suffixes(file.key), options).container


def reader_of(key: str, options: ReadOptions) -> tuple[Reader, bool]:
    """Return the reader of a document that is a file or a member of a tar, and whether to decompress it first."""
    kind = _kind(*_suffixes(key), options)
    return kind.reader, kind.is_decompressed


def modality_of(key: str, options: ReadOptions) -> str:
    """Return the modality of a document that is a file or a member of a tar: text, unless its suffix says otherwise."""
    return _kind(*_suffixes(key), options).modality


@lru_cache(maxsize=4096)
def _kind(suffix: str, compression: str, options: ReadOptions) -> _Kind:
    """Return the kind of a file by its suffixes. See `_suffixes`."""
    own, files = own_reader_of(suffix), own_readers()["files"]
    chosen = None if options.reader == AUTO else reader_named(options.reader)
    if chosen is None:
        container = own if own and own.read_container and (own.compressed or not compression) else None
    elif chosen.read_container:
        container = chosen
    else:
        container = own if chosen.in_tars and suffix == ".tar" else None
    is_decompressed = bool(compression) and options.reader in BY_SUFFIX
    candidate = chosen if options.reader not in BY_SUFFIX else None if compression else own
    reader = candidate if candidate and candidate.read_file else files
    shown = suffix if is_decompressed else compression or suffix
    return _Kind(container, reader, is_decompressed, options.modality or reader.modality or _modality(shown))


def _modality(suffix: str) -> str:
    if suffix in CODE:
        return "code"
    media = own_reader_of(suffix)
    return "binary" if suffix in BINARY or (media and media.modality) else "text"


def names_text(key: str) -> bool:
    """Return whether the suffix of a key is known as that of text or code."""
    suffix, _ = _suffixes(key)
    return suffix in CODE or suffix in TEXT


def suffix_of(key: str) -> str:
    """Return the suffix of a document's key for reports; that of a line or row is the suffix of its file."""
    file, mark, number = key.rpartition("#")
    stem, suffix = _split(file if mark and number.isdecimal() else key)
    if suffix in COMPRESSIONS:
        suffix = _split(stem)[1] + suffix
    return suffix if len(suffix) <= MAX_SUFFIX else ""


@lru_cache(maxsize=4)  # asked several times of each file in turn
def _suffixes(key: str) -> tuple[str, str]:
    """Return the suffix of the content of a file, and that of its compression, which is empty if there is none."""
    stem, suffix = _split(key)
    if suffix in TARS:
        return ".tar", suffix
    if suffix in COMPRESSIONS:
        return _split(stem)[1], suffix
    return suffix, ""


def _split(key: str) -> tuple[str, str]:
    """Split the last name of a key, in small letters, as `splitext` does but faster."""
    name = key[key.rfind("/") + 1 :].lower()
    dot = name.rfind(".")
    if dot <= 0 or not name[:dot].strip("."):
        return name, ""
    return name[:dot], name[dot:]
