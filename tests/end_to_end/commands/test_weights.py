"""Weights exported to other programs, loaded again, and used to initialize new runs as the recipe says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from pretrain.checkpoint import CheckpointError, verify
from pretrain.cli.app import app
from pretrain.models import build_model, model_config
from pretrain.training.weights import exports, find_checkpoint
from tests.conftest import recipe_tree
from tests.distributed.parity import content, newest
from tests.distributed.starts import start, train


def tree_of(corpus: Path, root: Path, name: str, **initialize: object) -> Any:
    tree: Any = recipe_tree(corpus)
    tree["run"] = {"root": str(root), "name": name}
    if initialize:
        tree["optimizer"]["schedule"] = {"warmup_steps": 0}
        tree["initialize"] = {key: str(value) if key == "weights" else value for key, value in initialize.items()}
    return tree


@pytest.fixture(scope="module")
def run(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a run of twelve steps on two ranks with sharded masters and moments, which tests only read."""
    folder = tmp_path_factory.mktemp("trained")
    tree = tree_of(corpus_folder, folder, "run")
    tree["engine"]["name"] = "zero3"
    train(tree, folder, ranks=2)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    output = invoke("checkpoint", "export", run, "--out", run.parent / "exported")
    assert "parameters of step 12 in model.safetensors" in output
    return run.parent / "exported"


def invoke(*arguments: object) -> str:
    """Run a command that succeeds and return its output."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


def journal(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def masters(checkpoint: Path) -> dict[str, bytes]:
    return {name.removeprefix("model/"): b for name, b in content(checkpoint).items() if name.startswith("model/")}


def test_export_holds_the_master_weights(run: Path, exported: Path):
    tensors = load_file(exported / "model.safetensors")
    assert {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} == masters(newest(run / "checkpoints"))


def test_card_describes_the_model_and_its_origin(run: Path, exported: Path):
    card = json.loads((exported / "card.json").read_text())
    state = verify(newest(run / "checkpoints")).state
    last = journal(run)[-1]
    model = build_model(model_config(card["model"]))
    assert (card["architecture"], card["step"], card["sequences"]) == ("megabyte", 12, 72)
    assert card["parameters"] == model.parameter_count()
    assert card["bits_per_byte"] == {name: last[f"{name}/bits_per_byte"] for name in ("train", "validation")}
    assert card["corpus"]["fingerprint"] == state["fingerprint"]
    assert card["environment"]["version.torch"] == torch.__version__
    assert model.load_state_dict(load_file(exported / "model.safetensors"), strict=False).unexpected_keys == []


def test_export_scores_like_its_checkpoint(run: Path, exported: Path, corpus_folder: Path):
    scores = []
    for source in (run, exported):
        shown = CliRunner().invoke(app, ["eval", str(source), str(corpus_folder / "validation"), "--json"])
        scores.append(json.loads(shown.stdout)["total"])
    assert scores[0] == scores[1]


def test_export_for_transformers_has_the_measured_results(run: Path, corpus_folder: Path, tmp_path: Path):
    measured = json.loads(
        CliRunner().invoke(app, ["eval", str(run), str(corpus_folder / "validation"), "--json"]).stdout
    )
    output = invoke("export", run, "--as", "hf", "--out", tmp_path / "hub")
    assert "measured result" in output
    head = yaml.safe_load((tmp_path / "hub/README.md").read_text().split("---\n")[1])
    values = [result["metrics"][0]["value"] for result in head["model-index"][0]["results"]]
    assert measured["total"]["bits_per_byte"] in values
    again = CliRunner().invoke(app, ["eval", str(tmp_path / "hub"), str(corpus_folder / "validation"), "--json"])
    assert json.loads(again.stdout)["total"] == measured["total"]


def test_large_export_has_several_files(run: Path, exported: Path, tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "SHARD_BYTES", 30_000)
        exports.export(find_checkpoint(run), tmp_path / "out", {})
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    whole, parts = (find_checkpoint(folder) for folder in (exported, tmp_path / "out"))
    assert whole.tensors.keys() == parts.tensors.keys()


def test_damaged_export_is_refused(exported: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("card.json", "model.safetensors"):
        (copy / name).write_bytes((exported / name).read_bytes())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file that card\.json has the digest of"):
        find_checkpoint(copy)
    card = json.loads((copy / "card.json").read_text())
    card["files"]["model.safetensors"] = None  # weights that another program has changed deliberately
    (copy / "card.json").write_text(json.dumps(card))
    find_checkpoint(copy)
    (copy / "card.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"card\.json is damaged: format is missing in it"):
        find_checkpoint(copy)


@pytest.mark.parametrize("source", ["run", "checkpoint", "export"])
def test_new_run_starts_with_the_weights_of_another(
    run: Path, exported: Path, corpus_folder: Path, tmp_path: Path, source: str
):
    """The new run has another corpus, two ranks, another engine, and a new optimizer state."""
    weights = {"run": run, "checkpoint": newest(run / "checkpoints"), "export": exported}[source]
    tree = tree_of(corpus_folder, tmp_path, "new", weights=weights)
    tree["data"]["shards"] = str(corpus_folder / "validation")
    tree["engine"]["name"] = "fsdp"
    tree["train"]["steps"] = 1
    output = train(tree, tmp_path, ranks=2)
    assert "starts with the weights of" in output and "different from those" not in output
    begin, after = (journal(path) for path in (tmp_path / "new", run))
    assert begin[0]["step"] == 0
    assert begin[0]["validation/bits_per_byte"] == pytest.approx(after[-1]["validation/bits_per_byte"], rel=1e-6)
    assert verify(newest(tmp_path / "new/checkpoints")).state["counters"] == {"optimizer_steps": 1}


def test_run_with_a_checkpoint_needs_its_initial_weights_no_more(exported: Path, corpus_folder: Path, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(exported)
    tree = tree_of(corpus_folder, tmp_path, "new", weights=link)
    tree["train"]["steps"] = 1
    train(tree, tmp_path)
    link.unlink()
    tree["train"]["steps"] = 2
    assert "resumes after step 1" in train(tree, tmp_path)


def test_moments_are_loaded_for_another_schedule(run: Path, corpus_folder: Path, tmp_path: Path):
    tree = tree_of(corpus_folder, tmp_path, "branch", weights=run, moments=True)
    tree["optimizer"] |= {"learning_rate": 1e-30, "weight_decay": 0.0, "beta1": 0.999999, "beta2": 0.999999}
    tree["train"]["steps"] = 1
    assert "starts with the weights and moments of" in train(tree, tmp_path)
    own, other = (content(newest(path / "checkpoints")) for path in (tmp_path / "branch", run))
    assert own.keys() == other.keys()
    for name in own:
        values, expected = (torch.frombuffer(bytearray(c[name]), dtype=torch.float32) for c in (own, other))
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-3, msg=name)
    assert verify(newest(tmp_path / "branch/checkpoints")).state["counters"] == {"optimizer_steps": 13}


def test_parameters_that_do_not_fit_are_skipped_only_on_request(run: Path, corpus_folder: Path, tmp_path: Path):
    tree = tree_of(corpus_folder, tmp_path, "longer", weights=run)
    tree["model"] |= {"sequence_length": 256}
    tree["train"]["steps"] = 1
    codes, output = start(tree, tmp_path)
    assert codes == [1] and len(output.splitlines()) == 1
    assert "belongs to another model (model.sequence_length: 128 -> 256; " in output
    assert "set initialize.partly=true to load the parameters that fit" in output
    assert not (tmp_path / "longer").exists()
    tree["initialize"]["partly"] = True
    output = train(tree, tmp_path)
    assert "different from those weights: model.sequence_length: 128 -> 256" in output
    different = [
        line.split(": ")[1] for line in output.splitlines() if line.startswith("different from those weights: ")
    ]
    assert different[1:] == ["global_positions has shape [128, 8] in the checkpoint and [256, 8] in this model"], output


@pytest.mark.parametrize(
    ("initialize", "override", "fault"),
    [
        ({"weights": "nowhere"}, {}, "nowhere has no valid checkpoint"),
        ({"weights": "EXPORT", "moments": True}, {}, "is an export, which has no moments"),
        ({"weights": "RUN", "moments": True}, {"name": "adam"}, "has the moments of optimizer.name=adamw, not of adam"),
    ],
)
def test_weights_that_cannot_be_loaded_are_refused_in_one_line(
    run: Path, exported: Path, corpus_folder: Path, tmp_path: Path, initialize: Any, override: Any, fault: str
):
    weights = {"RUN": run, "EXPORT": exported}.get(initialize["weights"], initialize["weights"])
    tree = tree_of(corpus_folder, tmp_path, "new", **initialize | {"weights": weights})
    tree["optimizer"] |= override
    codes, output = start(tree, tmp_path)
    assert codes == [1]
    assert output.startswith("error: ") and fault in output and len(output.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_existing_export_is_not_overwritten(run: Path, exported: Path):
    done = CliRunner().invoke(app, ["checkpoint", "export", str(run), "--out", str(exported)])
    assert isinstance(done.exception, FileExistsError)
