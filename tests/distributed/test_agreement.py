"""Agreement of real ranks on what they read, on faults, and on requests to stop."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.withdraw import withdraw
from data_pipeline.errors import CorpusError, DamagedCorpusError
from data_pipeline.stream.reading import Reading, open_streams, replay
from data_pipeline.stream.record import Record
from pretrain.checkpoint import CheckpointStore, read_metadata
from pretrain.config.loading import load
from pretrain.distributed.world import World
from pretrain.models import build_model, small_config
from pretrain.training.agreement import Vote, agree_on_corpora
from pretrain.training.loop import train
from pretrain.training.run import TrainingError
from pretrain.training.stop import StoppedError, StopRequest
from pretrain.training.weights.exports import write_export
from tests.conftest import recipe_tree
from tests.data_pipeline.corpora import damage_block, write_corpus
from tests.distributed.ranks import on_ranks


def vote(world: World, kind: str) -> tuple[list[int], str]:
    """Vote over ten items; rank 1 cannot read item 6, or is asked to stop there."""
    stop, used = StopRequest(), list[int]()

    def items() -> Iterator[int]:
        for number in range(10):
            if world.rank == 1 and number == 6 and kind == "fault":
                raise CorpusError("the disk is gone")
            if world.rank == 1 and number == 6 and kind == "stop":
                stop.request(signal.SIGTERM)
            yield number

    try:
        used.extend(Vote(stop, world).agreed(items()))
    except (TrainingError, StoppedError) as error:
        return used, f"{type(error).__name__}: {error}"
    return used, ""


def agree(world: World, folders: list[str], other: str) -> dict[str, Any]:
    """Agree on corpora that the ranks see differently, and vote."""
    with Corpus(folders[world.rank]) as corpus, Corpus(folders[0] if world.rank else other) as wrong:
        agree_on_corpora([corpus], world)
        try:
            agree_on_corpora([corpus, wrong], world)
        except DamagedCorpusError as error:
            refusal = str(error).replace(wrong.location, "it")
        return {
            "withdrawn": [entry.key for entry in corpus.withdrawn],
            "refusal": refusal,
            "votes": {kind: vote(world, kind) for kind in ("none", "fault", "stop")},
        }


def test_ranks_agree_on_corpora_on_withdrawn_documents_and_in_votes(tmp_path: Path):
    """Documents are withdrawn after rank 0 reads the list and before rank 1 does; all ranks use the list of rank 0."""
    write_corpus(tmp_path / "0").close()
    write_corpus(tmp_path / "other", block_bytes=7_000).close()
    with Corpus(tmp_path / "0") as corpus:
        withdraw(corpus, ["long"], 1, lambda done, total: None)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    with Corpus(tmp_path / "1") as corpus:
        withdraw(corpus, ["email/header.py"], 1, lambda done, total: None)
        assert {entry.key for entry in Corpus(tmp_path / "1").withdrawn} == {"long", "email/header.py"}
    first, second = on_ranks(2, agree, [str(tmp_path / "0"), str(tmp_path / "1")], str(tmp_path / "other"))
    assert first == second
    assert set(first["withdrawn"]) == {"long"}
    assert first["refusal"].startswith("it is another corpus on rank 1 than on rank 0: content sha256 ")
    assert first["votes"]["none"] == (list(range(10)), "")
    used, fault = first["votes"]["fault"]
    assert used == list(range(len(used))) and len(used) <= 6
    assert fault == "TrainingError: rank 1 of 2: the disk is gone"
    used, fault = first["votes"]["stop"]
    assert used == list(range(len(used))) and len(used) <= 6
    assert fault == "StoppedError: SIGTERM"


def train_in(world: World, folders: list[str], recipe: str) -> tuple[int | None, str]:
    """Train in this rank's own folder with its own copy of the corpora; return the exit code and the error."""
    os.chdir(folders[world.rank])
    try:
        return train(load(Path(recipe)), world), ""
    except TrainingError as error:
        return None, str(error)


def test_ranks_train_around_a_block_that_one_of_them_cannot_read(corpus_folder: Path, tmp_path: Path):
    """The record holds the hole, and a replay on the intact corpus proves the run. Validation stops on all ranks.

    Documents withdrawn only in rank 1's list are read, because rank 0's list counts.
    """
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        shutil.copytree(corpus_folder, folder / "library")
    tree: Any = recipe_tree(corpus_folder)
    tree["run"] = {"root": str(tmp_path), "name": "run"}
    tree["data"] = {"shards": "library/train", "lanes": 24, "bad_blocks": 1}
    tree["validation"] = {"shards": None}
    tree["train"] = {"steps": 3, "global_batch": 8, "micro_batch": 2}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    config = load(recipe, [f"data.shards={corpus_folder}/train"])
    length = config.model.sequence_length
    order = open_streams(config.data, length)["corpus"].order
    block = order.locate(22)[0].block  # a row of rank 1's second micro-batch in step 3, on which step 2 votes
    assert all(part.block != block for sequence in range(16) for part in order.locate(sequence))
    with Corpus(folders[1] / "library/train") as grown:  # as if the list had grown before rank 1 read it
        keys = {part.key for number in range(len(grown)) for part in grown.read(number).slices}
        withdraw(grown, sorted(keys)[::2], 2, lambda done, total: None)
    damage_block(folders[1] / "library/train", block)
    assert on_ranks(2, train_in, list(map(str, folders)), str(recipe)) == [(0, "")] * 2
    state = read_metadata(CheckpointStore(tmp_path / "run/checkpoints", keep=1).committed()[-1]).state
    [(hole, since)] = state["reading"]["holes"]["corpus"]
    assert hole == block and 16 <= since <= 22
    assert state["reading"]["withdrawn"] == {"corpus": []}
    replayed = Reading(config.data, open_streams(config.data, length), Record.from_state(state["reading"]), None)
    assert replay(replayed, 1, lambda done: None) == state["reading"]["digest"]

    tree["run"]["name"] = "validated"
    tree["validation"] = {"shards": "library/validation", "every": 2}
    recipe.write_text(yaml.safe_dump(tree))
    damage_block(folders[1] / "library/validation", 0)
    [first, second] = on_ranks(2, train_in, list(map(str, folders)), str(recipe))
    assert first == second
    assert first[0] is None
    assert first[1].startswith("rank 1 of 2: block 000000-000000 of ")


def train_each(world: World, folders: list[str], recipes: list[str]) -> list[tuple[int | None, str]]:
    """Train several recipes, one after another."""
    return [train_in(world, folders, recipe) for recipe in recipes]


def test_all_ranks_refuse_a_frozen_model_that_one_of_them_lacks(corpus_folder: Path, tmp_path: Path):
    """Rank 1 has no export, a damaged one, or another one. Each refusal is the same on all ranks."""
    folders = [tmp_path / "0", tmp_path / "1"]
    places = ("missing", "damaged", "other")
    for folder in folders:
        for place in places:
            torch.manual_seed(1 if place == "other" and folder.name == "1" else 0)
            config = small_config("transformer")
            weights = {name: value.detach() for name, value in build_model(config).named_parameters()}
            write_export(folder / place, weights, {"model": config.model_dump(mode="json")}, {})
    shutil.rmtree(folders[1] / "missing")
    (folders[1] / "damaged/model.safetensors").write_bytes(b"damaged")
    recipes = []
    for place in places:
        tree: Any = recipe_tree(corpus_folder)
        tree["run"] = {"root": str(tmp_path / "runs"), "name": place}
        patcher = {"name": "entropy", "model": place, "threshold": 5.0}
        tree["model"] = {"family": "blt", **small_config("blt").model_dump(mode="json"), "patcher": patcher}
        tree["train"] = {"steps": 1, "global_batch": 2, "micro_batch": 1}
        recipes.append(tmp_path / f"{place}.yaml")
        recipes[-1].write_text(yaml.safe_dump(tree))
    first, second = on_ranks(2, train_each, list(map(str, folders)), list(map(str, recipes)))
    assert first == second
    missing, damaged, other = first
    assert missing[1].startswith("rank 1 of 2: missing is no export ([Errno 2] No such file or directory")
    assert damaged[1].startswith("rank 1 of 2: damaged/model.safetensors is not the file that card.json has")
    assert other[1].startswith("rank 1 was started with another recipe than rank 0: model.patcher.digest: ")
