"""The journal of a run: metrics.jsonl, one JSON object a line, each with `step` and `time` (seconds since 1970)."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.atomic import replace_file, sync


class Journal:
    """Writer of metrics.jsonl."""

    def __init__(self, path: Path, last_step: int | None) -> None:
        """Open the journal to continue after `last_step`; drop what an interrupted attempt wrote beyond it.

        Args:
            last_step: of the checkpoint the run resumes from; None starts an empty journal.
        """
        self.path = path
        kept = [] if last_step is None else [line.text for line in lines(path) if line.record["step"] <= last_step]
        replace_file(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Put what was appended on disk."""
        sync(self.path)

    def close(self) -> None:
        self._file.close()


class Line(NamedTuple):
    """A whole line of the journal."""

    record: dict[str, Any]
    text: str
    end: int
    """Offset in the file just after the line."""


def lines(path: Path, offset: int = 0) -> Iterator[Line]:
    """Yield the whole lines from an offset on; a last line without its end is still being written, or never was."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield Line(json.loads(line), line.decode(), offset)
