"""Patches of a text: where a model or a rule starts them, their figures, and how they are shown."""

import json
import re
from html import unescape
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import byteloom
from pretrain.cli.app import app
from pretrain.evaluation.modes import Mode
from pretrain.evaluation.patches.figures import agreement, figures_of
from pretrain.evaluation.patches.finding import PatchedText, by_bytes, patches_of_model, patches_of_rule
from pretrain.evaluation.patches.page import colored, patches_page
from pretrain.evaluation.patches.segments import Segment, segments_of
from pretrain.evaluation.scores import EvaluationError
from pretrain.evaluation.surprise import visible
from pretrain.models import build_model, small_config
from pretrain.models.patching.rules import ByteClass, Fixed
from pretrain.models.patching.watching import SeenPatches
from tests.conftest import recipe_tree

TEXT = "The quick brown fox, ü and 日本語; jumps over the lazy dog. Again and again and again!\n".encode() * 2


def of_class(data: bytes) -> PatchedText:
    return patches_of_rule(ByteClass(len(data)), data)


@pytest.mark.parametrize("mode", ["windows", "sliding"])
def test_windows_of_a_model_have_the_patches_of_its_rule(mode: str):
    """A window begins with a patch of its own, so the first two bytes of each are not compared in mode windows."""
    model = build_model(small_config("spacebyte", patches=32)).eval()
    done: list[int] = []
    found = patches_of_model(model, TEXT, Mode(mode), 3, done.append)
    expected = of_class(TEXT).starts["0"]
    inner = np.arange(len(TEXT)) % model.sequence_length > 1 if mode == "windows" else np.arange(len(TEXT)) > 1
    assert (found.starts["0"] == expected)[inner].all()
    assert sum(done) == len(TEXT) and found.full_windows == {"0": 0}
    few = build_model(small_config("spacebyte", patches=3)).eval()
    crowded = figures_of(patches_of_model(few, TEXT, Mode(mode), 3))["0"]
    assert crowded.full_windows == 1 and crowded.patches < expected.sum()


def test_fixed_patches_of_megabyte_are_those_of_its_windows():
    model = build_model(small_config("megabyte")).eval()
    assert model.patch_size is not None
    found = patches_of_model(model, TEXT, Mode.windows, 4)
    assert np.array_equal(found.starts["0"], patches_of_rule(Fixed(len(TEXT), model.patch_size), TEXT).starts["0"])
    assert figures_of(found)["0"].full_windows is None
    with pytest.raises(EvaluationError, match="no patches"):
        patches_of_model(build_model(small_config("transformer")).eval(), TEXT, Mode.windows, 4)
    with pytest.raises(EvaluationError, match="windows or sliding"):
        patches_of_model(model, TEXT, Mode.strided, 4)


def test_stages_of_a_model_have_patches_of_patches():
    small = small_config("hnet").model_dump()
    inner = small["stages"][0] | {"patcher": {"name": "fixed", "size": 2}, "patches": 16}
    stages = [small["stages"][0] | {"patcher": {"name": "fixed", "size": 3}}, inner]
    found = patches_of_model(build_model(small_config("hnet", stages=stages)).eval(), TEXT, Mode.windows, 4)
    place = np.arange(len(TEXT)) % small["sequence_length"]
    assert np.array_equal(found.starts["0"], place % 3 == 0) and np.array_equal(found.starts["1"], place % 6 == 0)
    shown = [segment.stages for segment in segments_of(found, small["sequence_length"])]
    assert shown[:4] == [2, 1, 2, 1]


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=3, max_size=3))
@settings(max_examples=25)
def test_patches_of_patches_start_at_bytes(flags: list[list[bool]]):
    stages = {}
    for number, own in enumerate(flags):
        starts = torch.tensor([own])
        starts[:, 0] = True  # every stage of a row begins with a patch
        stages[str(number)] = SeenPatches(starts, starts, None)
    found, places = by_bytes(stages), list(range(6))
    for stage, seen in stages.items():
        places = [place for number, place in enumerate(places) if seen.starts[0, number]]
        assert found[stage][0].nonzero()[0].tolist() == places


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=12))
@settings(max_examples=50)
def test_agreement_counts_starts_at_places(pairs: list[tuple[bool, bool]]):
    starts, places = (np.array(each) for each in zip(*pairs, strict=True))
    exact, near = agreement(starts, places)
    own, marks = starts[1:].nonzero()[0].tolist(), places[1:].nonzero()[0].tolist()

    def share(of: list[int], at: list[int], distance: int) -> float:
        return sum(any(abs(a - b) <= distance for b in at) for a in of) / len(of) if of else float("nan")

    everywhere = list(range(len(pairs) - 1))
    for found, distance in ((exact, 0), (near, 1)):
        expected = [share(own, marks, distance), share(everywhere, marks, distance)]
        expected += [share(marks, own, distance), share(everywhere, own, distance)]
        assert list(vars(found).values()) == pytest.approx(expected, nan_ok=True)


@given(st.binary(min_size=1, max_size=40), st.integers(1, 40))
@example(b"\x80" * 40, 30)
@settings(max_examples=50)
def test_segments_are_the_text_and_its_patches(data: bytes, most: int):
    text = of_class(data)
    segments = list(segments_of(text, most))
    size = sum(each.size for each in segments)
    assert max(most - 3, 0) <= size <= most or size == len(data)  # whole characters
    shown = data[:size].decode("utf-8", "surrogateescape")
    assert "".join(each.text for each in segments) == "".join(map(visible, shown))
    assert len(segments) <= text.starts["0"][:size].sum()
    figures = figures_of(text)["0"]
    assert figures.patches == text.starts["0"].sum() == sum(figures.sizes.values())
    assert figures.bytes_per_patch * figures.patches == pytest.approx(len(data))
    assert figures.exact["byte classes"].precision in (1, pytest.approx(float("nan"), nan_ok=True))


@given(st.lists(st.integers(1, 2), min_size=2, max_size=20))
@settings(max_examples=25)
def test_neighbouring_patches_have_other_colors(levels: list[int]):
    segments = [Segment("a", level, place, 1, None) for place, level in enumerate(levels)]
    for stages in (1, 2):
        colors = [color for _, color in colored(segments, stages)]
        assert all(one != other for one, other in pairwise(colors))


def test_enrichment_is_the_surprisal_at_starts():
    starts = np.array([True, False, True, False])
    text = PatchedText(b"abcd", {"0": starts}, np.array([6.0, 2.0, 6.0, 2.0]), 1, {"0": 0})
    assert figures_of(text)["0"].enrichment == pytest.approx(6 / 4)


def test_page_shows_the_text_with_its_patches():
    text = of_class(TEXT)
    segments = list(segments_of(text, len(TEXT)))
    page = patches_page("<t>", "a summary", ["a remark"], segments, figures_of(text))
    body = page.split("<pre>")[1].split("</pre>")[0]
    assert unescape(re.sub("<[^>]+>", "", body)) == "".join(each.text for each in segments)
    assert body.count("<span") == len(segments)
    assert "<title>&lt;t&gt;</title>" in page and "src=" not in page and "http" not in page


@pytest.fixture(scope="module")
def run(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patches")
    recipe = folder / "recipe.yaml"
    model = small_config("spacebyte", patches=5).model_dump(mode="json")
    tree = recipe_tree(corpus_folder) | {"model": model, "report": {"every": 2}}
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return byteloom.train(recipe, run={"root": folder}, train={"steps": 2}, validation={"shards": None})


def invoke(*arguments: object, **environment: str) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"} | environment)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.slow
def test_command_shows_the_patches_of_a_run(run: Path, tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(TEXT)
    found = json.loads(invoke("patches", run, file, "--device", "cpu", "--json"))
    expected = byteloom.load(run, device="cpu").patches(TEXT)
    assert expected.bits is not None
    assert found["stages"]["0"]["starts"] == expected.starts["0"].nonzero()[0].tolist()
    assert found["bits_per_byte"] == pytest.approx(expected.bits.mean())
    invoke("patches", run, file, "--device", "cpu", "--html", tmp_path / "page.html")
    assert "over capacity" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_patches_of_a_run_are_in_its_journal_status_and_report(run: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "patches/0/bytes_per_patch" in line]
    assert len(steps) == 2 and all(step["patches/0/overflow_bytes"] > 0.03 for step in steps)
    (status,) = json.loads(invoke("status", run, "--json"))
    mean = sum(step["patches/0/bytes_per_patch"] for step in steps) / 2
    assert status["patches"]["0"]["bytes_per_patch"] == pytest.approx(mean)
    shown = invoke("status", run)
    assert "bytes/patch" in shown and f"{mean:.2f}" in shown and "after the last patch" in shown
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "after the last patch" in page and "Bytes per patch" in page


def test_command_shows_the_patches_of_a_rule(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"One two, three.")
    assert invoke("patches", file, "--rule", "byte_class").startswith("│One │two,│ three.\n")
    assert invoke("patches", file, "--rule", "fixed", "--size", 4).startswith("│One │two,│ thr│ee.\n")
    assert invoke("patches", file, "--rule", "fixed", "--size", 10**20).startswith("│One two, three.\n")
    in_colors = {"FORCE_COLOR": "1", "COLORTERM": "truecolor"}
    assert "\x1b[30;48;2;" in invoke("patches", file, "--rule", "byte_class", **in_colors)
    assert "│One │two" in invoke("patches", file, "--rule", "byte_class", **in_colors, NO_COLOR="1")
    rule = ["--rule", "entropy"]
    for wrong in (
        ["--rule", "fixed"],
        [file, "--rule", "byte_class"],
        ["--rule", "byte_class", "--threshold", 1],
        [file, "--size", 4],
        rule,
        [file, *rule],
        [file, *rule, "--bytes-per-patch", 4, "--threshold", 1],
        [],
    ):
        failed = CliRunner().invoke(app, ["patches", str(file), *map(str, wrong)])
        assert isinstance(failed.exception, EvaluationError), failed.output
