"""Reader and modality of a file, by the reader that was requested or by the file's suffix."""

from functools import lru_cache

from data_pipeline.errors import CorpusError
from data_pipeline.readers.options import AUTO, ReadOptions
from data_pipeline.readers.registry import Reader, own_reader_of, own_readers, reader_named
from data_pipeline.sources.roots import is_pipe
from data_pipeline.sources.source_file import SourceFile

COMPRESSIONS = frozenset({".gz", ".zst"})
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
BINARY = frozenset({
    ".7z", ".a", ".bin", ".bz2", ".class", ".dll", ".doc", ".docx", ".dylib", ".eot", ".exe", ".gz", ".ico", ".jar",
    ".lz4", ".mkv", ".mov", ".mp4", ".npy", ".npz", ".o", ".pack", ".parquet", ".pdf", ".pkl", ".pt", ".pyc", ".so",
    ".tar", ".tgz", ".ttf", ".wasm", ".webm", ".whl", ".woff", ".woff2", ".xls", ".xlsx", ".xz", ".zip", ".zst",
})
# fmt: on


def container_of(file: SourceFile, options: ReadOptions) -> Reader | None:
    """Return the reader of a file that holds many documents; None if the file is one document.

    Raises:
        CorpusError: the file is a command, and the reader is not that of WebDataset.
    """
    if is_pipe(file.url):
        if options.reader not in BY_SUFFIX:
            raise CorpusError(f"{file.url} runs a program, which only --reader webdataset reads")
        return own_readers()["webdataset"]
    suffix, is_compressed = _suffixes(file.key)
    if options.reader == AUTO:
        found = own_reader_of(suffix)
        return found if found and found.read_container and (found.compressed or not is_compressed) else None
    reader = reader_named(options.reader)
    if reader.read_container:
        return reader
    return own_reader_of(suffix) if reader.in_tars and suffix == ".tar" else None


def reader_of(key: str, options: ReadOptions) -> tuple[Reader, bool]:
    """Return the reader of a document that is a file or a member of a tar, and whether to decompress it first."""
    if options.reader in BY_SUFFIX:
        suffix, is_compressed = _suffixes(key)
        found = None if is_compressed else own_reader_of(suffix)
        return (found if found and found.read_file else own_readers()["files"]), is_compressed
    reader = reader_named(options.reader)
    return (reader if reader.read_file else own_readers()["files"]), False


def modality_of(key: str, options: ReadOptions) -> str:
    """Return the modality of a document that is a file or a member of a tar: text, unless its suffix says otherwise."""
    if options.modality:
        return options.modality
    reader, is_compressed = reader_of(key, options)
    if reader.modality:
        return reader.modality
    suffix = _suffixes(key)[0] if is_compressed else _split(key)[1]
    if suffix in CODE:
        return "code"
    media = own_reader_of(suffix)
    return "binary" if suffix in BINARY or (media and media.modality) else "text"


@lru_cache(maxsize=4)  # asked several times of each file in turn
def _suffixes(key: str) -> tuple[str, bool]:
    """Return the suffix before that of a compression, and whether there is one of a compression."""
    stem, suffix = _split(key)
    if suffix == ".tgz":
        return ".tar", True
    if suffix in COMPRESSIONS:
        return _split(stem)[1], True
    return suffix, False


def _split(key: str) -> tuple[str, str]:
    """Split the last name of a key, in small letters, as `splitext` does but faster."""
    name = key[key.rfind("/") + 1 :].lower()
    dot = name.rfind(".")
    if dot <= 0 or not name[:dot].strip("."):
        return name, ""
    return name[:dot], name[dot:]
