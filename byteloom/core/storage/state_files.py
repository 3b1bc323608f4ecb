"""Reading small state files, which machines that lose power, full disks and people damage.

    read_json, read_yaml    a whole file ─▶ a checked value | None (no such file) | StateFileError
    read_lines              JSON lines   ─▶ a checked value of each line, or what is wrong with it

A value is checked against a type that pydantic knows: a dataclass, a model, dict[str, float]. Fields that the type does
not have are ignored, so that older programs read newer files.
"""

import contextlib
import functools
import json
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from byteloom.core.errors import CorrectableError

T = TypeVar("T")


class StateFileError(CorrectableError):
    """A state file cannot be used; the message names the file, what is wrong and what to do."""

    @classmethod
    def damaged(cls, path: object, fault: str, advice: str) -> "StateFileError":
        """Return the error of a file whose content is wrong.

        Args:
            path: of the file.
            fault: a clause about "it", such as "it is empty".
            advice: what a person can do, as a clause.
        """
        return cls(f"{path} is damaged: {fault}; {advice}")


def read_json(path: Path, kind: type[T], advice: str) -> T | None:
    """Return the checked value of a JSON file; None where there is no such file.

    Args:
        path: of the file.
        kind: the type that the value must have.
        advice: what a person can do about a damaged file, as a clause.

    Raises:
        StateFileError: the file cannot be read, or is damaged.
    """
    content = _content(path)
    if content is None:
        return None
    try:
        return _from_json(content, kind)
    except ValueError as error:
        raise StateFileError.damaged(path, str(error), advice) from error


def read_yaml(path: Path, kind: type[T], advice: str) -> T | None:
    """Return the checked value of a YAML file. Arguments and errors are those of `read_json`."""
    content = _content(path)
    if content is None:
        return None
    try:
        return _from_yaml(content, kind)
    except ValueError as error:
        raise StateFileError.damaged(path, str(error), advice) from error


@dataclass(frozen=True)
class StoredLine(Generic[T]):
    """One line of a file of JSON lines."""

    value: T | None
    """Checked value; None if the line is damaged."""
    text: str
    """Text of the value, without the end of the line; empty if the line is damaged."""
    fault: str
    """Description of the damage, with file and line; empty for a whole line. A value may follow foreign bytes."""
    end: int
    """Offset in the file just after the line, in bytes."""


def read_lines(path: Path, kind: type[T], offset: int = 0) -> Iterator[StoredLine[T]]:
    """Yield the lines of a file from an offset on; nothing where there is no such file.

    A last line without its end is left out: it is being written, or its writer was killed. A whole value that follows
    foreign bytes in a line is found: zero bytes of a file system that lost power, or half a line of a killed writer.

    Raises:
        StateFileError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                value, text, fault = _stored_value(line[:-1], kind)
                if fault:
                    fault = f"{path} is damaged in line {_lines_before(path, offset) + 1}: {fault}"
                offset += len(line)
                yield StoredLine(value, text, fault, offset)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(path, error) from error


def _stored_value(line: bytes, kind: type[T]) -> tuple[T | None, str, str]:
    """Return the value of a line, the text of the value, and what is wrong as a clause."""
    try:
        return _from_json(line, kind), line.decode(), ""
    except ValueError as error:
        fault = str(error)
    start = line.rfind(b'{"')
    if start > 0:
        with contextlib.suppress(ValueError):
            value = _from_json(line[start:], kind)
            return value, line[start:].decode(), f"{start:,} bytes before its value belong to no line"
    return None, "", fault


def _lines_before(path: Path, offset: int) -> int:
    """Return how many lines end in the first bytes of a file."""
    count = 0
    with path.open("rb") as file:
        while offset > 0 and (piece := file.read(min(offset, 1 << 20))):
            count += piece.count(b"\n")
            offset -= len(piece)
    return count


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> StateFileError:
    advice = "; get the right to read it from its owner" if isinstance(error, PermissionError) else ""
    return StateFileError(f"{path} cannot be read: {error.strerror or error}{advice}")


def _from_json(content: bytes, kind: type[T]) -> T:
    """Return the checked value of a JSON text; raise ValueError, with what is wrong as a clause."""
    _refuse_what_is_no_text(content)
    try:
        # Not pydantic's own parser: it refuses file names that are no UTF-8, which JSON holds as lone surrogates.
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    return _checked(value, kind)


def _from_yaml(content: bytes, kind: type[T]) -> T:
    """Return the checked value of a YAML text; raise ValueError, with what is wrong as a clause."""
    _refuse_what_is_no_text(content)
    try:
        value = yaml.load(content, yaml.CSafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not YAML ({getattr(error, 'problem', None) or type(error).__name__})") from error
    return _checked(value, kind)


def _checked(value: object, kind: type[T]) -> T:
    """Return a value as its type; raise ValueError, with what is wrong as a clause."""
    try:
        return _adapter(cast(Hashable, kind)).validate_python(value)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(map(str, fault["loc"]))
        if fault["type"] == "missing":
            raise ValueError(f"{name} is missing in it") from error
        is_no_object = fault["type"] in ("dataclass_type", "dict_type", "model_type")
        wanted = "it should be an object" if is_no_object else fault["msg"][0].lower() + fault["msg"][1:]
        raise ValueError(f"{name or 'it'} is {_shortened(fault['input'])}, but {wanted}") from error


def _refuse_what_is_no_text(content: bytes) -> None:
    if not content.strip(b"\0"):
        raise ValueError("it holds only zero bytes, as after a loss of power" if content else "it is empty")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error


def _shortened(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
