"""Golden vectors of the authors' code: imported weights give their logits, and exports give the weights back."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.checkpoint import read
from pretrain.distributed.fragments import whole
from pretrain.models import ByteModel, build_model, model_config, small_config
from pretrain.training.weights import find_checkpoint
from pretrain.training.weights.exports import write_export
from tests.commands import run_here

HERE = Path(__file__).parent
START = 258


class Vector(NamedTuple):
    """A golden vector: what an author's code computed."""

    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    ids: Tensor
    """(rows, T) by the authors' numbering."""
    logits: Tensor
    """(rows, n, symbols) of the last n positions."""


class Case(NamedTuple):
    """How a golden vector is imported."""

    form: str
    words: list[str]
    """Further words of the command."""
    symbols: list[int]
    """Byteloom's id of each of the authors' symbols."""
    starts_in_ids: bool
    """Whether the ids begin with the symbol that rows begin with."""


XL_FIELDS = ["model.sequence_length=6", "model.memory_length=9", "model.clamp_length=8", "--start", "60"]
CASES = {
    "nanogpt": Case("nanogpt", [], list(range(258)), True),
    "nanogpt_small": Case("nanogpt", ["--start", "42"], list(range(32, 97)), True),
    "transformer_xl": Case(
        "transformer-xl",
        XL_FIELDS,
        list(range(60, 90)),
        True,
    ),
    "transformer_xl_pre": Case(
        "transformer-xl",
        [*XL_FIELDS, "model.norm=pre"],
        list(range(60, 90)),
        True,
    ),
    "perceiver_ar": Case("perceiver-ar", [], [PADDING, SEPARATOR, START, *range(256)], False),
    "perceiver_ar_image": Case("perceiver-ar", [], [PADDING, SEPARATOR, START, *range(256)], False),
}


def vector(name: str) -> Vector:
    """Return the golden vector of a name."""
    with np.load(HERE / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    weights = {
        key.removeprefix("weights."): torch.from_numpy(value.astype(np.float32))
        for key, value in arrays.items()
        if key.startswith("weights.")
    }
    ids, logits = torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["logits"])
    return Vector(json.loads(str(arrays["config"])), weights, ids, logits)


def write_file(name: str, folder: Path) -> Path:
    """Write the authors' file of a golden vector."""
    golden = vector(name)
    if name.startswith("perceiver_ar"):
        arrays: dict[str, Any] = {key: value.numpy() for key, value in golden.weights.items()}
        np.savez(folder / "params.npz", arguments=json.dumps(golden.arguments), **arrays)
        return folder / "params.npz"
    state = dict(golden.weights)
    if name.startswith("transformer_xl"):
        state["crit.out_layers.0.weight"] = state["word_emb.emb_layers.0.weight"]
        state["pos_emb.inv_freq"] = torch.ones(6)
        torch.save(state, folder / "state.pt")
        return folder / "state.pt"
    state["lm_head.weight"] = state["transformer.wte.weight"]
    content = {"model": {f"_orig_mod.{key}": value for key, value in state.items()}, "model_args": golden.arguments}
    torch.save(content | {"iter_num": 7, "best_val_loss": torch.tensor(1.5)}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def imported(name: str, folder: Path) -> Path:
    """Import the authors' file of a golden vector."""
    case, out = CASES[name], folder / "imported"
    (folder / "symbols").write_text("".join(f"{symbol}\n" for symbol in case.symbols))
    words = case.words if case.form == "perceiver-ar" else [*case.words, "--symbols", folder / "symbols"]
    code, output = run_here("import", case.form, write_file(name, folder), "--out", out, *words)
    assert code == 0, output
    return out


def model_of(folder: Path) -> ByteModel:
    """Return the model of an export."""
    checkpoint = find_checkpoint(folder)
    model = build_model(model_config(checkpoint.state["config"]["model"])).eval()
    read(checkpoint, [whole(f"model/{name}", parameter.detach()) for name, parameter in model.named_parameters()])
    return model


def reference_of(folder: Path) -> Any:
    """Return the model of an export's model.py."""
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("reference", folder / "model.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("layers", None)
    return module.Model(*module.load(folder))


def as_ours(golden: Vector, case: Case) -> tuple[Tensor, Tensor]:
    """Return ids and logits of a golden vector by Byteloom's numbering: (rows, T) and (rows, n, 259)."""
    logits = torch.full((*golden.logits.shape[:2], VOCABULARY + 1), -torch.inf)
    logits[..., case.symbols] = golden.logits
    if not case.starts_in_ids:
        return golden.ids, logits
    ids = torch.tensor(case.symbols)[golden.ids]
    return F.pad(ids[:, 1:], (0, 1), value=case.symbols[0]), logits  # the last logits predict an id that is not there


def segments(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Yield the logits of the segments of a Transformer-XL's rows, by its reference."""
    memory = model.empty_memory(len(ids))
    for segment in ids.split(model.config["sequence_length"], 1):
        logits, memory = model.segment(segment, memory)
        yield logits


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_imported_weights_have_the_logits_of_the_authors_code(name: str, tmp_path: Path):
    folder = imported(name, tmp_path)
    ids, logits = as_ours(vector(name), CASES[name])
    reference, present = reference_of(folder), logits[..., :VOCABULARY].isfinite()
    own = torch.cat(list(segments(reference, ids)), 1) if name.startswith("transformer_xl") else reference.logits(ids)
    torch.testing.assert_close(own[present], logits[..., :VOCABULARY][present], atol=3e-6, rtol=3e-5)
    assert bool((own.softmax(-1)[~present] == 0).all())

    model, count = model_of(folder), logits.shape[1]
    nats = F.cross_entropy(logits[..., :VOCABULARY].transpose(1, 2), ids[:, -count:], reduction="none")
    if name.startswith("transformer_xl"):
        memory, parts = model.empty_memory(2), []
        for segment in ids.split(6, 1):
            part, memory = model(segment, memory)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), nats, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(model(ids)[:, -count:], nats, atol=1e-5, rtol=1e-5)
    primed = model.decoder(len(ids)).prime(ids[:, :-1])
    torch.testing.assert_close(primed, own[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_import_export_import_is_the_identity(name: str, tmp_path: Path):
    first, case = imported(name, tmp_path), CASES[name]
    suffix = ".npz" if case.form == "perceiver-ar" else ".pt"
    code, output = run_here("export", first, "--as", case.form, "--out", tmp_path / f"exported{suffix}")
    assert code == 0, output
    code, output = run_here("import", case.form, tmp_path / f"exported{suffix}", "--out", tmp_path / "again")
    assert code == 0, output
    before, after = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    sections = [json.loads((folder / "card.json").read_text())["model"] for folder in (first, tmp_path / "again")]
    assert sections[0] == sections[1]


@pytest.mark.parametrize("name", CASES)
def test_export_holds_the_tensors_of_the_authors_file(name: str, tmp_path: Path):
    folder, case, golden = imported(name, tmp_path), CASES[name], vector(name)
    run_here("export", folder, "--as", case.form, "--out", tmp_path / "exported")
    if case.form == "perceiver-ar":
        with np.load(tmp_path / "exported", allow_pickle=False) as file:
            state = {key: torch.from_numpy(file[key]) for key in file.files if key != "arguments"}
            arguments = json.loads(str(file["arguments"]))
    else:
        content = torch.load(tmp_path / "exported", weights_only=True)
        state, arguments = content["model"], content["model_args"]
        assert content["symbols"] == case.symbols
        for derived in ("lm_head.weight", "crit.out_layers.0.weight", "pos_emb.inv_freq"):
            state.pop(derived, None)
    zeros = {key: value for key, value in state.items() if key not in golden.weights}
    assert all(key.endswith("bias") and not value.any() for key, value in zeros.items())
    assert all(torch.equal(state[key], value) for key, value in golden.weights.items())
    stated = {key: golden.arguments[key] for key in arguments.keys() & golden.arguments.keys() - {"bias"}}
    assert stated == {key: arguments[key] for key in stated}


def trained_like(family: str, folder: Path, **changes: Any) -> Path:
    """Write an export of a small model whose every parameter matters."""
    config = small_config(family, **changes)
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.randn(parameter.shape, generator=generator) * 0.3
        for name, parameter in build_model(config).named_parameters()
    }
    write_export(folder / "own", weights, {"model": config.model_dump(mode="json")}, {})
    return folder / "own"


@pytest.mark.parametrize(
    ("form", "family", "changes"),
    [
        ("nanogpt", "transformer", {"positions": "learned", "activation": "gelu", "window": None}),
        (
            "transformer-xl",
            "transformer_xl",
            {"norm": "post", "scale_embeddings": True, "clamp_length": 5, "biases": True},
        ),
        ("transformer-xl", "transformer_xl", {"norm": "post", "scale_embeddings": True, "memory_length": 0}),
        ("transformer-xl", "transformer_xl", {"final_norm": False, "scale_embeddings": True}),
        ("perceiver-ar", "perceiver_ar", {"cross_attend_after": [1], "activation": "gelu_tanh"}),
    ],
)
@torch.no_grad()
def test_export_of_a_model_that_was_trained_here_computes_the_same(
    form: str, family: str, changes: dict[str, Any], tmp_path: Path
):
    own = trained_like(family, tmp_path, **changes)
    assert run_here("export", own, "--as", form, "--out", tmp_path / "exported.npz")[0] == 0
    assert run_here("import", form, tmp_path / "exported.npz", "--out", tmp_path / "again")[0] == 0
    ids = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(4))
    before, after = model_of(own), model_of(tmp_path / "again")
    scored = before.scored(32)
    torch.testing.assert_close(after(ids)[:, scored], before(ids)[:, scored], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_megabyte_has_the_logits_of_an_authors_code():
    golden, size = vector("megabyte"), 16
    theirs = golden.weights
    tree = {"width": size, "layers": 2, "heads": 4}
    local = {"width": 8, "layers": 2, "heads": 2}
    config = model_config(
        {"family": "megabyte", "sequence_length": 12, "patch_size": 4, "global_model": tree, "local_model": local}
    )
    # Their table of positions begins with the padding of the first patch. Their local pad takes the place of position
    # and embedding, and their map to the local model has a bias, which the local positions hold here.
    places = theirs["local_position_encoding"] + theirs["global_to_local.bias"]
    weights = {
        "global_embedding.weight": theirs["global_token_embedding.weight"],
        "global_positions": theirs["global_position_encoding"].roll(-4, 0),
        "global_pad": theirs["global_pad"],
        "global_to_local.weight": theirs["global_to_local.weight"],
        "local_embedding.weight": theirs["local_token_embedding.weight"],
        "local_positions": places,
        "local_pad": theirs["local_pad"] - theirs["local_position_encoding"][0],
        "global_stack.norm.weight": theirs["global_blocks.1.norm.weight"],
        "global_stack.norm.bias": theirs["global_blocks.1.norm.bias"],
        "local_stack.norm.weight": theirs["logits.layer_norm.scale"],
        "local_stack.norm.bias": torch.zeros(8),
    }
    modules = {
        "attention_norm.weight": "attention.layer_norm.scale",
        "attention.query_key_value.weight": "attention.QKV_linear.weight",
        "attention.output.weight": "attention.linear.weight",
        "feed_forward_norm.weight": "feedforward.layer_norm.scale",
        "feed_forward.expand.weight": "feedforward.linear_1.weight",
        "feed_forward.contract.weight": "feedforward.linear_2.weight",
    }
    for stack, width in (("global", size), ("local", 8)):
        for layer in range(2):
            block = f"{stack}_blocks.{layer}" + (".block" if (stack, layer) == ("global", 1) else "")
            own = f"{stack}_stack.blocks.{layer}"
            weights |= {f"{own}.{name}": theirs[f"{block}.{module}"] for name, module in modules.items()}
            weights |= {f"{own}.{norm}.bias": torch.zeros(width) for norm in ("attention_norm", "feed_forward_norm")}
    model = build_model(config).eval()
    model.load_state_dict(weights)
    nats = F.cross_entropy(golden.logits.transpose(1, 2), golden.ids, reduction="none")
    torch.testing.assert_close(model(golden.ids), nats, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decoder(1).prime(golden.ids[:, :-1]), golden.logits[:, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_spacebyte_has_the_logits_of_the_authors_code():
    golden, theirs = vector("spacebyte"), vector("spacebyte").weights
    arguments = golden.arguments
    config = model_config(
        {
            "family": "spacebyte",
            "sequence_length": 24,
            "patches": arguments["global_context_size"],
            "local_model": {"width": 8, "layers": 2, "heads": 2},
            "global_model": {"width": 16, "layers": 2, "heads": 4},
            "window": arguments["local_attention_window"] + 1,  # without a GPU, their window has one position more
        }
    )
    model = build_model(config).eval()
    rotated = torch.tensor([0, 2, 1, 3])  # they turn neighbouring channels of a head, not those half a head apart

    def attention(name: str, width: int) -> dict[str, Tensor]:
        fused = theirs[f"{name}.QKV_linear.weight"].view(3, width // 4, 4, width)
        fused = torch.cat([fused[:2, :, rotated], fused[2:]]).reshape(3 * width, width)
        norms = {
            f"attention.{part}_norm.weight": theirs[f"{name}.{letter}_layer_norm.scale"][rotated]
            for part, letter in (("query", "Q"), ("key", "K"))
        }
        return {"attention.query_key_value.weight": fused, **norms}

    others = {
        "attention_norm.weight": "attention.layer_norm.scale",
        "attention.output.weight": "attention.linear.weight",
        "feed_forward_norm.weight": "feedforward.layer_norm.scale",
        "feed_forward.expand.weight": "feedforward.linear_1.weight",
        "feed_forward.contract.weight": "feedforward.linear_2.weight",
    }
    weights = {
        "embedding.weight": theirs["token_embedding.weight"],
        "start": theirs["token_embedding.weight"][SEPARATOR],
        "positions": theirs["local_position_encoding"],
        "patch_positions": theirs["global_position_encoding"],
        "norm.weight": theirs["logits.layer_norm.scale"],
        "head": theirs["logits.logits_linear.weight"][:VOCABULARY],
    }
    for stack, name, layers, width in (
        ("first", "initial", 1, 8),
        ("global", "global", 2, 16),
        ("last", "final", 1, 8),
    ):
        for layer in range(layers):
            block, own = f"{name}_blocks.{layer}", f"{stack}_blocks.{layer}"
            weights |= {f"{own}.{ours}": value for ours, value in attention(f"{block}.attention", width).items()}
            weights |= {f"{own}.{ours}": theirs[f"{block}.{module}"] for ours, module in others.items()}
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("norm.bias") for key in missing.missing_keys)  # theirs have none; ours begin at 0
    nats = F.cross_entropy(golden.logits.transpose(1, 2), golden.ids, reduction="none")
    torch.testing.assert_close(model(golden.ids), nats, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decoder(1).prime(golden.ids[:, :-1]), golden.logits[:, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blt_has_the_logits_of_the_authors_code():
    golden, theirs = vector("blt"), vector("blt").weights
    arguments, rows = golden.arguments, [*range(4, 260), 1, 2]  # their numbers of our ids; 1 begins a document
    config = model_config(
        {
            "family": "blt",
            "sequence_length": 24,
            "patches": 12,
            "local_model": {"width": 8, "heads": 2, "encoder_layers": 1, "decoder_layers": 2},
            "global_model": {"width": 16, "layers": 2, "heads": 2},
            "window": arguments["local_attention_window_len"],
            "ngrams": {"sizes": arguments["encoder_hash_byte_group_size"], "buckets": 30, "functions": 2},
            "slots": arguments["cross_attn_k"],
            "cross_residual": 2,  # their layer adds its input, and so does its caller
        }
    )
    model = build_model(config).eval()

    def block(name: str, heads: int = 2) -> dict[str, Tensor]:
        q, k, v = (theirs[f"{name}.attention.w{part}.weight"] for part in "qkv")
        # they turn neighbouring channels of a head, not those half a head apart
        q, k = (part.view(heads, -1, 2, part.shape[1]).transpose(1, 2).reshape(part.shape) for part in (q, k))
        feed = {part: theirs[f"{name}.feed_forward.w{part}.weight"] for part in (1, 2, 3)}
        return {
            "attention_norm.weight": theirs[f"{name}.attention_norm.weight"],
            "attention.query_key_value.weight": torch.cat([q, k, v]),
            "attention.output.weight": theirs[f"{name}.attention.wo.weight"],
            "feed_forward_norm.weight": theirs[f"{name}.ffn_norm.weight"],
            "feed_forward.expand.weight": torch.cat([feed[1], feed[3]]),
            "feed_forward.contract.weight": feed[2],
        }

    def exchange(name: str) -> dict[str, Tensor]:
        k, v = (theirs[f"{name}.w{part}.weight"] for part in "kv")
        return {
            "query_norm.weight": theirs[f"{name}.cross_attn_norm_q.weight"],
            "input_norm.weight": theirs[f"{name}.cross_attn_norm_kv.weight"],
            "query.weight": theirs[f"{name}.wq.weight"],
            "key_value.weight": torch.cat([k, v]),
            "output.weight": theirs[f"{name}.wo.weight"],
        }

    modules = {
        "encoder_blocks.0": block("local_encoder.layers.0"),
        "slot_blocks.0.attention": exchange("local_encoder.cross_attn_layers.0"),
        **{f"global_blocks.{layer}": block(f"global_transformer.layers.{layer}") for layer in range(2)},
        **{f"decoder_blocks.{layer}": block(f"local_decoder.layers.{layer}") for layer in range(2)},
        **{
            f"decoder_blocks.{layer}.reading": exchange(f"local_decoder.cross_attn_layers.{layer}")
            for layer in range(2)
        },
    }
    weights = {f"{module}.{name}": value for module, values in modules.items() for name, value in values.items()}
    weights |= {f"ngrams.tables.{n}.weight": theirs[f"encoder_hash_tok_embedding.{n}.weight"] for n in range(6)}
    weights |= {
        "embedding.weight": theirs["local_encoder.tok_embeddings.weight"][rows],
        "first_slots.weight": theirs["local_encoder.patch_embedding_projection.weight"],
        "patch_input.weight": theirs["global_transformer.token_embedding_projection.weight"],
        "patch_output.weight": theirs["local_decoder.patch_embedding_projection.weight"],
        "norm.weight": theirs["local_decoder.norm.weight"],
        "head": theirs["local_decoder.output.weight"][rows],
    }
    model.load_state_dict(weights)
    ids = golden.ids[:, 1:] - 4  # their first id is the start, which ours read before the row
    for place in range(ids.shape[1] - golden.logits.shape[1] + 1, ids.shape[1] + 1):
        logits = golden.logits[:, place - ids.shape[1] - 1, rows]
        torch.testing.assert_close(model.decoder(1).prime(ids[:, :place]), logits, atol=1e-5, rtol=1e-5)
    nats = F.cross_entropy(golden.logits[0, :-1, rows], ids[0, 1 - golden.logits.shape[1] :], reduction="none")
    torch.testing.assert_close(model(ids)[0, 1 - golden.logits.shape[1] :], nats, atol=1e-5, rtol=1e-5)


def test_hnet_has_the_logits_of_the_authors_code():
    """Two stages, of Mamba-2 and attention. Their patches start where ours do: no probability is near 1/2."""
    golden, theirs = vector("hnet"), vector("hnet").weights
    stage = {"width": 8, "heads": 2, "feed_forward_width": 128, "window": 5, "patches": 12}
    stage |= {"patcher": {"name": "learned", "size": 3}}
    config = model_config(
        {
            "family": "hnet",
            "sequence_length": 12,
            "stages": [stage | {"encoder": "m1", "decoder": "t1"}, stage | {"encoder": "T1", "decoder": "m1"}],
            "main": {"width": 12, "heads": 2, "layers": "t1"},
            "mamba": {"head_width": 8, "state": 6},
        }
    )
    model = build_model(config).eval()

    def mixer(name: str) -> dict[str, Tensor]:
        if f"{name}.Wqkv.weight" in theirs:
            names = {"query_key_value.weight": "Wqkv.weight", "output.weight": "out_proj.weight"}
            return {ours: theirs[f"{name}.{authors}"] for ours, authors in names.items()}
        expand, values, select, step = theirs[f"{name}.in_proj.weight"].split([16, 16, 12, 2])
        names = {
            "convolution.weight": "conv1d.weight",
            "convolution.bias": "conv1d.bias",
            "step_bias": "dt_bias",
            "log_rate": "A_log",
            "skip": "D",
            "norm.weight": "norm.weight",
            "contract.weight": "out_proj.weight",
        }
        maps = {"expand.weight": torch.cat([expand, values]), "select.weight": select, "step.weight": step}
        return maps | {ours: theirs[f"{name}.{authors}"] for ours, authors in names.items()}

    def stack(name: str) -> dict[str, Tensor]:
        weights = {"norm.weight": theirs[f"{name}.rmsnorm.weight"]}
        block, own = f"{name}.layers.0", "blocks.0"
        weights |= {f"{own}.mixer.{ours}": value for ours, value in mixer(f"{block}.mixer").items()}
        weights[f"{own}.norm.weight"] = theirs[f"{block}.norm1.weight"]
        if f"{block}.mlp.fc1.weight" in theirs:
            value, gate = theirs[f"{block}.mlp.fc1.weight"].chunk(2)
            weights[f"{own}.feed_forward_norm.weight"] = theirs[f"{block}.norm2.weight"]
            weights[f"{own}.feed_forward.expand.weight"] = torch.cat([gate, value])
            weights[f"{own}.feed_forward.contract.weight"] = theirs[f"{block}.mlp.fc2.weight"]
        return weights

    weights = {
        "embedding.weight": theirs["embeddings.weight"],
        "start": theirs["embeddings.weight"][SEPARATOR],
        "head": theirs["lm_head.weight"],
        "stages.1.pad": theirs["backbone.main_network.main_network.pad_dimension"],
    }
    stacks = {"main": "backbone.main_network.main_network.main_network"}
    for level, name in enumerate(("backbone", "backbone.main_network")):
        stacks |= {f"stages.{level}.{part}": f"{name}.{part}" for part in ("encoder", "decoder")}
        for part in ("weight", "bias"):
            weights[f"stages.{level}.residual.{part}"] = theirs[f"{name}.residual_proj.{part}"]
        for ours, authors in (("query", "q_proj_layer"), ("key", "k_proj_layer")):
            weights[f"stages.{level}.patcher.{ours}.weight"] = theirs[f"{name}.routing_module.{authors}.weight"]
    for own, name in stacks.items():
        weights |= {f"{own}.{ours}": value for ours, value in stack(name).items()}
    model.load_state_dict(weights)
    for place in range(12):
        logits = model.decoder(2).prime(golden.ids[:, :place])
        torch.testing.assert_close(logits, golden.logits[:, place], atol=1e-5, rtol=1e-5)
    nats = F.cross_entropy(golden.logits.transpose(1, 2), golden.ids, reduction="none")
    torch.testing.assert_close(model(golden.ids), nats, atol=1e-5, rtol=1e-5)


def test_au_net_has_the_logits_of_the_authors_code():
    """Bytes, words and pairs of words, with more words than there is room for. Symbol 0 begins a row."""
    golden, theirs = vector("au_net"), vector("au_net").weights
    heads, symbols = 2, golden.logits.shape[2]
    stage = {"heads": heads, "encoder": "T1", "decoder": "T1", "join": "multi_linear", "width": 8}
    config = model_config(
        {
            "family": "hnet",
            "sequence_length": 28,
            "stages": [
                stage | {"window": 5, "patcher": {"name": "byte_class"}, "patches": 5, "feed_forward_width": 24},
                stage | {"window": 3, "patcher": {"name": "fixed", "size": 2}, "patches": 2, "feed_forward_width": 24},
            ],
            "main": {"width": 12, "heads": heads, "layers": "T1"},
            "rotary": {"fraction": 1.0, "base": 500_000.0},
        }
    )
    model = build_model(config).eval()

    def stack(name: str, norm: str) -> dict[str, Tensor]:
        own, parts = "blocks.0", {part: theirs[f"{name}.layers.0.attention.w{part}.weight"] for part in "qkvo"}
        for part in "qk":  # their rotary channels are pairs of neighbours
            pairs = parts[part].unflatten(0, (heads, -1, 2)).transpose(1, 2)
            parts[part] = pairs.flatten(0, 2)
        feed = [theirs[f"{name}.layers.0.feed_forward.w{part}.weight"] for part in (1, 3, 2)]
        return {
            f"{own}.norm.weight": theirs[f"{name}.layers.0.attention_norm.weight"],
            f"{own}.mixer.query_key_value.weight": torch.cat([parts[part] for part in "qkv"]),
            f"{own}.mixer.output.weight": parts["o"],
            f"{own}.feed_forward_norm.weight": theirs[f"{name}.layers.0.ffn_norm.weight"],
            f"{own}.feed_forward.expand.weight": torch.cat(feed[:2]),
            f"{own}.feed_forward.contract.weight": feed[2],
            "norm.weight": theirs[norm],
        }

    stacks = {
        "stages.0.encoder": stack("encoders.0", "transitions.0.down_norm.weight"),
        "stages.1.encoder": stack("encoders.1", "transitions.1.down_norm.weight"),
        "main": stack("trunk", "transitions.1.up_norm.weight"),
        "stages.1.decoder": stack("decoders.1", "transitions.0.up_norm.weight"),
        "stages.0.decoder": stack("decoders.0", "vocab_norm.weight"),
    }
    weights = {f"{name}.{own}": value for name, values in stacks.items() for own, value in values.items()}
    for level in range(2):
        name = f"transitions.{level}"
        weights[f"stages.{level}.down.weight"] = theirs[f"{name}.trans_down.weight"]
        weights[f"stages.{level}.up.shared.weight"] = theirs[f"{name}.trans_up.weight"]
        weights[f"stages.{level}.up.by_place.weight"] = theirs[f"{name}.indexed_linear.weight"].flatten(0, 1)
    for own, name in (("embedding.weight", "tok_embeddings.weight"), ("head", "vocab.weight")):
        weights[own] = F.pad(theirs[name], (0, 0, 0, VOCABULARY - symbols))
    model.load_state_dict(weights | {"start": theirs["tok_embeddings.weight"][0]})
    for place in (0, 4, 22, 27):
        logits = model.decoder(2).prime(golden.ids[:, :place])[:, :symbols]
        torch.testing.assert_close(logits, golden.logits[:, place], atol=1e-5, rtol=1e-5)
    others = golden.logits.new_zeros(2, 28, VOCABULARY - symbols)
    nats = F.cross_entropy(torch.cat([golden.logits, others], -1).transpose(1, 2), golden.ids, reduction="none")
    torch.testing.assert_close(model(golden.ids), nats, atol=1e-5, rtol=1e-5)


def test_golden_vectors_are_small():
    assert sum(path.stat().st_size for path in HERE.glob("*.npz")) < 500_000
