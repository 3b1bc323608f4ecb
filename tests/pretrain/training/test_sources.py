"""Corpora of a run: a source added at a stage, and named validation corpora."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import CorpusError
from pretrain.checkpoint import CheckpointError, CheckpointStore, read_metadata
from pretrain.cli.corpora.inspect import past_reading
from pretrain.config.loading import load
from pretrain.evaluation.config import ValidationConfig
from pretrain.training.loop import train
from tests.conftest import recipe_tree


def train_tree(tree: Any, folder: Path) -> list[dict[str, float]]:
    """Train a recipe in this process; return the lines of metrics.jsonl."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert train(load(folder / "recipe.yaml")) == 0
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def last_state(folder: Path) -> Any:
    return read_metadata(CheckpointStore(folder / "run/checkpoints", keep=1).committed()[-1]).state


@pytest.mark.slow
@pytest.mark.parametrize("first_name", ["books", "corpus"])
def test_source_is_added_at_a_stage(corpus_folder: Path, tmp_path: Path, first_name: str):
    """A source is added to a run of one corpus or of a mixture; a source named corpus continues `data.shards`."""
    tree: Any = recipe_tree(corpus_folder)
    tree["run"] = {"root": str(tmp_path), "name": "run"}
    tree["validation"] = {}
    first = {"shards": str(corpus_folder / "train"), "weight": 1}
    tree["data"] = {"mixture": {first_name: first}} if first_name == "books" else {"shards": first["shards"]}
    tree["data"]["lanes"] = 8
    tree["train"]["steps"] = 2
    train_tree(tree, tmp_path)

    code = {"shards": str(corpus_folder / "validation"), "weight": 0}
    tree["data"] = {"mixture": {first_name: first, "code": code}, "lanes": 8}
    tree["train"]["steps"] = 3
    assert [line["epoch/code"] for line in train_tree(tree, tmp_path)[2:]] == [0]
    tree["data"]["stages"] = [{"step": 4, "weights": {"code": 1}}]
    tree["train"]["steps"] = 6
    lines = train_tree(tree, tmp_path)
    assert [line["epoch/code"] > 0 for line in lines[2:]] == [False, False, True, True]

    state = last_state(tmp_path)
    rows = tree["train"]["global_batch"]
    before = {first_name: 1.0, "code": 0.0}
    assert state["reading"]["stages"] == [[0, 0, before], [4, 4 * rows, {first_name: 1.0, "code": 1.0}]]
    reading = past_reading(str(tmp_path / "run"), []).reading
    assert reading.mixture.schedule.counters(6 * rows) == {first_name: 5 * rows, "code": rows}

    tree["train"]["steps"] = 7
    tree["data"]["mixture"]["code"] = code | {"weight": 1}
    with pytest.raises(CorpusError, match=r"the run read with the weights .*Restore the old weights"):
        train_tree(tree, tmp_path)
    tree["data"] = {"mixture": {first_name: first}, "lanes": 8}
    with pytest.raises(CheckpointError, match="reads other bytes"):
        train_tree(tree, tmp_path)


@pytest.mark.slow
def test_each_validation_corpus_has_its_own_metric(corpus_folder: Path, mixed: Corpus, tmp_path: Path):
    tree: Any = recipe_tree(corpus_folder)
    tree["run"] = {"root": str(tmp_path), "name": "run"}
    corpora = {"books": corpus_folder / "validation", "code": mixed.location}
    tree["validation"] = {"corpora": {name: str(path) for name, path in corpora.items()}, "every": 2}
    tree["train"]["steps"] = 1
    first, last = train_tree(tree, tmp_path)
    names = {"validation/bits_per_byte", "validation/books/bits_per_byte", "validation/code/bits_per_byte"}
    sizes = {name: Corpus(path).raw_bytes for name, path in corpora.items()}
    for line in (first, last):
        assert {name for name in line if name.startswith("validation")} == names
        bits = sum(line[f"validation/{name}/bits_per_byte"] * size for name, size in sizes.items())
        assert math.isclose(line["validation/bits_per_byte"], bits / sum(sizes.values()), rel_tol=1e-12)


@pytest.mark.parametrize(
    ("node", "fault"),
    [
        ({"shards": "a", "corpora": {"b": "b"}}, "name either shards, a corpus, or corpora"),
        ({"corpora": {"a/b": "b"}}, "should match pattern"),
        ({"corpora": {"a": "b"}, "shards_sha256": "0" * 64}, "each of corpora has its own shards_sha256"),
        ({"corpora": {"a": {"shards": "b", "shards_sha256": "0"}}}, "corpora.a.shards_sha256"),
        ({"corpora": {"a": {"shards_sha256": "0" * 64}}}, "corpora.a.shards"),
    ],
)
def test_contradictory_validation_corpora_are_refused(node: Any, fault: str):
    with pytest.raises(ValidationError, match=fault):
        ValidationConfig.model_validate(node)
