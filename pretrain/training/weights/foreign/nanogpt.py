"""Checkpoints of karpathy/nanoGPT, as models of the family transformer.

nanoGPT reads an id and predicts the next one. Here a row begins with a learned start, so its first input is the
embedding of one of nanoGPT's ids: the separator, a newline or a space, unless `--start` names another.
"""

from typing import Any

import torch
from torch import Tensor

from data_pipeline.vocabulary import SEPARATOR, VOCABULARY
from pretrain.training.weights.foreign.source import ABSENT, ForeignFileError, Source

NAMES = {
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.query_key_value",
    "attn.c_proj": "attention.output",
    "ln_2": "feed_forward_norm",
    "mlp.c_fc": "feed_forward.expand",
    "mlp.c_proj": "feed_forward.contract",
}
"""Modules of a block by nanoGPT's names."""
ONLY = {
    "positions": "learned",
    "activation": "gelu",
    "window": None,
    "attention": "full",
    "attention_across_documents": True,
}
"""Config fields of the models that nanoGPT has."""


def config_of(source: Source) -> dict[str, Any]:
    """Return the section `model` of a recipe, as far as a checkpoint says."""
    symbols, width = source.matrix("transformer.wte.weight")
    length, _ = source.matrix("transformer.wpe.weight")
    layers = {name.split(".")[2] for name in source.tensors if name.startswith("transformer.h.")}
    has_biases = "transformer.h.0.attn.c_attn.bias" in source.tensors
    section: dict[str, Any] = {"family": "transformer", "sequence_length": length, "width": width, **ONLY}
    section |= {"layers": len(layers), "biases": has_biases or symbols < VOCABULARY}
    if "n_head" in source.arguments:
        section["heads"] = source.arguments["n_head"]
    return section


def to_byteloom(source: Source, config: Any, symbols: list[int] | None, start: int | None) -> dict[str, Tensor]:
    """Return the weights by Byteloom's names."""
    width, hidden = config.width, 4 * config.width
    count, _ = source.matrix("transformer.wte.weight")
    symbols = source.symbols_for(count, symbols)
    if len(symbols) < VOCABULARY and not config.biases:
        raise ForeignFileError(f"{source.path} has {count} of {VOCABULARY} ids; that takes model.biases=true")
    table = torch.zeros(VOCABULARY, width)
    table[symbols] = source.take("transformer.wte.weight", count, width)
    head = source.tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, table[symbols]):
        raise ForeignFileError(f"{source.path}: lm_head.weight differs from the embedding; Byteloom ties them")
    weights = {
        "embedding.weight": table,
        "start": table[source.start_for(symbols, start)].clone(),
        "positions": source.take("transformer.wpe.weight", config.sequence_length, width),
    }
    if config.biases:
        weights["head_bias"] = torch.full((VOCABULARY,), ABSENT)
        weights["head_bias"][symbols] = 0
    outputs = {"attn.c_attn": 3 * width, "mlp.c_fc": hidden}
    for layer in range(config.layers):
        theirs, own = f"transformer.h.{layer}", f"stack.blocks.{layer}"
        for buffer in ("bias", "masked_bias"):  # masks of old versions
            source.tensors.pop(f"{theirs}.attn.{buffer}", None)
        for name, module in NAMES.items():
            size = outputs.get(name, width)
            shape = (size,) if name.startswith("ln") else (size, hidden if name == "mlp.c_proj" else width)
            weights[f"{own}.{module}.weight"] = source.take(f"{theirs}.{name}.weight", *shape)
            if config.biases or name.startswith("ln"):
                weights[f"{own}.{module}.bias"] = _bias(source, f"{theirs}.{name}.bias", size)
    weights["stack.norm.weight"] = source.take("transformer.ln_f.weight", width)
    weights["stack.norm.bias"] = _bias(source, "transformer.ln_f.bias", width)
    return weights


def from_byteloom(config: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the content of nanoGPT's checkpoint file.

    If no id has the start's embedding, the difference to the separator's moves into the first position, which always
    reads the start.
    """
    table, start, positions = weights["embedding.weight"], weights["start"], weights["positions"].clone()
    bias = weights.get("head_bias", torch.zeros(VOCABULARY))
    symbols = [id for id in range(VOCABULARY) if bias[id] > ABSENT]
    if bool(bias[symbols].any()):
        raise ForeignFileError("the head has biases, and nanoGPT's has none")
    same = [id for id in (SEPARATOR, *symbols) if id in symbols and torch.equal(table[id], start)]
    first = same[0] if same else SEPARATOR
    if not same:
        positions[0] += start - table[SEPARATOR]
    state = {"transformer.wte.weight": table[symbols], "lm_head.weight": table[symbols]}
    state["transformer.wpe.weight"] = positions
    for layer in range(config.layers):
        for name, module in NAMES.items():
            for part in ("weight", "bias"):
                own = weights[f"stack.blocks.{layer}.{module}.weight"]
                value = weights.get(f"stack.blocks.{layer}.{module}.{part}", own.new_zeros(own.shape[0]))
                state[f"transformer.h.{layer}.{name}.{part}"] = value
    for part in ("weight", "bias"):
        state[f"transformer.ln_f.{part}"] = weights[f"stack.norm.{part}"]
    arguments = {"n_layer": config.layers, "n_head": config.heads, "n_embd": config.width, "bias": True}
    arguments |= {"block_size": config.sequence_length, "vocab_size": len(symbols), "dropout": 0.0}
    return {"model": state, "model_args": arguments, "symbols": symbols, "start": first}


def _bias(source: Source, name: str, size: int) -> Tensor:
    """Return a bias, or zeros where there is none."""
    return source.take(name, size) if name in source.tensors else torch.zeros(size)
