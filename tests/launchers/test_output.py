"""Logs of ranks begin anew at a size, and only their ends are read."""

import os
import subprocess
import sys
from pathlib import Path

from launchers.supervision.heartbeat import FOLDER
from launchers.supervision.output import LOG_BYTES, TAIL_BYTES, last_error, last_lines, output_of

TALKER = """
import os, sys, time
from launchers.supervision.output import rotated_output
with rotated_output(os.environ, 0):
    deadline = time.monotonic() + 60
    for number in range(1_000_000):
        print(f"line {number}", flush=True)
        if os.path.exists(sys.argv[1] + ".1") and number > 20_000 or time.monotonic() > deadline:
            break
    print("error: the last words", flush=True)
"""


def test_log_begins_anew_at_a_size_and_loses_no_line(tmp_path: Path):
    output = output_of(tmp_path, 0)
    output.parent.mkdir()
    variables = {FOLDER: str(tmp_path / "heartbeats/start-0"), LOG_BYTES: "65536"}
    with output.open("a") as first:  # as srun opens it
        subprocess.run(
            [sys.executable, "-c", TALKER, str(output)],
            env={**os.environ, **variables, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=first,
            stderr=subprocess.STDOUT,
            check=True,
        )
    earlier = output.with_name("rank-00000.log.1")
    assert earlier.stat().st_size > 65536
    # An unbuffered process writes the end of a line apart, so a line may lie in both files.
    lines = (earlier.read_text() + output.read_text()).splitlines()
    numbers = [int(line.removeprefix("line ")) for line in lines if line.startswith("line ")]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert last_error(output) == "error: the last words"
    output.write_text("nothing wrong yet\n")
    with earlier.open("a") as file:
        file.write("\nValueError: before the log began anew\n")
    assert last_error(output) == "ValueError: before the log began anew"


def test_only_the_end_of_a_log_is_read(tmp_path: Path):
    log = tmp_path / "rank-00000.log"
    with log.open("wb") as file:
        file.write(b"error: long ago\n")
        file.truncate(1 << 34)  # sparse: reading it whole would take 16 GiB
        file.seek(0, os.SEEK_END)
        file.write(b"\nwords\nerror: now \xff\nmore words\n")
    assert sum(map(len, last_lines(log))) <= TAIL_BYTES
    assert last_error(log) == "error: now \\xff"
    assert last_lines(tmp_path / "missing") == []
