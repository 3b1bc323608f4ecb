"""Tables at 60, 80 and 120 columns and in a pipe: no value is truncated and no line is too long.

`python -m tests.pretrain.terminal.test_tables` rewrites the expected text.
"""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from data_pipeline.preparation.prepare import PrepareReport, SourceReport
from data_pipeline.preparation.report import DocumentKind, LeftOutKind
from pretrain.cli.corpora.inspect import corpus_table, row_table
from pretrain.cli.corpora.prepare import kinds_table, left_out_table
from pretrain.cli.models.estimate import catalogue, estimate_table
from pretrain.cli.runs.checkpoints import contents_table, list_table, tensors_table
from pretrain.cli.runs.status import status_table
from pretrain.config.catalogue import CatalogueEntry
from pretrain.estimate.activations import ActivationLine, ActivationLines
from pretrain.estimate.states import ShardedStates, States
from pretrain.evaluation.beginning import Beginning
from pretrain.evaluation.modes import Mode
from pretrain.evaluation.report import EvaluationReport
from pretrain.evaluation.scores import UNITS_PER_NAT, Evaluation, Score
from pretrain.terminal.tables import FOLDED_WIDTH, Table, figure, fold, print_json
from pretrain.training.run_status import RunStatus

EXPECTED = Path(__file__).parent / "tables"
WIDTHS = (60, 80, 120, None)


def estimate() -> Table:
    gib = 2**30
    sharded_states = [
        ShardedStates("ddp", States(0, 3 * gib, 3 * gib, 7 * gib), gathers=False),
        ShardedStates("zero-3, fsdp2", States(gib // 3, gib // 7, gib // 1000, gib // 100), gathers=True),
    ]
    lines = ActivationLine(((1, 11 * gib), (2, 22 * gib))), ActivationLine(((1, gib), (2, 2 * gib)))
    plain, checkpointed = (ActivationLines(line, line) for line in lines)
    return estimate_table(
        "configs/megabyte/text.yaml on 8 GPUs of 16 GiB each", sharded_states, plain, checkpointed, 1, 14 * gib
    )


def models() -> list[Table]:
    small = CatalogueEntry(
        Path("configs/megabyte/text-without-cross-patch.yaml"), "megabyte", "text of PG-19", "758M + 262M",
        "nominal sizes of the paper's own", "0.687 bits per byte", 931_100_000, 645.3e6, 14_900_000_000, None,
    )  # fmt: skip
    large = replace(
        small, path=Path("configs/megabyte/debug.yaml"), task=None, printed=None, printed_remark=None, result=None,
        parameters=412_345, flops_per_byte=812_345.0, states=6_597_520,
    )  # fmt: skip
    return list(catalogue([small, large], Path("configs")))


def evaluation() -> Table:
    scores = [
        Score(int(9e9 * UNITS_PER_NAT), 12_345_678_901, 1_234_567),
        Score(int(2e3 * UNITS_PER_NAT), 4_096, 1),
    ]
    groups = {"books/of/a/folder/with-a-rather-long-name": scores[0], "code": scores[1]}
    report = EvaluationReport(
        "runs/books/checkpoints/step-00090000", "/data/corpora/books/validation", Mode.windows, 8192, 8192,
        Beginning.start, Evaluation(groups), words=3_200_000_000, words_of_groups={"code": 512},
    )  # fmt: skip
    return report.table()


def status() -> Table:
    running = RunStatus(
        run="runs/books-learning_rate-3e-4-seed-1", recipe="megabyte/text",
        state="running", reason="", job="4711", process=None, nodes="n1",
        step=123_456, steps=1_000_000, bits_per_byte=1.23456, validation_bits_per_byte=1.3456,
        bytes_per_second=41_234_567.0, seconds_left=360_000.0, checkpoint_step=123_000, checkpoint_seconds=754.0,
        starts=1, restarts=3, why="", history=[], problems=[], ancestry=[], rollbacks=[], coverage={},
        slow_ranks=[],
    )  # fmt: skip
    queued = replace(
        running, run="runs/new", state="queued", step=0, steps=None, bits_per_byte=None, validation_bits_per_byte=None,
        bytes_per_second=None, seconds_left=None, checkpoint_step=None, checkpoint_seconds=None,
    )  # fmt: skip
    return status_table([running, queued])


def checkpoints() -> Table:
    whole = {
        "step": 90_000, "written": "2026-02-03T04:05:06+00:00", "fault": None, "bytes": 11_234_567_890, "ranks": 1024,
        "engine": "fsdp", "values": "finite",
    }  # fmt: skip
    fault = "runs/books/checkpoints/step-00091000/metadata.json is damaged: it does not have its digest"
    return list_table("runs/books", [whole, {"step": 91_000, "written": "", "fault": fault}])


def checkpoint() -> Any:
    """Return the metadata that the tables of a checkpoint read."""
    shapes = {"model/global_model.blocks.13.feed_forward.up.weight": (8192, 2048), "exp_avg/head.weight": (258, 1024)}
    return SimpleNamespace(
        folder=Path("/scratch/runs/books/checkpoints/step-00090000"),
        tensors={name: SimpleNamespace(shape=shape) for name, shape in shapes.items()},
        not_finite={},
        state={
            "reading": {"step": 90_000, "next_sequence": 4_320_000},
            "config": {"train": {"steps": 100_000}, "model": {"family": "megabyte"}, "engine": {"name": "fsdp"}},
            "fingerprint": "b3:" + "0123456789abcdef" * 4,
            "environment": {"torch": "2.13.0", "device": "NVIDIA H100 80GB HBM3"},
        },
    )


def corpus() -> Table:
    found = {
        "documents": 1_234_567, "raw_bytes": 12_345_678_901, "blocks": 11_774, "largest_block": 1_048_576,
        "modalities": ["text", "image"], "shards": 24, "stored_bytes": 4_345_678_901, "withdrawn": 1,
        "content_sha256": "0123456789abcdef" * 4,
    }  # fmt: skip
    return corpus_table("/data/corpora/books/train", found)


def row() -> Table:
    origin = {
        "start": 0, "length": 8192, "key": "books/shelf-12/the-first-book-of-a-long-series.txt", "masked": False,
        "document_start": 1_234_567, "block": "block 000012-000345 of shard-000012.tar",
    }  # fmt: skip
    second = origin | {"start": 8193, "length": 100, "masked": True, "document_start": 0}
    return row_table(
        {
            "step": 7,
            "row": 5,
            "sequence": 41_000_000,
            "number": 41_000_000,
            "source": "corpus",
            "corpus": "/data/corpora/books/train",
            "origins": [origin, second],
        }
    )


def left_out() -> list[Table]:
    source = SourceReport("https://data.example.org/crawl/2026-02/part-00001.tar.zst", 10, 1000)
    source.left_out = Counter({"damaged": 12_345, "empty": 1, "over the limit": 7})
    names = [f"crawl/2026-02/part-{number:05d}.jsonl.gz#000000000" for number in range(3)]
    rows = [LeftOutKind(".jsonl.gz", "damaged", 12_345, names), LeftOutKind("", "empty", 1, ["crawl/empty"])]
    table = left_out_table(PrepareReport({}, [""], [source], [], rows), Path("/data/corpora/crawl"))
    assert table is not None
    return [table]


def kinds() -> list[Table]:
    found = [
        DocumentKind(".jsonl.gz", "text", 41_000_000, 98_000_000_000, ["crawl/part-00001.jsonl.gz#000000000"]),
        DocumentKind(".png", "image", 2, 1_572_864, ["crawl/logo.png", "crawl/deep/picture.png"]),
        *(DocumentKind(f".{number}", "binary", 1, 1, [f"crawl/x.{number}"]) for number in range(20)),
    ]
    table = kinds_table(PrepareReport({}, [""], [], found))
    assert table is not None
    return [table]


TABLES = {
    "estimate": lambda: [estimate()],
    "models": models,
    "evaluation": lambda: [evaluation()],
    "status": lambda: [status()],
    "checkpoints": lambda: [checkpoints()],
    "checkpoint": lambda: [contents_table(checkpoint()), tensors_table(checkpoint())],
    "corpus": lambda: [corpus()],
    "row": lambda: [row()],
    "left-out": left_out,
    "kinds": kinds,
}


def shown(name: str) -> str:
    """Return the tables of a name at each width."""
    text = []
    for width in WIDTHS:
        text.append(f"==== {f'{width} columns' if width else 'a pipe'}")
        text += [line for table in TABLES[name]() for line in table.lines(width)]
    return "\n".join(text) + "\n"


@pytest.mark.parametrize("name", TABLES)
def test_table_has_the_expected_text_at_each_width(name: str):
    assert shown(name) == (EXPECTED / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_table_holds_every_complete_value_within_the_width(name: str, width: int | None):
    for table in TABLES[name]():
        check_law(table, width)


names = st.text(st.sampled_from("abcdefgh-_/. 字é"), max_size=70)
numbers = st.integers(-(10**12), 10**12).map("{:,}".format)


@pytest.mark.slow
@given(
    st.lists(st.tuples(names, names, numbers, numbers, names, numbers), max_size=4),
    st.sampled_from([40, 60, 80, 120, None]),
)
def test_any_table_holds_every_complete_value_within_the_width(rows: list[tuple[str, ...]], width: int | None):
    columns = ["first", "second", "third", "fourth", "fifth", "sixth"]
    table = Table("a title of some words", columns, numbers=["third", "fourth", "sixth"])
    for cells in rows:
        table.add_row(*cells)
    check_law(table, width)


def check_law(table: Table, width: int | None) -> None:
    """Check that numbers and text between marks are not split, and that no line is too long."""
    lines = table.lines(width)
    text = "\n".join(lines)
    assert "…" not in text
    assert width is None or max(map(cell_len, lines)) <= width
    for cells in (row for row in table._rows if isinstance(row, Sequence)):
        for column, cell in zip(table._columns, cells, strict=True):
            if column.is_number or width is None:
                assert cell.strip() in text
            else:
                pieces = re.findall(r"[^ \-_/,.;:]+", cell)
                assert all(piece in text for piece in pieces if cell_len(piece) <= FOLDED_WIDTH // 2), cell


@given(names, st.integers(2, 30))
def test_folded_text_keeps_every_character_except_spaces(text: str, width: int):
    lines = fold(text, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(cell_len(line) <= width for line in lines)


def test_figure_has_at_most_three_digits_and_nine_characters():
    expected = {0.0: "0", 0.00123: "0.00123", 0.5: "0.500", 12.34: "12.3", 99.96: "100", 931.1: "931"}
    expected |= {1234.5: "1,234", 999_999.0: "999,999", 1e6: "1.00e+06", 1e300: "1.00e+300", 1e-9: "1.00e-09"}
    assert {number: figure(number) for number in expected} == expected


def test_json_has_null_for_infinity_and_nan(capsys: pytest.CaptureFixture[str]):
    print_json({"perplexity": float("inf"), "bits": [float("nan"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "bits": [None, 1.5]}


PRINTED = """
from pretrain.terminal.tables import Table
table = Table("a title", ["name", *"abcdefgh"], numbers="abcdefgh")
table.add_row("a name with a \\x1b character", *["1,234,567,890"] * 8)
table.print()
"""


@pytest.mark.slow
def test_table_fits_a_terminal_and_is_not_folded_in_a_pipe():
    command = [sys.executable, "-c", PRINTED]
    piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(piped) == 4
    assert piped[3] == "a name with a \\x1b character" + "  1,234,567,890" * 8
    own_end, terminal_end = pty.openpty()
    fcntl.ioctl(terminal_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    without_width = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    terminal = without_width | {"TERM": "xterm"}
    process = subprocess.Popen(command, stdout=terminal_end, env=terminal)
    os.close(terminal_end)
    text = b""
    while chunk := _read(own_end):
        text += chunk
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()
    assert max(map(len, lines)) <= 60
    assert " ".join(lines).count("1,234,567,890") == 8


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux raises this once the other end is closed
        return b""


if __name__ == "__main__":
    EXPECTED.mkdir(exist_ok=True)
    for name in TABLES:
        (EXPECTED / f"{name}.txt").write_text(shown(name), encoding="utf-8")
