"""Numbers of a run as tables whose rows share a place: step, bytes and time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTS = 1000
"""Most points of a curve. A point of a longer run is the mean of neighbouring steps."""
PLACES = ("bytes", "step", "seconds")
"""Columns that say where a row lies: bytes trained, steps done, and seconds since the run began."""

NumberTable = dict[str, list[float | None]]
"""Columns of equal length by name, the PLACES among them. None: the row does not have the number."""


def tables_of(records: Sequence[Mapping[str, Any]], began: float) -> dict[str, NumberTable]:
    """Return the tables of a journal: `train` has a row for each step, `validation` one for each validation.

    Args:
        records: lines of metrics.jsonl, oldest first.
        began: begin of the run, in seconds since 1970.
    """
    places, trained = [], 0.0
    for record in records:
        seconds = record.get("step_seconds", 0.0)
        step_bytes = record.get("bytes_per_second", 0.0) * seconds
        if not trained and record["step"] > 1:  # a branch: its parent has trained the earlier steps
            trained = step_bytes * (record["step"] - 1)
        trained += step_bytes
        places.append({"step": record["step"], "bytes": round(trained), "seconds": round(record["time"] - began, 3)})
    rows = {
        "train": [(at, _train(record)) for at, record in zip(places, records, strict=True) if "step_seconds" in record],
        "validation": [
            (at, found) for at, record in zip(places, records, strict=True) if (found := _validated(record))
        ],
    }
    return {name: _table(of_table) for name, of_table in rows.items() if of_table}


def _train(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a step; the seconds that it waited for data are among them."""
    found = {name: value for name, value in record.items() if name not in ("step", "time") and not _is_validation(name)}
    if "data_wait_share" in record:
        found["data_seconds"] = record["data_wait_share"] * record["step_seconds"]
    return found


def _validated(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if _is_validation(name)}


def _is_validation(name: str) -> bool:
    return name.startswith("validation/")


def _table(rows: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> NumberTable:
    """Return rows as columns, with at most POINTS rows."""
    names = dict.fromkeys(name for _, numbers in rows for name in numbers)
    bounds = np.unique(np.linspace(0, len(rows), min(len(rows), POINTS) + 1).astype(int))
    table: NumberTable = {place: [rows[end - 1][0][place] for end in bounds[1:]] for place in PLACES}
    for name in names:
        values = np.array([numbers.get(name, np.nan) for _, numbers in rows], np.float64)
        table[name] = _means(values, bounds)
    return table


def _means(values: NDArray[np.float64], bounds: NDArray[np.int64]) -> list[float | None]:
    """Return the mean of the finite values between each two bounds; None where there is none."""
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(int), bounds[:-1])
    sums = np.add.reduceat(np.where(finite, values, 0.0), bounds[:-1])
    return [float(f"{total / count:.6g}") if count else None for total, count in zip(sums, counts, strict=True)]


def at_time(table: Mapping[str, Sequence[float | None]], seconds: float) -> dict[str, float]:
    """Return the step and the bytes that a run had done at a time."""
    times = table["seconds"]
    number = int(np.searchsorted(np.array(times, float), seconds, side="right")) - 1
    if number < 0:
        return {"step": 0, "bytes": 0, "seconds": seconds}
    return {"step": table["step"][number] or 0, "bytes": table["bytes"][number] or 0, "seconds": seconds}


def sampled(rows: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[number] for number in np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))]
