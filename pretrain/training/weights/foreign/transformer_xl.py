"""Weights of kimiyoung/transformer-xl (PyTorch), as models of the family transformer_xl."""

from typing import Any

import torch
from torch import Tensor

from data_pipeline.vocabulary import VOCABULARY
from pretrain.training.weights.foreign.source import ABSENT, START, ForeignFileError, Source

NAMES = {
    "dec_attn.qkv_net.weight": "attention.query_key_value.weight",
    "dec_attn.r_net.weight": "attention.distance_key.weight",
    "dec_attn.o_net.weight": "attention.output.weight",
    "dec_attn.layer_norm.weight": "attention_norm.weight",
    "dec_attn.layer_norm.bias": "attention_norm.bias",
    "pos_ff.CoreNet.0.weight": "feed_forward.expand.weight",
    "pos_ff.CoreNet.0.bias": "feed_forward.expand.bias",
    "pos_ff.CoreNet.3.weight": "feed_forward.contract.weight",
    "pos_ff.CoreNet.3.bias": "feed_forward.contract.bias",
    "pos_ff.layer_norm.weight": "feed_forward_norm.weight",
    "pos_ff.layer_norm.bias": "feed_forward_norm.bias",
}
"""Parameters of a layer by the authors' names."""
ONLY = {"scale_embeddings": True, "positions": "relative", "activation": "relu"}
"""Config fields of the models that the authors' code has."""
ONLY_ARGUMENTS = {"attn_type": 0, "div_val": 1, "ext_len": 0, "tie_weight": True}
TABLE, HEAD = "word_emb.emb_layers.0.weight", "crit.out_layers.0"


def config_of(source: Source) -> dict[str, Any]:
    """Return the section `model` of a recipe, as far as a file says."""
    source.check_arguments(ONLY_ARGUMENTS)
    heads, head_width = source.matrix("r_w_bias")
    _, width = source.matrix(TABLE)
    if heads * head_width != width:
        raise ForeignFileError(f"{source.path}: {heads} heads of {head_width} channels do not make the width, {width}")
    hidden, _ = source.matrix("layers.0.pos_ff.CoreNet.0.weight")
    layers = {name.split(".")[1] for name in source.tensors if name.startswith("layers.")}
    section: dict[str, Any] = {"family": "transformer_xl", "width": width, "heads": heads, "layers": len(layers)}
    section |= {"feed_forward_width": hidden, "biases": True, **ONLY}
    section |= {"norm": "pre" if source.arguments.get("pre_lnorm") else "post", "final_norm": False}
    if "tgt_len" in source.arguments:
        section["sequence_length"] = source.arguments["tgt_len"]
    if "mem_len" in source.arguments:
        section["memory_length"] = source.arguments["mem_len"]
    if source.arguments.get("clamp_len", -1) not in (-1, 0):  # neither clamps
        section["clamp_length"] = source.arguments["clamp_len"]
    section["same_length"] = bool(source.arguments.get("same_length", False))
    return section


def to_byteloom(source: Source, config: Any, symbols: list[int] | None, start: int | None) -> dict[str, Tensor]:
    """Return the weights by Byteloom's names."""
    width, hidden = config.width, config.feed_forward_width
    count, _ = source.matrix(TABLE)
    symbols = source.symbols_for(count, symbols, most=START)
    table, bias = torch.zeros(VOCABULARY + 1, width), torch.full((VOCABULARY + 1,), ABSENT)
    table[symbols] = source.take(TABLE, count, width)
    bias[symbols] = source.take(f"{HEAD}.bias", count)
    head = source.tensors.pop(f"{HEAD}.weight", None)
    if head is not None and not torch.equal(head, table[symbols]):
        raise ForeignFileError(f"{source.path}: {HEAD}.weight differs from {TABLE}; Byteloom ties them")
    source.tensors.pop("pos_emb.inv_freq", None)
    head_width = width // config.heads
    weights = {
        "embedding.weight": table[:VOCABULARY],
        "start": table[source.start_for(symbols, start)].clone(),
        "head_bias": bias[:VOCABULARY],
        "content_bias": source.take("r_w_bias", config.heads, head_width),
        "position_bias": source.take("r_r_bias", config.heads, head_width),
    }
    sizes = {"qkv_net": (3 * width, width), "CoreNet.0": (hidden, width), "CoreNet.3": (width, hidden)}
    for layer in range(config.layers):
        for theirs, own in NAMES.items():
            module, part = theirs.removeprefix("dec_attn.").removeprefix("pos_ff.").rsplit(".", 1)
            shape = (width,) if module == "layer_norm" else sizes.get(module, (width, width))
            shape = shape[:1] if part == "bias" else shape
            weights[f"blocks.{layer}.{own}"] = source.take(f"layers.{layer}.{theirs}", *shape)
    return weights


def from_byteloom(config: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return a dict with the state of the authors' module, the arguments of its constructor, and its symbols.

    If no id has the start's embedding, the start is a further symbol, which is never predicted.

    Raises:
        ForeignFileError: the model has a norm after its last block, which the format lacks.
    """
    if config.norm == "pre" and config.final_norm:
        raise ForeignFileError("model.final_norm is true; with norm: pre, the format has models without that norm only")
    table, start = weights["embedding.weight"], weights["start"]
    bias = weights.get("head_bias", torch.zeros(VOCABULARY))
    symbols = [id for id in range(VOCABULARY) if bias[id] > ABSENT]
    same = [id for id in symbols if torch.equal(table[id], start)]
    rows, biases = table[symbols], bias[symbols]
    if not same:
        symbols = [*symbols, START]
        rows, biases = torch.cat([rows, start[None]]), torch.cat([biases, torch.tensor([ABSENT])])
    state = {TABLE: rows, f"{HEAD}.weight": rows, f"{HEAD}.bias": biases}
    state |= {"r_w_bias": weights["content_bias"], "r_r_bias": weights["position_bias"]}
    state["pos_emb.inv_freq"] = 10_000.0 ** (-torch.arange(0.0, config.width, 2.0) / config.width)
    for layer in range(config.layers):
        for theirs, own in NAMES.items():
            name = f"blocks.{layer}.{own}"
            if name in weights:
                value = weights[name]
            else:  # a bias, in a model that has none
                value = torch.zeros(len(weights[name.removesuffix("bias") + "weight"]))
            state[f"layers.{layer}.{theirs}"] = value
    hidden = len(weights["blocks.0.feed_forward.expand.weight"])
    arguments = {"n_token": len(symbols), "n_layer": config.layers, "n_head": config.heads, "d_model": config.width}
    arguments |= {"d_head": config.width // config.heads, "d_inner": hidden, "dropout": 0.0, "dropatt": 0.0}
    arguments |= {"tgt_len": config.sequence_length, "ext_len": 0, "mem_len": config.memory_length}
    arguments |= {
        "pre_lnorm": config.norm == "pre",
        "same_length": config.same_length,
        "clamp_len": config.clamp_length or -1,
    }
    return {"model": state, "model_args": arguments, "symbols": symbols, "start": same[0] if same else START}
