"""Transformer-XL's memory in real runs: its content, and resumption of a killed run bit for bit."""

import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data_pipeline.stream.reading import open_streams
from pretrain.checkpoint import read, verify
from pretrain.config.loading import load
from pretrain.distributed.fragments import whole
from tests.conftest import STDLIB, Run, prepare_corpus, recipe_tree
from tests.end_to_end.runs.test_resume import RunUnderTest, assert_same

T, M, ROWS = 32, 80, 80


@pytest.fixture
def recipe(tmp_path: Path, corpus_folder: Path) -> Path:
    """Return a recipe whose first epoch ends within the steps of a RunUnderTest."""
    prepare_corpus([STDLIB / "json"], tmp_path / "json", include=["*.py"], block_bytes=10_000)
    tree = recipe_tree(corpus_folder)
    sizes = {"sequence_length": T, "memory_length": M, "width": 16, "layers": 2, "heads": 2}
    tree["model"] = {"family": "transformer_xl", "dropout": 0.1, **sizes}
    tree["data"] = {"shards": str(tmp_path / "json"), "lanes": ROWS}
    tree["train"] = {"steps": 12, "global_batch": ROWS, "micro_batch": 20}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_killed_run_resumes_with_its_memory_bit_for_bit(recipe: Path, tmp_path: Path):
    reference, run = (RunUnderTest(recipe, tmp_path, name) for name in ("whole", "killed"))
    reference.finish()
    assert reference.numbers()[-1][1]["epoch"] > 1
    for low in (6, 12):
        code, _ = run.start_and_signal(signal.SIGKILL, random.randrange(low, low + 5))
        assert code == -signal.SIGKILL
    assert "resumes after step" in run.finish()
    assert_same(run, reference)
    assert {"memory/states", "memory/ids"} <= run.final_tensors().keys()


def test_checkpoint_memory_holds_the_last_ids_of_every_row_in_the_epoch(byteloom: Run, recipe: Path, tmp_path: Path):
    config = load(recipe)
    stream = open_streams(config.data, T)["corpus"]
    border = stream.order.sequences_per_lane
    assert border > 4
    byteloom("train", recipe, f"train.steps={border + 3}", "checkpoint.every=1", "checkpoint.keep=100")
    # A batch with rows of both epochs, which there is unless lanes divide the epoch, has no memory and leaves none.
    again = (1, 1, 2) if stream.sequences_per_epoch % ROWS else (1, 2, 3)
    for step, segments in ((1, 1), (2, 2), (border, 3), *zip(range(border + 1, border + 4), again, strict=True)):
        metadata = verify(tmp_path / f"runs/run/checkpoints/step-{step:08d}")
        kept = torch.empty(metadata.tensors["memory/ids"].shape)
        read(metadata, [whole("memory/ids", kept)])
        rows = [stream.read(np.arange(ROWS) + ROWS * (step - 1 - back)).ids for back in range(segments)]
        expected = np.concatenate([np.full((ROWS, M), -1), *reversed(rows)], 1)[:, -M:]
        np.testing.assert_array_equal(kept.numpy(), expected)


def test_corpus_with_fewer_sequences_than_rows_is_refused(byteloom: Run, recipe: Path, tmp_path: Path):
    refused = byteloom("train", recipe, "data.lanes=5000", "train.global_batch=5000", check=False)
    assert refused.returncode == 1
    assert "fewer than the 5000 rows of a batch" in refused.stderr
    assert not (tmp_path / "runs").exists()
