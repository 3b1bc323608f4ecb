"""Corpora, checkpoints and runs of an earlier version; fixtures/version_1/README.md says how they were made."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Run

FIXTURES = Path(__file__).parent / "fixtures/version_1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
TOLERANCE = dict.fromkeys(EXPECTED, 1e-5) | {"transformer": 3e-4}
"""Relative, of losses, because CPUs round differently. The transformer's optimizer is Muon. In that version it updated
queries, keys and values as one matrix."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES, tmp_path / "copy"))


def test_earlier_corpus_verifies_and_is_prepared_again_bit_for_bit(byteloom: Run, folder: Path):
    for part in ("train", "validation"):
        byteloom("verify", f"corpus/{part}", cwd=folder)
    sizes = ("--holdout", 0.15, "--block-bytes", 4000, "--shard-bytes", 16000)
    byteloom("prepare", "text", "--out", "again", *sizes, cwd=folder)
    files = sorted(path.relative_to(folder / "corpus") for path in (folder / "corpus").glob("*/*"))
    assert len(files) == 11
    for file in files:
        assert (folder / "again" / file).read_bytes() == (folder / "corpus" / file).read_bytes(), file


@pytest.mark.parametrize("family", EXPECTED)
def test_earlier_run_verifies_and_resumes_with_the_same_bytes_and_losses(byteloom: Run, folder: Path, family: str):
    checkpoints = folder / "runs" / family / "checkpoints"
    byteloom("checkpoint", "verify", checkpoints / "step-00000004", cwd=folder)
    done = byteloom("train", f"{family}.yaml", cwd=folder)
    assert "step-00000004" in done.stderr

    state = json.loads((checkpoints / "step-00000008/metadata.json").read_text(encoding="utf-8"))["state"]
    assert state["reading"]["digest"] == EXPECTED[family]["digest"]
    assert losses(folder / "runs" / family) == pytest.approx(EXPECTED[family]["bits_per_byte"], rel=TOLERANCE[family])


def test_earlier_run_without_a_checkpoint_begins_again_with_the_first_values_that_it_had(byteloom: Run, folder: Path):
    run = folder / "runs/transformer"
    shutil.rmtree(run / "checkpoints")
    byteloom("train", "transformer.yaml", cwd=folder)
    state = json.loads((run / "checkpoints/step-00000008/metadata.json").read_text(encoding="utf-8"))["state"]
    assert state["first_values"] == 1
    assert losses(run) == pytest.approx(EXPECTED["transformer"]["bits_per_byte"], rel=TOLERANCE["transformer"])


def test_new_run_and_its_checkpoints_record_the_version_of_their_first_values(byteloom: Run, folder: Path):
    byteloom("train", "transformer.yaml", "run.name=new", cwd=folder)
    run = folder / "runs/new"
    state = json.loads((run / "checkpoints/step-00000008/metadata.json").read_text(encoding="utf-8"))["state"]
    assert state["first_values"] == json.loads((run / "run.json").read_text(encoding="utf-8"))["first_values"] == 2
    (run / "run.json").unlink()
    byteloom("train", "transformer.yaml", "run.name=new", "train.steps=9", cwd=folder)
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["first_values"] == 2


def losses(run: Path) -> dict[str, float]:
    """Return the loss of each step, and the validation loss at step 0."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {str(row["step"]): row.get("train/bits_per_byte", row.get("validation/bits_per_byte")) for row in rows}
