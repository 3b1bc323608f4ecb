"""Haiku parameters of google-research/perceiver-ar, as models of the family perceiver_ar.

The authors' ids are padding, end, start, and bytes plus 3. Their rotary channels are pairs of neighbours, and their
positions count down to the last input; Byteloom's pairs are i and i + n/2, and its positions count up.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.training.weights.foreign.source import START, ForeignFileError, Source

IDS = [PADDING, SEPARATOR, START, *range(256)]
"""Byteloom's id of each of the authors' classes."""
ONLY_ARGUMENTS = {
    "num_classes": len(IDS),
    "initial_query_embed_style": "none",
    "initial_query_offsetting": False,
    "include_initial_cross_attention": True,
    "cross_attention_shape_for_attn": "kv",
    "encoder_use_query_residual": True,
    "num_latents_per_position": 1,
    "fraction_heads_to_rotate": 1.0,
}
"""Arguments of the models that Byteloom has."""
ONLY: dict[str, Any] = {"attention_across_documents": True}
"""Config fields of the models that the authors' code has."""
OF_IDS = ("embedding.", "head.")
"""Beginnings of the names of Byteloom's parameters that have a row for each id."""
ACTIVATIONS = {"sq_relu": "squared_relu", "relu": "relu", "gelu": "gelu_tanh"}
"""Byteloom's activations by the authors' names."""
FIELDS = {"max_wavelength": "sequence_length", "z_index_dim": "latents", "fraction_to_rotate": "rotary_fraction"}
FIELDS |= {"num_cross_attend_heads": "cross_heads", "additional_cross_attend_after_layers": "cross_attend_after"}
"""Config fields by the authors' arguments."""


def config_of(source: Source) -> dict[str, Any]:
    """Return the section `model` of a recipe, as far as a file says."""
    source.tensors = {_plain(name): value for name, value in source.tensors.items()}
    source.check_arguments(ONLY_ARGUMENTS)
    arguments = source.arguments
    blocks = {name.split("/")[0] for name in source.tensors}
    layers = sum(name.startswith("self_attention") for name in blocks)
    size: dict[str, Any] = {"width": source.matrix("linear/w")[1], "layers": layers}
    section: dict[str, Any] = {"family": "perceiver_ar", "latent_model": size, "attention_across_documents": True}
    section["input_width"] = source.matrix("embed/embeddings")[1]
    section |= {own: arguments[name] for name, own in FIELDS.items() if arguments.get(name) is not None}
    if "num_transformer_heads" in arguments:
        size["heads"] = arguments["num_transformer_heads"]
    if (activation := arguments.get("activation_name")) in ACTIVATIONS:
        section["activation"] = ACTIVATIONS[activation]
    elif activation is not None:
        raise ForeignFileError(f"{source.path}: Byteloom has no activation {activation}")
    if "embed_1/embeddings" in source.tensors:
        width, height, channels = (source.matrix(f"embed_{axis}/embeddings")[0] - 2 for axis in (1, 2, 3))
        section |= {"positions": "image", "image": [height, width, channels]}
        section["sequence_length"] = height * width * channels
        section.pop("rotary_fraction", None)
    elif arguments.get("position_encoding_type", "rotary") != "rotary":
        raise ForeignFileError(f"{source.path}: positions are rotary or those of an image; sinusoids count down there")
    return section


def to_byteloom(source: Source, config: Any, symbols: list[int] | None, start: int | None) -> dict[str, Tensor]:
    """Return the weights by Byteloom's names."""
    if symbols is not None or start is not None:
        raise ForeignFileError("Perceiver AR has ids of its own; leave --symbols and --start out")
    counts_down = not source.arguments.get("use_positions_from_data", False)
    counts_down &= not source.arguments.get("use_negative_rotary_positions", False)
    parts: dict[str, list[Tensor]] = {}
    for theirs, own, shape, heads in _parameters(config):
        value = source.take(theirs, *shape)
        value = value.T if theirs.endswith("/w") else value
        if own.startswith(OF_IDS):
            value = value[torch.tensor(IDS).argsort()]
        if heads:
            value = value[_turned_channels(config, len(value), heads, counts_down)]
        parts.setdefault(own, []).append(value)
    return {name: torch.cat(values).contiguous() for name, values in parts.items()}


def from_byteloom(config: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the arrays of the authors' parameters, and the arguments of their constructor as JSON."""
    left = dict(weights)
    arrays: dict[str, Any] = {}
    for theirs, own, shape, heads in _parameters(config):
        size = shape[-1] if theirs.endswith(("/w", "/b")) else shape[0]
        value, left[own] = left[own][:size], left[own][size:]
        if heads:
            value = value[_turned_channels(config, size, heads, counts_down=True).argsort()]
        if own.startswith(OF_IDS):
            value = value[torch.tensor(IDS)]
        module, _, part = theirs.rpartition("/")
        scope = "perceiver_ar/" if module == "layer_norm" else "perceiver_ar/~/"
        arrays[f"{scope}{module}/{part}"] = (value.T if part == "w" else value).contiguous().numpy()
    size = config.latent_model
    arguments = ONLY_ARGUMENTS | {name: getattr(config, own) for name, own in FIELDS.items()}
    arguments |= {"num_transformers_per_block": size.layers, "num_z_channels": size.width}
    arguments |= {"num_transformer_heads": size.heads, "input_embed_dim": config.input_width or size.width}
    arguments |= {"max_context_length": config.sequence_length, "input_idx_size": [-1]}
    arguments |= {"cross_attend_widening_factor": 4, "transformer_widening_factor": 4}
    arguments |= {"activation_name": {own: theirs for theirs, own in ACTIVATIONS.items()}[config.activation]}
    arguments |= {"position_encoding_type": "rotary"}
    if config.image is not None:
        arguments |= {"position_encoding_type": "absolute", "position_encoding": "random"}
        arguments |= {"learnable_position_embeddings": True, "use_positions_from_data": True}
        arguments |= {"input_idx_size": _table_sizes(config)}
    return {"arguments": json.dumps(arguments), **arrays}


def _parameters(config: Any) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Yield each parameter of the authors: its plain name, Byteloom's, its shape, and the heads of queries or keys.

    Parts of one parameter of Byteloom follow one another in its order. Heads are 0 where channels do not turn.
    """
    width, input_width = config.latent_model.width, config.input_width or config.latent_model.width

    def linear(theirs: str, own: str, inputs: int, outputs: int, heads: int = 0) -> Iterator[Any]:
        yield f"{theirs}/w", f"{own}.weight", (inputs, outputs), heads
        yield f"{theirs}/b", f"{own}.bias", (outputs,), heads

    def norm(theirs: str, own: str, size: int) -> Iterator[Any]:
        yield f"{theirs}/scale", f"{own}.weight", (size,), 0
        yield f"{theirs}/offset", f"{own}.bias", (size,), 0

    yield "embed/embeddings", "embedding.weight", (len(IDS), input_width), 0
    for axis, size in enumerate(_table_sizes(config)):
        yield f"embed_{axis + 1}/embeddings", f"position_tables.{axis}", (size, input_width), 0
    yield from linear("linear", "to_latents", input_width, width)
    counts = {"cross_attention": 0, "self_attention": 0}
    kinds = ["cross_attention"]
    for layer in range(config.latent_model.layers):
        kinds += ["self_attention"] + ["cross_attention"] * (layer in config.cross_attend_after)
    for index, kind in enumerate(kinds):
        theirs, own = f"{kind}_{counts[kind]}" if counts[kind] else kind, f"blocks.{index}"
        counts[kind] += 1
        if kind == "cross_attention":
            heads, inner, norms = config.cross_heads, input_width, ["attention_norm", "input_norm", "feed_forward_norm"]
            names = ["query", "key_value", "key_value"]
        else:
            heads, inner, norms = config.latent_model.heads, width, ["attention_norm", "feed_forward_norm"]
            names = ["query_key_value"] * 3
        heads *= config.positions == "rotary"
        attention = f"{theirs}/attention/linear"
        yield from linear(attention, f"{own}.attention.{names[0]}", width, inner, heads)
        yield from linear(f"{attention}_1", f"{own}.attention.{names[1]}", inner, inner, heads)
        yield from linear(f"{attention}_2", f"{own}.attention.{names[2]}", inner, inner)
        yield from linear(f"{attention}_3", f"{own}.attention.output", inner, width)
        yield from linear(f"{theirs}/dense/linear", f"{own}.feed_forward.expand", width, 4 * width)
        yield from linear(f"{theirs}/dense/linear_1", f"{own}.feed_forward.contract", 4 * width, width)
        for number, name in enumerate(norms):
            size = input_width if name == "input_norm" else width
            yield from norm(
                f"{theirs}/layer_norm_{number}" if number else f"{theirs}/layer_norm", f"{own}.{name}", size
            )
    yield from norm("layer_norm", "norm", width)
    yield from linear("logits", "head", width, len(IDS))


def _turned_channels(config: Any, channels: int, heads: int, counts_down: bool) -> Tensor:
    """Return the authors' channel at each of Byteloom's channels of queries or keys.

    A pair that turns backwards is the swapped pair that turns forwards.
    """
    head = channels // heads
    turned = int(head * config.rotary_fraction) // 2 * 2
    pairs = torch.arange(turned).view(-1, 2)
    first, second = pairs.flip(1).unbind(1) if counts_down else pairs.unbind(1)
    order = torch.cat([first, second, torch.arange(turned, head)])
    return (torch.arange(heads)[:, None] * head + order).flatten()


def _table_sizes(config: Any) -> list[int]:
    """Return the rows of the tables of column, row and channel."""
    if config.image is None:
        return []
    height, width, channels = config.image
    return [width + 2, height + 2, channels + 2]


def _plain(name: str) -> str:
    """Return a parameter's name without the model's and without Haiku's marks: ~."""
    return "/".join(part for part in name.split("/")[1:] if part != "~")
