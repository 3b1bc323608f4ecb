"""lm-evaluation-harness gets the numbers of the Python API, and tasks about bytes are sound."""

import importlib
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import byteloom
from byteloom.harness_tasks import CHANGES, TaskTextError, with_typos, write_tasks
from data_pipeline.vocabulary import SEPARATOR
from pretrain.models import build_model, model_config
from pretrain.training.weights.exports import write_export
from tests.commands import environment
from tests.conftest import STDLIB
from tests.pretrain.models.test_references import SMALL

TEXT = (STDLIB / "LICENSE.txt").read_text() if (STDLIB / "LICENSE.txt").exists() else (STDLIB / "this.py").read_text()
PAIRS = [
    ("", "ab"),
    ("a context", " of words"),
    ("a context that is longer than the model can read", "\xe9t\xe9"),
    ("b", ""),
]
PAIRS += [("c", "a continuation that is longer than a window of the model")]


def weights(folder: Path, name: str) -> Path:
    """Return an export of a model with random weights."""
    config = model_config({"family": name, **SMALL[name]})
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(value.shape, generator=generator) * 0.5
        for name, value in build_model(config).named_parameters()
    }
    recipe = {"model": config.model_dump(mode="json"), "data": {"separate_documents": True}}
    write_export(folder / "weights", values, recipe, {})
    return folder / "weights"


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance  # noqa: PLC0415 - it may be missing

    return [Instance(kind, {}, own, number) for number, own in enumerate(arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_harness_agrees_with_the_python_api(tmp_path: Path, name: str):
    pytest.importorskip("lm_eval")
    from byteloom.harness.model import ByteloomLM  # noqa: PLC0415 - it needs lm_eval

    folder = weights(tmp_path, name)
    own, harness = byteloom.load(folder), ByteloomLM(str(folder), batch_size=3)
    texts = ["a", "", "some words", "\xe9", TEXT[:200]]
    rolling = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    expected = [-own.bits(text.encode()).sum() * math.log(2) for text in texts]
    assert rolling == pytest.approx(expected, rel=1e-5)

    found = harness.loglikelihood(requests("loglikelihood", PAIRS))
    assert found[0][0] == pytest.approx(-own.bits(b"ab").sum() * math.log(2), rel=1e-5)
    row = torch.tensor([[SEPARATOR, *b"a context of words"]])
    expected = own.bits(b"a context of words", mode="memory")[9:].sum() * math.log(2) if name == "transformer_xl" else 0
    assert found[1][0] == pytest.approx(-(expected or float(own.module(row)[0, 10:].sum().detach())), rel=1e-5)
    assert found[3][0] == 0
    for (context, continuation), (_, is_greedy) in zip(PAIRS, found, strict=True):
        drawn = b"".join(own.generate(context.encode(), bytes=max(1, len(continuation.encode())), temperature=0))
        assert is_greedy == (not continuation or drawn == continuation.encode())
    greedy = b"".join(own.generate(b"ab", bytes=6, temperature=0)).decode("utf-8", "surrogateescape")
    [(_, is_greedy)] = harness.loglikelihood(requests("loglikelihood", [("ab", greedy)]))
    assert is_greedy


@pytest.mark.slow
def test_harness_generates_up_to_a_stop_sequence(tmp_path: Path):
    pytest.importorskip("lm_eval")
    from byteloom.harness.model import ByteloomLM  # noqa: PLC0415 - it needs lm_eval

    folder = weights(tmp_path, "transformer")
    own, harness = byteloom.load(folder), ByteloomLM(str(folder))
    drawn = b"".join(own.generate(b"prompt", bytes=12, temperature=0)).decode("utf-8", "surrogateescape")
    stop = drawn[4]
    contexts = [
        ("prompt", {"until": [stop], "max_gen_toks": 12}),
        ("longer prompt", {"max_gen_toks": 3}),
        ("prompt", {}),
    ]
    texts = harness.generate_until(requests("generate_until", contexts))
    shown = drawn[: drawn.index(stop)].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    assert texts[0] == shown
    assert texts[1] == b"".join(own.generate(b"longer prompt", bytes=3, temperature=0)).decode("utf-8", "replace")
    assert texts[2].startswith(shown) and len(texts[2]) > len(shown)


@pytest.mark.slow
def test_lm_eval_finds_the_registered_model_and_evaluates_tasks_about_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lm_eval = pytest.importorskip("lm_eval")
    importlib.import_module("byteloom.harness")
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = weights(tmp_path, "transformer")
    write_tasks(TEXT, tmp_path / "tasks", count=4)
    manager = tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    wanted = ["byteloom_typos", "byteloom_spell", "byteloom_spell_freely"]
    found = lm_eval.simple_evaluate("byteloom", f"run={folder}", wanted, task_manager=manager, bootstrap_iters=0)
    results = found["results"]
    bits = byteloom.load(folder).bits_of_documents(
        [json.loads(line)["text"].encode() for line in (tmp_path / "tasks/byteloom_typos.jsonl").open()]
    )
    assert results["byteloom_typos"]["bits_per_byte,none"] == pytest.approx(np.concatenate(bits).mean(), rel=1e-5)
    assert 0 <= results["byteloom_spell"]["acc,none"] <= 1
    assert results["byteloom_spell_freely"]["exact_match,strip"] == 0  # the weights are random


@pytest.mark.long
def test_unknown_task_is_one_line(tmp_path: Path):
    pytest.importorskip("lm_eval")
    command = [sys.executable, "-m", "pretrain.cli.entry", "harness", "run", weights(tmp_path, "transformer")]
    done = subprocess.run([*command, "--tasks", "nothing"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: lm_eval: Tasks not found: nothing")
    assert list(tmp_path.glob("byteloom-crash-*")) == []


@pytest.mark.long
def test_command_of_the_harness_evaluates_tasks_about_bytes(tmp_path: Path):
    pytest.importorskip("lm_eval")
    folder = weights(tmp_path, "transformer")
    names = write_tasks(TEXT, tmp_path / "tasks", count=4)
    env = {**environment(), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "pretrain.cli.entry", "harness", "run", folder, "--include_path", "tasks"]
    command += ["--tasks", "byteloom_bytes", "--output_path", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("out_*.json")
    results = json.loads(path.read_text())["results"]
    assert set(names) <= results.keys()
    lines = (tmp_path / "tasks/byteloom_upper.jsonl").read_text().splitlines()
    documents = [json.loads(line)["text"].encode() for line in lines]
    bits = np.concatenate(byteloom.load(folder).bits_of_documents(documents))
    assert results["byteloom_upper"]["bits_per_byte,none"] == pytest.approx(bits.mean(), rel=1e-5)


def test_questions_have_one_right_answer(tmp_path: Path):
    names = write_tasks(TEXT, tmp_path / "tasks", count=60)
    assert not os.path.lexists(tmp_path / "tasks.partial")
    labels = Counter[int]()
    for name in names[len(CHANGES) :]:
        for line in (tmp_path / f"tasks/{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert len(set(row["choices"])) == len(row["choices"]) in (2, 4)
            labels[row["label"]] += 1
            *examples, question = row["question"].split("\n")
            assert len(examples) == 4 and question.endswith((":", "?"))
            if name == "byteloom_spell":
                assert row["choices"][row["label"]] == " ".join(question.split('"')[1])
    assert min(labels[label] for label in range(4)) > 50  # no place of the right answer is a hint
    with pytest.raises(TaskTextError, match="1 passages and 4 different words"):
        write_tasks("four words are there only", tmp_path / "more")


def test_typos_change_about_a_twentieth_of_the_letters():
    text = "letters " * 2000
    changed = with_typos(text, random.Random(0))
    assert changed != text
    assert abs(sum(a != b for a, b in zip(text.split(), changed.split(), strict=False)) / 2000 - 1 + 0.95**7) < 0.05
    assert changed.count(" ") == text.count(" ")
