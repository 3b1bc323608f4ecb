"""Frames of `byteloom top`: many runs, a damaged one, and every width."""

import json
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pretrain.cli.runs.top import lines_of, picture_of, read_frame
from pretrain.training.run_folder import RunFolder
from tests.commands import run_here

RECORD = {
    "train/bits_per_byte": 2.34567,
    "bytes_per_second": 800_000.0,
    "bytes_per_second/per_rank": 200_000.0,
    "step_seconds": 0.5,
    "data_wait_share": 0.021,
    "mfu": 0.31,
}


def make_run(folder: Path, steps: int = 100) -> Path:
    """Write the files of a run of four ranks that has done ten steps."""
    folder.mkdir(parents=True)
    identity = {"id": folder.name, "model": {}, "data": {}, "fingerprint": "f"}
    (folder / "run.json").write_text(json.dumps(identity))
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": steps}}))
    lines = [json.dumps({"step": step, "time": time.time(), **RECORD}) for step in range(1, 11)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    moment = time.strftime("%Y-%m-%d %H:%M:%S")
    (folder / "train.log").write_text(f"{moment},000 INFO checkpoint {folder}/checkpoints/step-00000010\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder of two stopped runs and a damaged one."""
    for name in ("books", "code", "zeta"):
        make_run(tmp_path / "runs" / name)
    (tmp_path / "runs/code/run.json").write_bytes(b"")
    return tmp_path / "runs"


def test_running_run_is_first_and_a_damaged_one_hides_no_other(runs: Path):
    with RunFolder(runs / "zeta").locked():
        frame = read_frame([runs])
        lines = lines_of(frame, 160, None)
    assert lines[0].endswith("3 runs: 1 running, 1 damaged, 1 stopped")
    header, zeta, code = lines[2].split(), lines[4].split(), lines[5].split()
    assert header[:8] == ["run", "state", "step", "bits/byte", "bytes/s", "MFU", "wait", "left"]
    assert zeta[:3] == ["zeta", "running", "10/100"]
    assert {"2.3457", "800", "kB", "0.31", "2.1%", "45s"} <= set(zeta)  # 90 steps of half a second
    assert "4 ranks" in lines[4] and "checkpoint step 10" in lines[4]
    assert code[:2] == ["code", "damaged"] and "run.json is damaged: it is empty" in lines[6]
    assert ["books", "stopped"] in [line.split()[:2] for line in lines]


@pytest.mark.parametrize("width", [40, 60, 100, 160])
def test_every_width_shows_the_numbers_of_all_runs_and_no_line_is_wider(runs: Path, width: int):
    with RunFolder(runs / "zeta").locked():
        lines = lines_of(read_frame([runs]), width, None)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for part in ("zeta", "running", "10/100", "2.3457", "800 kB", "0.31", "2.1%", "45s", "books", "code", "4 ranks"):
        assert part in text


def test_runs_that_do_not_fit_the_terminal_are_counted(tmp_path: Path):
    for number in range(30):
        make_run(tmp_path / f"runs/run-{number:02d}")
    frame = read_frame([tmp_path / "runs"])
    picture = picture_of(frame, Console(width=100, height=12)).plain.splitlines()
    assert len(picture) == 12
    shown = sum(line.startswith("run-") for line in picture)
    assert picture[-1] == f"… {30 - shown} more runs"


def test_without_a_terminal_one_view_is_printed(runs: Path):
    code, printed = run_here("top", runs)
    assert code == 0 and printed.count("10/100") == 3
    assert run_here("top", runs / "none")[0] == 1
