"""Weights of a checkpoint without adapters: each is added to the weight of its layer.

    model/q.weight, model/q.adapter_down.weight, model/q.adapter_up.weight ─ read_merged ─▶ q.weight

A run that trains adapters saves and resumes them as they are. Everything else that takes the weights of its checkpoints
comes here: `eval`, `generate`, exports, and new runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from byteloom.core.progress import Progress, ignore
from pretrain.checkpoint import Metadata, read
from pretrain.distributed.fragments import MODEL, Fragment, fragment_name, split_name, whole
from pretrain.distributed.world import ALONE, World
from pretrain.models.adapters import adapters_of, added, layer_of_adapter
from pretrain.models.finetune import finetune_of


def weight_shapes(checkpoint: Metadata) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a checkpoint by their names, without those of adapters."""
    names = ((split_name(fragment), stored.shape) for fragment, stored in checkpoint.tensors.items())
    return {name: shape for (kind, name), shape in names if kind == MODEL and layer_of_adapter(name) is None}


def read_merged(
    checkpoint: Metadata, fragments: Sequence[Fragment], progress: Progress = ignore, world: World = ALONE
) -> None:
    """Fill fragments from a checkpoint as `read` does, and add its adapters to the weights of their layers.

    Raises as `read` does.
    """
    read(checkpoint, fragments, progress, world)
    adapters = _adapters_in(checkpoint)
    if not adapters:
        return
    tensors = {name: tensor for pair in adapters.values() for name, tensor in pair.items()}
    read(checkpoint, [whole(fragment_name(MODEL, name), tensor) for name, tensor in tensors.items()], world=world)
    config = finetune_of(checkpoint.state["config"]).adapters
    for fragment in fragments:
        kind, name = split_name(fragment.name)
        if kind == MODEL and name in adapters:
            down, up = adapters[name].values()
            end = fragment.start + len(fragment.data)
            addition = added(down, up, config.alpha / config.rank, fragment.start, end)
            fragment.data.copy_(fragment.data.double() + addition.to(fragment.data.device))


def _adapters_in(checkpoint: Metadata) -> dict[str, dict[str, Tensor]]:
    """Return empty tensors for A and B of each adapter of a checkpoint, by name, by the name of its layer's weight."""
    names = [split_name(fragment)[1] for fragment in checkpoint.tensors]
    layers = dict.fromkeys(layer for name in names if (layer := layer_of_adapter(name)) is not None)
    return {
        layer: {name: torch.empty(checkpoint.tensors[fragment_name(MODEL, name)].shape) for name in adapters_of(layer)}
        for layer in layers
    }
