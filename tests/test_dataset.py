"""Rows of a run as a dataset of PyTorch: the same for any number of workers, and resumed from any place."""

import json
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data._utils.worker import WorkerInfo

import byteloom
from byteloom.dataset import DatasetError
from tests.conftest import recipe_tree

LOADERS = """
import sys, torch
from itertools import islice
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
import byteloom

dataset = lambda: byteloom.StreamDataset(sys.argv[1], micro_batch=2, last_step=4)
ids = lambda items, most=None: torch.stack([item["input_ids"] for item in islice(items, most)])
everything = ids(dataset())
assert torch.equal(ids(DataLoader(dataset(), batch_size=None, num_workers=2)), everything)
for workers, taken in ((0, 5), (2, 1), (2, 4)):
    first, again = (StatefulDataLoader(dataset(), batch_size=None, num_workers=workers) for _ in range(2))
    assert torch.equal(ids(first, taken), everything[:taken])
    again.load_state_dict(first.state_dict())
    assert torch.equal(ids(again), everything[taken:])
"""
"""Program with real worker processes."""


@pytest.fixture
def recipe(tmp_path: Path, corpus_folder: Path) -> Path:
    """Return a recipe with steps of 6 rows."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(corpus_folder)))
    return path


def ids(items: Any, most: int | None = None) -> torch.Tensor:
    return torch.stack([item["input_ids"] for item in islice(items, most)])


def test_items_of_all_ranks_are_the_rows_of_the_steps(recipe: Path):
    ranks = [byteloom.StreamDataset(recipe, micro_batch=1, rank=r, world_size=3, last_step=3) for r in range(3)]
    of_ranks = [ids(rank) for rank in ranks]  # (6 items, 1, T) each
    with byteloom.Stream(recipe) as stream:
        for step in (1, 2, 3):
            own = torch.stack([items[2 * step - 2 : 2 * step] for items in of_ranks], 1)
            assert torch.equal(own.flatten(0, 2), stream.tensor(step))
    steps = [item["step"] for item in ranks[0]]
    assert steps == [1, 1, 2, 2, 3, 3]


def test_labels_ignore_padding(recipe: Path):
    changes = {"data": {"packing": "document"}, "model": {"sequence_length": 4096}}
    item = next(iter(byteloom.StreamDataset(recipe, **changes)))  # most documents are shorter
    padding = item["input_ids"] == 257
    assert padding.any() and not padding.all()
    assert torch.equal(item["labels"] == -100, padding)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_rows_are_the_same_for_any_number_of_workers(recipe: Path, workers: int, monkeypatch: pytest.MonkeyPatch):
    dataset = byteloom.StreamDataset(recipe, micro_batch=2, last_step=3)
    dataset.load_state_dict({"next": [1, 2], "worker": 0, "workers": 1})
    everything = ids(dataset)
    of_workers = []
    for worker in range(workers):
        info = WorkerInfo(id=worker, num_workers=workers, seed=0, dataset=dataset)
        monkeypatch.setattr("torch.utils.data._utils.worker._worker_info", info)
        of_workers.append([item["input_ids"] for item in dataset])
    in_turn = [items[turn] for turn in range(len(everything)) for items in of_workers if turn < len(items)]
    assert torch.equal(torch.stack(in_turn), everything)


def test_state_resumes_at_the_next_item(recipe: Path):
    dataset = byteloom.StreamDataset(recipe, micro_batch=2, last_step=4)
    everything = ids(dataset)
    dataset = byteloom.StreamDataset(recipe, micro_batch=2, last_step=4)
    for _ in islice(dataset, 5):
        state = json.loads(json.dumps(dataset.state_dict()))
    again = pickle.loads(pickle.dumps(byteloom.StreamDataset(recipe, micro_batch=2, last_step=4)))
    again.load_state_dict(state)
    assert torch.equal(ids(again), everything[5:])
    later = byteloom.StreamDataset(recipe, micro_batch=3, first_step=3, last_step=4)
    assert torch.equal(ids(later).flatten(0, 1), everything[6:].flatten(0, 1))


def test_loaders_with_worker_processes_have_the_same_rows_and_resume(recipe: Path):
    pytest.importorskip("torchdata.stateful_dataloader")
    done = subprocess.run([sys.executable, "-c", LOADERS, recipe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_uneven_ranks_and_foreign_states_are_refused(recipe: Path):
    with pytest.raises(
        DatasetError, match="a step has 6 rows, which are no whole number of micro-batches of 2 for each"
    ):
        next(iter(byteloom.StreamDataset(recipe, micro_batch=2, rank=0, world_size=2)))
    dataset = byteloom.StreamDataset(recipe)
    with pytest.raises(DatasetError, match="is no state of a StreamDataset"):
        dataset.load_state_dict({"next": 3})
    dataset.load_state_dict({"next": [1, 0], "worker": 1, "workers": 2})
    with pytest.raises(DatasetError, match="that of worker 1 of 2"):
        next(iter(dataset))
    with pytest.raises(DatasetError, match="rank is 2"):
        byteloom.StreamDataset(recipe, rank=2, world_size=2)
