"""Corpora of comparison.py, for training and validation: English, code, Chinese with Japanese, and sound."""

import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

HOLDOUT = {"code": 0.02, "sound": 0.005}
"""Share of the documents that validate."""
LAST_LINES = 0.1
"""Share of the lines of each Chinese or Japanese file that validate: the last ones."""
SENTENCES = ("udgsd_chinese-simplified", "udpud_chinese", "udgsd_japanese")
"""Files with one sentence in each line. No line is repeated."""
DECLARATIONS = ("udhr_cmn_hans", "udhr_cmn_hant", "udhr_jpn")
"""Translations of one text, which only train."""


FOLDERS = {"english": ("books/train", "books/valid"), "chinese": ("multilingual",), "sound": ("audio",)}
"""Folders of the raw data that a corpus is prepared from."""


def byteloom(*arguments: object) -> str:
    """Run a command and return its standard output. If it fails, end this process with its exit code."""
    command = [Path(sys.executable).parent / "byteloom", *map(str, arguments)]
    handler = signal.signal(signal.SIGINT, lambda *_: None)  # the command gets Ctrl+C too, and saves a checkpoint
    try:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    if done.returncode:
        print(f"byteloom {arguments[0]} ended with {done.returncode}; the same command resumes", file=sys.stderr)
        raise SystemExit(done.returncode)
    return done.stdout


def missing_folders(names: Iterable[str], data: Path, out: Path) -> list[Path]:
    """Return the folders of raw data that corpora need and that do not exist; see `prepared`."""
    unprepared = [name for name in names if not all(path.exists() for path in parts(name, out))]
    needed = [data / folder for name in unprepared for folder in FOLDERS.get(name, ())]
    return [folder for folder in needed if not folder.is_dir()]


def prepared(name: str, data: Path, out: Path) -> tuple[Path, Path]:
    """Return the corpora for training and for validation; prepare them if they are missing.

    Args:
        name: in CORPORA.
        data: folder of the unpacked archives.
        out: folder of the corpora.
    """
    train, valid = parts(name, out)
    if not train.exists() or not valid.exists():
        CORPORA[name](data, out / name)
    return train, valid


def parts(name: str, out: Path) -> tuple[Path, Path]:
    """Return the folders of the corpora for training and for validation."""
    return out / name / "train", out / name / "validation"


def english(data: Path, out: Path) -> None:
    """Prepare all books to train; the first valid book, by name, validates."""
    books = data / "books"
    for source, corpus in ((books / "train", "train"), (min((books / "valid").iterdir()), "validation")):
        if not (out / corpus).exists():
            byteloom("prepare", source, "--out", out / corpus)


def code(data: Path, out: Path) -> None:
    """Prepare the standard library of the running Python, without tests."""
    excluded = [word for name in ("test", "tests", "idle_test", "site-packages") for word in ("--exclude", name)]
    library = sysconfig.get_path("stdlib")
    byteloom("prepare", library, "--include", "*.py", *excluded, "--holdout", HOLDOUT["code"], "--out", out)


def chinese(data: Path, out: Path) -> None:
    """Prepare Chinese and Japanese sentences."""
    texts = out.with_name(f"{out.name}-text")
    for part in ("train", "validation"):
        (texts / part).mkdir(parents=True, exist_ok=True)
    for name in (*SENTENCES, *DECLARATIONS):
        lines = (data / "multilingual" / f"{name}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        kept = len(lines) if name in DECLARATIONS else round(len(lines) * (1 - LAST_LINES))
        for part, some in (("train", lines[:kept]), ("validation", lines[kept:])):
            if some:
                (texts / part / f"{name}.txt").write_text("".join(some), encoding="utf-8")
    for part in ("train", "validation"):
        if not (out / part).exists():
            byteloom("prepare", texts / part, "--out", out / part)


def sound(data: Path, out: Path) -> None:
    """Prepare German sentences of one speaker: samples of 16 bits, 16,000 a second."""
    byteloom("prepare", data / "audio", "--include", "kerstin*", "--holdout", HOLDOUT["sound"], "--out", out)


CORPORA: dict[str, Callable[[Path, Path], None]] = {
    "english": english,
    "code": code,
    "chinese": chinese,
    "sound": sound,
}
