"""Patches by the entropy of a model of bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.checkpoint import Metadata
from pretrain.checkpoint.homes.folder import FolderHome
from pretrain.config.recipe_yaml import RecipeLoader
from pretrain.config.schema import Config
from pretrain.conformance import MODEL_LAWS, Subject
from pretrain.estimate.activations import on_meta
from pretrain.estimate.states import shardings
from pretrain.evaluation.generation import SamplingError
from pretrain.evaluation.speculation import check_speculates
from pretrain.models import ByteModel, build_model, model_config, small_config
from pretrain.models.entropy_model import EntropyModel, patcher_of
from pretrain.models.families.blt import BLT
from pretrain.models.patching.entropy import Entropy, EntropyConfig, entropy_of, entropy_starts, find_threshold
from pretrain.models.patching.frozen import FrozenModelError
from pretrain.optim import OPTIMIZERS
from pretrain.training.weights import find_checkpoint, model_changes
from pretrain.training.weights.exports import write_export
from pretrain.training.weights.foreign.source import ForeignFileError
from pretrain.training.weights.frozen_models import copy_frozen_model, with_copy, with_run_copy
from pretrain.training.weights.hugging_face.folder import export_for_transformers
from tests.commands import run_here
from tests.conftest import recipe_tree

EXPORTED = {"small": {"window": 4}, "mamba": {"family": "mamba"}, "short": {"sequence_length": 31}}
EXPORTED["learned"] = {"positions": "learned"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of exports of small models with random weights."""
    folder = tmp_path_factory.mktemp("exports")
    for name, changes in EXPORTED.items():
        torch.manual_seed(len(name))
        config = small_config(
            changes.get("family", "transformer"), **{k: v for k, v in changes.items() if k != "family"}
        )
        model = build_model(config)
        weights = {key: torch.randn(value.shape) * 0.3 for key, value in model.named_parameters()}
        write_export(folder / name, weights, {"model": config.model_dump(mode="json")}, {})
    return folder


def entropy_config(exports: Path, name: str = "small", **fields: Any) -> EntropyConfig:
    return EntropyConfig(model=str(exports / name), **fields or {"threshold": 4.98})


def rows() -> Tensor:
    """Two rows of what positions read, one with a second document and padding."""
    ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = ids[1, 13] = SEPARATOR
    ids[1, 29:] = PADDING
    return ids


def rule(config: EntropyConfig, capacity: int = 32) -> Entropy:
    found = patcher_of(config, capacity, 32, across_documents=False)
    assert isinstance(found, Entropy)
    return found


def trained(exports: Path, **changes: Any) -> ByteModel:
    """Return the model of the export `small`, built without the rule."""
    checkpoint = find_checkpoint(exports / "small")
    model = build_model(model_config(checkpoint.state["config"]["model"] | changes)).eval()
    model.load_state_dict(load_file(exports / "small" / "model.safetensors"))
    return model


RULES: list[dict[str, Any]] = [
    {"threshold": 4.98},
    {"rule": "monotonic", "increase": 0.05},
    {"rule": "combined", "threshold": 4.95, "increase": 0.02},
    {"threshold": 5.0, "max_patch_length": 3},
    {"rule": "monotonic", "increase": 9.0, "max_patch_length": 5},
]


@pytest.mark.slow
@torch.no_grad()
def test_entropies_are_those_of_the_models_predictions(exports: Path):
    read = rows()
    found = EntropyModel(entropy_config(exports), 32, across_documents=False).entropies(read)
    model = trained(exports, attention_across_documents=False)
    for place in (0, 1, 12, 13, 20):
        expected = entropy_of(model.decoder(2).prime(read[:, 1 : place + 1]))
        torch.testing.assert_close(found[:, place], expected)
    alone = torch.cat(
        [EntropyModel(entropy_config(exports), 32, across_documents=False).entropies(r[None]) for r in read]
    )
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("fields", RULES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_conditions_are_those_of_a_loop_over_positions(exports: Path, fields: dict[str, Any]):
    """Table 1 of the authors' rules: see `EntropyConfig`."""
    config, read = entropy_config(exports, **fields), rows()
    entropies = EntropyModel(config, 32, across_documents=False).entropies(read)
    starts, _ = entropy_starts(config, entropies, read, {})
    for row in range(2):
        since, length = 0, 0
        for place in range(32):
            id, now, before = int(read[row, place]), entropies[row, place], entropies[row, max(place - 1, 0)]
            since = 0 if id == SEPARATOR else since + 1
            high = config.threshold is None or bool(now > config.threshold)
            risen = config.increase is None or bool(now - before > config.increase)
            begins = {
                "global": high and since >= 1,
                "monotonic": since == 1 or (risen and since >= 2),
                "combined": since == 1 or (risen and high and since >= 3),
            }[config.rule]
            length = 0 if begins or id == SEPARATOR else length + 1
            begins = begins or (config.max_patch_length is not None and length % config.max_patch_length == 0)
            assert starts[row, place] == begins, (row, place)
    assert 4 < int(starts.sum()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("fields", RULES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_patches_of_a_prefix_are_those_of_the_row(exports: Path, fields: dict[str, Any]):
    """Entropies are near no threshold here, so that rounding moves no start."""
    config, read = entropy_config(exports, **fields), rows()
    patcher = rule(config, capacity=9)
    whole = patcher(read)
    for cut in (1, 2, 13, 14, 31):
        state, starts = None, []
        for part in (read[:, :cut], *read[:, cut:].split(2, 1)):
            patches = patcher(part, state)
            starts.append(patches.starts)
            state = patches.state
        assert torch.equal(torch.cat(starts, 1), whole.starts)
        changed = read.clone()
        changed[:, cut] = 7
        assert torch.equal(patcher(changed).starts[:, :cut], whole.starts[:, :cut])
    assert torch.equal(torch.cat([patcher(row[None]).starts for row in read]), whole.starts)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "threshold"), [("small", 4.98), ("mamba", 5.45)])
def test_models_with_entropy_patches_obey_the_laws(exports: Path, tmp_path: Path, name: str, threshold: float):
    patcher = entropy_config(exports, name, threshold=threshold, max_patch_length=6).model_dump(mode="json")
    subject = Subject.of("blt", patcher=patcher)
    names = (
        {"causality", "padding", "documents", "decoder", "reference", "gradients"} if name == "small" else {"decoder"}
    )
    for law in MODEL_LAWS:
        if law.name in names:
            law.check(subject, tmp_path)
        if law.name in names & {"decoder", "reference"}:
            law.check(Subject.of("spacebyte", patcher=patcher), tmp_path)


def test_decoder_with_entropy_patches_takes_no_byte_back(exports: Path):
    """The decoder of the model of bytes reads each position once."""
    patcher, heads = entropy_config(exports).model_dump(), {"heads": 2}
    model = build_model(small_config("spacebyte", patcher=patcher, multi_byte=heads))
    with pytest.raises(SamplingError, match="decoder of this SpaceByte cannot take bytes back"):
        check_speculates(model)
    check_speculates(build_model(small_config("spacebyte", multi_byte=heads)))


def test_model_is_no_part_of_the_model_that_it_serves(exports: Path):
    config = small_config("blt", patcher=entropy_config(exports).model_dump())
    with torch.device("meta"):
        model = build_model(config)
    without = build_model(small_config("blt"))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in without.named_parameters()]
    assert not list(model.buffers())
    assert model.flops(32) == without.flops(32) + trained(exports).flops(32)
    assert model.step_flops(32) == 3 * without.flops(32) + trained(exports).flops(32)  # it has no backward pass
    state = torch.get_rng_state()
    rule(entropy_config(exports))(rows())  # reads the weights
    assert torch.equal(torch.get_rng_state(), state)


def test_small_model_takes_memory_on_every_device_in_any_precision(exports: Path):
    """A weight of the small model has 4 bytes; no engine shards it, and it has no gradient and no moment."""
    patcher = entropy_config(exports).model_dump()
    models = [on_meta(small_config("blt", **changes)) for changes in ({}, {"patcher": patcher})]
    without, own = (shardings(model, OPTIMIZERS.get("adamw"), torch.bfloat16, 16) for model in models)
    added = 4 * trained(exports).parameter_count()
    for before, after in zip(without, own, strict=True):
        assert after.states == before.states._replace(weights=before.states.weights + added), before.name


@pytest.mark.parametrize("family", ["blt", "spacebyte"])
def test_memory_does_not_depend_on_the_patches(exports: Path, family: str):
    """This is a law of conformance too, for families with their own patches."""
    patcher = entropy_config(exports).model_dump()
    model = build_model(small_config(family, patches=9, patcher=patcher)).train()
    kept = []
    for ids in (torch.zeros_like(rows()), rows(), torch.full_like(rows(), SEPARATOR), torch.full_like(rows(), PADDING)):
        sizes = list[int]()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.nbytes), x)[1], lambda x: x
        ):
            model(ids)
        kept.append(sum(sizes))
    assert set(kept) == {kept[0]}


def test_run_refuses_another_model(exports: Path):
    first = small_config("blt", patcher=entropy_config(exports).model_dump())
    recorded = first.model_dump(mode="json")
    assert recorded["patcher"]["digest"]
    copied = recorded | {"patcher": recorded["patcher"] | {"model": "elsewhere"}}
    assert model_changes(recorded, model_config(copied)) == []  # the place of the same model may change
    other = small_config("blt", patcher=entropy_config(exports, "mamba").model_dump())
    (change,) = [line for line in model_changes(recorded, other) if "digest" in line]
    assert "model.patcher.digest" in change
    with pytest.raises(FrozenModelError, match="its digest is"):
        build_model(model_config(recorded | {"patcher": recorded["patcher"] | {"model": str(exports / "mamba")}}))
    with pytest.raises(FrozenModelError, match="no export"):
        build_model(model_config(copied))
    with pytest.raises(FrozenModelError, match="reads 31 bytes at most"):
        build_model(small_config("blt", patcher=entropy_config(exports, "short").model_dump()))
    with pytest.raises(ValidationError, match="rule monotonic needs increase"):
        entropy_config(exports, rule="monotonic")


def test_model_with_patches_by_entropy_cannot_decide_where_patches_start(exports: Path, tmp_path: Path):
    config = small_config("spacebyte", patcher=entropy_config(exports).model_dump())
    weights = {name: value.detach() for name, value in build_model(config).named_parameters()}
    write_export(tmp_path / "spacebyte", weights, {"model": config.model_dump(mode="json")}, {})
    with pytest.raises(FrozenModelError, match=r"spacebyte has patches by entropy itself.* name a model of bytes"):
        build_model(small_config("blt", patcher=entropy_config(tmp_path, "spacebyte").model_dump()))


@torch.no_grad()
def test_export_has_a_copy_of_the_model_and_needs_no_other(exports: Path, tmp_path: Path):
    config = small_config("blt", patcher=entropy_config(exports).model_dump())
    model = build_model(config)
    assert isinstance(model, BLT)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_export(tmp_path / "export", weights, {"model": config.model_dump(mode="json")}, {})
    (tmp_path / "export").rename(tmp_path / "moved")
    there = find_checkpoint(tmp_path / "moved").state["config"]["model"]
    assert there["patcher"]["model"] == str(tmp_path / "moved" / "entropy_model")
    with pytest.raises(ForeignFileError, match="are made by another model"):
        export_for_transformers(find_checkpoint(tmp_path / "moved"), tmp_path / "hf", {}, [])
    again = build_model(model_config(there))
    again.load_state_dict(model.state_dict())
    ids = rows()[:, 1:]
    assert torch.equal(again.eval()(ids), model.eval()(ids))
    weights_file = tmp_path / "moved" / "entropy_model" / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(FrozenModelError, match="is not the file"):
        build_model(model_config(there))(ids)


@pytest.mark.parametrize("rule_name", ["global", "monotonic", "combined"])
def test_threshold_gives_patches_of_a_mean_length(exports: Path, rule_name: str):
    fields = {"threshold": 0.0} if rule_name == "global" else {"increase": 0.0}
    fields |= {"threshold": 0.0} if rule_name == "combined" else {}
    config = entropy_config(exports, rule=rule_name, **fields)
    generator = torch.Generator().manual_seed(5)
    entropies, read = torch.rand(40, 100, generator=generator) * 5, torch.full((40, 100), 65)
    read[:, 0] = SEPARATOR
    found = find_threshold(config, entropies, read, 6.0)
    starts = entropy_starts(found, entropies, read, {})[0] | (read == SEPARATOR)
    assert read.numel() / int(starts.sum()) == pytest.approx(6.0, rel=0.01)


def test_run_takes_its_copy_if_the_export_is_gone(exports: Path, tmp_path: Path):
    config = small_config("blt", patcher=entropy_config(exports).model_dump())
    copy_frozen_model(config, tmp_path)
    assert with_run_copy(config, tmp_path) == config
    gone = small_config("blt", patcher={"name": "entropy", "model": str(tmp_path / "gone"), "threshold": 4.98})
    found = with_run_copy(gone, tmp_path)
    assert model_changes(config.model_dump(mode="json"), found) == []
    torch.testing.assert_close(rule(found.patcher)(rows()).starts, rule(config.patcher)(rows()).starts)  # type: ignore[attr-defined]
    assert with_run_copy(gone, tmp_path / "other") == gone


def test_copy_of_another_model_is_replaced_and_never_taken(exports: Path, tmp_path: Path):
    """A start that failed may have left the copy of another model."""
    first, other = (
        small_config("blt", patcher=entropy_config(exports, name).model_dump()) for name in ("small", "mamba")
    )
    copy_frozen_model(first, tmp_path)
    patcher = entropy_config(exports, "mamba").model_dump() | {"model": str(tmp_path / "gone")}
    gone = small_config("blt", patcher=patcher)
    with pytest.raises(FrozenModelError, match="its digest is"):
        build_model(with_run_copy(gone, tmp_path))
    state = {"config": {"model": other.model_dump(mode="json")}}
    checkpoint = Metadata(FolderHome(tmp_path / "checkpoints"), "step-00000001", "", (), {}, state)
    assert with_copy(checkpoint) == checkpoint
    copy_frozen_model(other, tmp_path)
    place = with_copy(checkpoint).state["config"]["model"]["patcher"]["model"]
    assert place == str(tmp_path / "entropy_model")
    build_model(with_run_copy(gone, tmp_path))


def test_adapters_of_a_run_whose_export_is_gone_are_no_fault_of_the_recipe(exports: Path, tmp_path: Path):
    """The run has a copy of the export, which a start takes."""
    patcher = entropy_config(exports).model_dump() | {"model": str(tmp_path / "gone")}
    tree = recipe_tree(tmp_path) | {
        "model": small_config("blt", patcher=patcher).model_dump(mode="json"),
        "initialize": {"weights": str(tmp_path)},
        "finetune": {"freeze": ["*"], "adapters": {"layers": ["*"], "rank": 1}},
    }
    assert Config.model_validate(tree).warnings() == []


def test_command_prints_the_section_of_a_recipe(exports: Path, tmp_path: Path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 2)
    code, output = run_here("threshold", exports / "small", tmp_path / "text", "--bytes-per-patch", "4", "--json")
    assert code == 0, output
    found = json.loads(output[output.index("{") :])
    assert found["bytes_per_patch"] == pytest.approx(4, rel=0.05)
    assert EntropyConfig(**found["patcher"]).rule == "global" and "entropies" not in found["patcher"]
    command = ("threshold", exports / "small", tmp_path / "text", "--bytes-per-patch", "4", "--json", "--stored")
    code, output = run_here(*command, "--reset-at-newlines")
    stored = EntropyConfig(**json.loads(output[output.index("{") :])["patcher"])
    assert code == 0 and stored.entropies == "corpus" and stored.reset_at_newlines
    assert json.loads(output[output.index("{") :])["bytes_per_patch"] == pytest.approx(4, rel=0.2)  # first bytes tie


def test_printed_section_of_a_recipe_is_yaml_whatever_the_folder_and_the_terminal(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / "a, b: {c} #d" / "a name that is longer than the terminal is wide"
    shutil.copytree(exports / "small", folder)
    (tmp_path / "text").write_bytes(bytes(range(256)))
    code, output = run_here("threshold", folder, tmp_path / "text", "--bytes-per-patch", "4")
    assert code == 0, output
    section = yaml.load(output.splitlines()[-1], RecipeLoader)
    assert EntropyConfig(**section["patcher"]).model == str(folder)


def test_mean_length_that_no_threshold_gives_is_refused_or_reported(exports: Path, tmp_path: Path):
    (tmp_path / "text").write_bytes(b"a")
    command = ("threshold", exports / "small", tmp_path / "text", "--bytes-per-patch")
    assert run_here(*command, "nan")[0] == 2
    code, output = run_here(*command, "5")
    assert code == 0 and "no threshold gives patches of 5 bytes" in output and "1 byte in rows" in output, output


def test_command_shows_patches_by_entropy(exports: Path, tmp_path: Path):
    """The windows slide, so they have the starts that rows have where these have context."""
    (tmp_path / "text").write_bytes(bytes(torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(5))))
    command = ("patches", exports / "small", tmp_path / "text", "--rule", "entropy", "--json", "--device", "cpu")
    code, output = run_here(*command, "--bytes-per-patch", "4")
    assert code == 0, output
    found = json.loads(output[output.index("{") :])
    assert found["stages"]["0"]["bytes_per_patch"] == pytest.approx(4, rel=0.2)
    threshold = found["source"].split()[-1]
    code, output = run_here(*command, "--threshold", threshold)
    starts = json.loads(output[output.index("{") :])["stages"]["0"]["starts"]
    assert code == 0 and len(set(starts) ^ set(found["stages"]["0"]["starts"])) <= 4  # the threshold is rounded
