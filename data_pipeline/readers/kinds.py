"""What a file is taken for: by the reader that was asked for, or by its suffix."""

from functools import lru_cache
from typing import Literal

from data_pipeline.readers.options import ReadOptions

Container = Literal["lines", "jsonl", "parquet", "tar"]
Whole = Literal["bytes", "compressed", "image", "audio"]

COMPRESSIONS = frozenset({".gz", ".zst"})
CONTAINERS: dict[str, Container] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "tar"}
# fmt: off
IMAGES = frozenset({
    ".bmp", ".gif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
})
AUDIO = frozenset({
    ".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav",
})
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
NO_TEXT = BINARY | IMAGES | AUDIO


def container_of(key: str, options: ReadOptions) -> Container | None:
    """What kind of container a file is; None if it is one document."""
    match options.reader:
        case "lines" | "jsonl" | "parquet" | "tar":
            return options.reader
        case "auto":
            suffix, is_compressed = _suffixes(key)
            found = CONTAINERS.get(suffix)
            return None if found == "parquet" and is_compressed else found  # which compresses its columns itself
        case "images" | "audio":
            return "tar" if _suffixes(key)[0] == ".tar" else None
        case "files":
            return None


def whole_of(key: str, options: ReadOptions) -> Whole:
    """How the bytes of a document that is a file, or a member of a tar, are had."""
    match options.reader:
        case "images":
            return "image"
        case "audio":
            return "audio"
        case "auto":
            suffix, is_compressed = _suffixes(key)
            if is_compressed:
                return "compressed"
            if suffix in IMAGES:
                return "image"
            if suffix in AUDIO:
                return "audio"
    return "bytes"


def modality_of(key: str, options: ReadOptions) -> str:
    """The modality of a document that is a file, or a member of a tar: text, unless its suffix says otherwise."""
    if options.modality:
        return options.modality
    whole = whole_of(key, options)
    if whole in ("image", "audio"):
        return whole
    suffix = _suffixes(key)[0] if whole == "compressed" else _split(key)[1]
    if suffix in NO_TEXT:
        return "binary"
    return "code" if suffix in CODE else "text"


@lru_cache(maxsize=4)  # asked several times of each file in turn
def _suffixes(key: str) -> tuple[str, bool]:
    """The suffix within that of a compression, and whether there is one of a compression."""
    stem, suffix = _split(key)
    if suffix == ".tgz":
        return ".tar", True
    if suffix in COMPRESSIONS:
        return _split(stem)[1], True
    return suffix, False


def _split(key: str) -> tuple[str, str]:
    """The last name of a key in small letters, as `splitext` cuts it; asked so often that it is worth its own lines."""
    name = key[key.rfind("/") + 1 :].lower()
    dot = name.rfind(".")
    if dot <= 0 or not name[:dot].strip("."):
        return name, ""
    return name[:dot], name[dot:]
