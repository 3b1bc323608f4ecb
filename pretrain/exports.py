"""Exports: a checkpoint's weights in a form that other programs read, and back.

    model.safetensors    every parameter by its name, in fp32; where it would be larger than SHARD_BYTES,
                         model-00001-of-00003.safetensors and so on, with model.safetensors.index.json
    card.json            what the model is, what it was trained on, how good it was, and the digest of each file

No moments, no data state: from an export a new run can begin (`initialize.weights`), and none go on.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from data_pipeline.atomic import atomic_folder
from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.checkpoint import InvalidCheckpointError, Metadata, StoredTensor, described, read
from pretrain.fragments import whole

FORMAT = "byteloom-export/1"
CARD = "card.json"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30
"""Of one file, and of the memory that an export takes; more only for a parameter that is larger."""
KIND = "model/"
"""Before the names of parameters in a checkpoint."""


def export(checkpoint: Metadata, out: Path, bits_per_byte: dict[str, float]) -> dict[str, Any]:
    """Writes a verified checkpoint's weights to a new folder, which is whole or not there; returns the card.

    Args:
        bits_per_byte: of the run at the end of the checkpoint's step, by what was scored.
    Raises:
        FileExistsError: the folder exists already.
    """
    shards = list(_shards(checkpoint))
    with atomic_folder(out) as folder:
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        for file_name, parameters in zip(names, shards, strict=True):
            tensors = {name: torch.empty(checkpoint.tensors[KIND + name].shape) for name in parameters}
            read(checkpoint, [whole(KIND + name, tensor) for name, tensor in tensors.items()])
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": 4 * _parameters(checkpoint)},
                "weight_map": {name: file for file, names in zip(names, shards, strict=True) for name in names},
            }
            _write_json(folder / INDEX, index)
        card = _card(checkpoint, bits_per_byte)
        card["files"] = {name: _sha256(folder / name) for name in names}
        _write_json(folder / CARD, card)
    return card


def is_export(folder: Path) -> bool:
    return (folder / CARD).exists()


def read_export(folder: Path) -> Metadata:
    """An export, as a checkpoint that has weights and the recipe alone.

    Raises:
        InvalidCheckpointError: it is damaged, or no export.
    """
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["format"] != FORMAT:
            raise InvalidCheckpointError(f"{path} has format {card['format']!r}; this version reads {FORMAT!r}")
        tensors = {}
        for number, (name, digest) in enumerate(card["files"].items()):
            if digest not in (None, _sha256(folder / name)):  # null, where a person put other weights there
                raise InvalidCheckpointError(f"{folder / name} is not the file that {CARD} has the digest of")
            tensors.update(_tensors_in(folder, name, number))
        state = {"config": card["recipe"]} | {key: card[key] for key in ("precision",) if key in card}
        return described(folder, list(card["files"]), tensors, state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidCheckpointError(f"{folder} is no whole export: {error!r}") from error


def _tensors_in(folder: Path, name: str, number: int) -> dict[str, StoredTensor]:
    """Where the values of each tensor of a safetensors file lie, which has this number among the files."""
    with (folder / name).open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    tensors = {}
    for tensor, told in header.items():
        if tensor == "__metadata__":
            continue
        if told["dtype"] != "F32":
            raise InvalidCheckpointError(f"{folder / name}: {tensor} is in {told['dtype']}; weights are taken in F32")
        shape, offset = tuple(told["shape"]), 8 + header_bytes + told["data_offsets"][0]
        tensors[KIND + tensor] = StoredTensor(shape, np.array([[number, offset, math.prod(shape)]]))
    return tensors


def _shards(checkpoint: Metadata) -> Iterator[list[str]]:
    """The names of parameters, file by file."""
    shard: list[str] = []
    size = 0
    for name, stored in checkpoint.tensors.items():
        if not name.startswith(KIND):
            continue
        own = 4 * math.prod(stored.shape)
        if shard and size + own > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name.removeprefix(KIND))
        size += own
    yield shard


def _card(checkpoint: Metadata, bits_per_byte: dict[str, float]) -> dict[str, Any]:
    state = checkpoint.state
    config = state["config"]
    return {
        "format": FORMAT,
        "architecture": config["model"]["family"],
        "model": config["model"],
        "parameters": _parameters(checkpoint),
        "dtype": "float32",
        "vocabulary": {"size": VOCABULARY, "bytes": 256, "separator": SEPARATOR, "padding": PADDING},
        "bits_per_byte": bits_per_byte,
        "run": config["run"]["name"],
        "step": state["reading"]["step"],
        "sequences": state["reading"]["next_sequence"],
        "corpus": {
            "fingerprint": state["fingerprint"],
            "shards": config["data"]["shards"],
            "mixture": {name: source["shards"] for name, source in config["data"]["mixture"].items()},
        },
        "environment": state["environment"],
        **{key: state[key] for key in ("precision",) if key in state},
        "recipe": config,
    }


def _parameters(checkpoint: Metadata) -> int:
    return sum(math.prod(stored.shape) for name, stored in checkpoint.tensors.items() if name.startswith(KIND))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
