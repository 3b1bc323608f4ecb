"""Multi-byte prediction: the loss of further heads, and what it leaves as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import byteloom
from data_pipeline.vocabulary import SEPARATOR
from pretrain.config.errors import ConfigError
from pretrain.config.loading import with_overrides
from pretrain.models import all_families, build_model, model_config, multi_byte_of, small_config
from pretrain.training.weights import find_checkpoint
from pretrain.training.weights.exports import write_export
from pretrain.training.weights.foreign import export_foreign
from pretrain.training.weights.hugging_face import export_for_transformers

FAMILIES = [name for name, family in all_families().items() if "multi_byte" in family.config.model_fields]
HEADS = 4
TRAIN = {"steps": 1000, "global_batch": 4, "micro_batch": 4}


def arguments(model: Any, ids: Tensor) -> list[Any]:
    memory = model.empty_memory(len(ids))
    return [ids, memory] if memory else [ids]


def nats_of(model: Any, ids: Tensor) -> Tensor:
    torch.manual_seed(5)  # of a random crop
    result = model(*arguments(model, ids))
    return result[0] if isinstance(result, tuple) else result


def ids_in_documents(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (rows, length), generator=generator)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.1, SEPARATOR)


def test_causal_families_have_the_option_and_it_is_off():
    causal = {"blt", "hnet", "mamba", "megabyte", "perceiver_ar", "spacebyte", "transformer", "transformer_xl"}
    assert causal <= {*FAMILIES}
    assert not {"encoder", "encoder_decoder"} & {*FAMILIES}
    assert not any(multi_byte_of(small_config(name)) for name in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_further_heads_change_no_loss_and_get_a_gradient_each(family: str):
    ids = ids_in_documents(4, 32)
    results = []
    for multi_byte in (None, {"heads": HEADS}):
        torch.manual_seed(0)
        model = build_model(small_config(family, dropout=0.0, multi_byte=multi_byte)).train()
        results.append(nats_of(model, ids))
    assert torch.equal(*results)
    results[1].sum().backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == dict(model.named_parameters()).keys()
    assert all(norms[name] > 0 for name in norms if name.startswith("multi_byte"))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_flops_are_those_that_torch_counts(family: str):
    model = build_model(small_config(family, dropout=0.0, multi_byte={"heads": HEADS, "layers": 2})).bfloat16()
    for length in (8, 32):
        ids = ids_in_documents(1, length)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            nats_of(model, ids)
        assert counter.get_total_flops() == model.training_flops(length)
        model.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            nats_of(model, ids)
        assert counter.get_total_flops() == model.flops(length)
        model.train()


@pytest.mark.parametrize("layers", [0, 1])
def test_gradient_is_that_of_the_sum_of_weighted_losses(layers: int, monkeypatch: pytest.MonkeyPatch):
    """The loss of byte j under head k counts if byte j counts, and no separator is between byte j - k and byte j."""
    config = small_config("transformer", dropout=0.0, multi_byte={"heads": HEADS, "layers": layers, "weight": 0.7})
    torch.manual_seed(0)
    model = build_model(config).double().train()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    seen: list[Tensor] = []
    own = model.nats
    monkeypatch.setattr(model, "nats", lambda states, ids: [seen.append(states), own(states, ids)][1])
    ids = ids_in_documents(2, 12)
    counts = torch.rand(ids.shape) < 0.7
    parameters = list(model.parameters())
    got = torch.autograd.grad((model(ids) * counts).sum(), parameters, retain_graph=True)

    model.eval()
    total = own(seen[0], ids)[counts].sum()
    assert model.multi_byte is not None
    for distance, logits in enumerate(model.multi_byte.logits(seen[0]), 1):
        for row, place in counts.nonzero().tolist():
            first = place - distance
            if first >= 0 and SEPARATOR not in ids[row, first:place].tolist():
                total = total + 0.7 * F.cross_entropy(logits[row, first], ids[row, place])
    expected = torch.autograd.grad(total, parameters)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_context_parallelism_is_refused_by_name():
    sizes = {"sequence_length": 32, "width": 8, "layers": 1, "heads": 1, "multi_byte": {"heads": 2}}
    tree = {"data": {"shards": "x"}, "run": {"name": "x"}, "train": TRAIN, "model": {"family": "transformer"} | sizes}
    with_overrides(tree, [], "a test")
    with pytest.raises(ConfigError, match=r"model\.multi_byte predict bytes beyond a part"):
        with_overrides(tree, ["engine.context=2"], "a test")


def test_exports_of_other_programs_leave_further_heads_out(tmp_path: Path):
    section = {"family": "transformer", "sequence_length": 16, "width": 8, "layers": 1, "heads": 1, "dropout": 0.0}
    nanogpt = {"positions": "learned", "activation": "gelu", "biases": True}
    config = model_config(section | nanogpt | {"multi_byte": {"heads": 3}})
    model = build_model(config)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_export(tmp_path / "plain", weights, {"model": config.model_dump(mode="json")}, {})
    checkpoint = find_checkpoint(tmp_path / "plain")
    card = export_for_transformers(checkpoint, tmp_path / "hub", {}, [])
    further = sum(value.numel() for name, value in weights.items() if name.startswith("multi_byte."))
    assert card["parameters"] == model.parameter_count() - further
    export_foreign("nanogpt", checkpoint, tmp_path / "ckpt.pt")
    exact, fewer = byteloom.load(tmp_path / "plain"), byteloom.load(tmp_path / "hub")
    assert exact.module.multi_byte is not None
    assert fewer.module.multi_byte is None
    assert (exact.bits(b"some text") == fewer.bits(b"some text")).all()
