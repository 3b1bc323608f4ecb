"""Exports: a checkpoint's weights in a form that other programs read, and their reading.

    model.safetensors    every parameter by its name, in fp32; where it would be larger than SHARD_BYTES,
                         model-00001-of-00003.safetensors and so on, with model.safetensors.index.json
    model.py, layers.py  the forward pass in plain torch, without Byteloom, if the family has a reference
    card.json            the model, its training data, its bits per byte, and the digest of each file
    entropy_model/       export of the model whose entropies make the patches, if there is one

An export has no moments and no data state. A new run can begin with it (`initialize.weights`); no run resumes from it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from byteloom.core.storage.files import atomic_folder
from byteloom.core.storage.state_files import StateFileError, read_json
from data_pipeline.media import CARD_FIELD
from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.checkpoint import InvalidCheckpointError, Metadata, StoredTensor, metadata_of_files
from pretrain.distributed.fragments import MODEL, fragment_name, split_name, whole
from pretrain.models import ModelConfig, family, model_config
from pretrain.models.base import FURTHER_HEADS
from pretrain.models.references import files_of
from pretrain.objectives import ObjectiveConfig
from pretrain.objectives.registry import FIRST_SPECIAL_ID
from pretrain.training.lineage import LINEAGE, stored_lineage
from pretrain.training.weights.frozen_models import COPY, copy_frozen_model, with_place
from pretrain.training.weights.merging import read_merged, weight_shapes

EXPORT_FORMAT = "byteloom-export/1"
"""Name and version of the format, in card.json."""
CARD = "card.json"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30
"""Largest size of a file, and of the memory that an export takes, unless one parameter is larger."""
PIECE_VALUES = 4 << 20
"""Values that are checked together."""


def _reference_files(card: dict[str, Any]) -> dict[str, str]:
    """Return the forward pass of a card's family in plain torch; nothing if the family has none."""
    reference = family(card["architecture"]).reference
    return files_of(reference) if reference else {}


def export(
    checkpoint: Metadata,
    out: Path,
    losses: dict[str, float],
    files: Callable[[dict[str, Any]], dict[str, str]] = _reference_files,
) -> dict[str, Any]:
    """Write a verified checkpoint's weights to a new folder, all or nothing; return the card.

    Args:
        checkpoint: verified.
        out: the new folder.
        losses: of the run after the checkpoint's step, by the scored corpus.
        files: returns the text files beside the weights by their names, given the card.

    Raises:
        FileExistsError: the folder exists already.
        OSError: it cannot be written.
    """
    sizes = weight_shapes(checkpoint)

    def read_some(names: list[str]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.empty(sizes[name]) for name in names}
        read_merged(checkpoint, [whole(fragment_name(MODEL, name), tensor) for name, tensor in tensors.items()])
        return tensors

    return _write(out, sizes, read_some, checkpoint.state["config"], _about(checkpoint, losses), files)


def without_further_heads(checkpoint: Metadata) -> Metadata:
    """Return a checkpoint without the heads of multi-byte prediction: its config and its tensors."""
    recipe = checkpoint.state["config"]
    if not recipe["model"].get("multi_byte"):
        return checkpoint
    state = checkpoint.state | {"config": recipe | {"model": recipe["model"] | {"multi_byte": None}}}
    kept = {
        name: stored for name, stored in checkpoint.tensors.items() if not split_name(name)[1].startswith(FURTHER_HEADS)
    }
    return replace(checkpoint, tensors=kept, state=state)


def write_export(
    out: Path, weights: Mapping[str, torch.Tensor], recipe: dict[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    """Write weights to the new folder of an export, all or nothing; return the card.

    Args:
        out: the new folder.
        weights: parameters by name, in fp32.
        recipe: the recipe; it needs a section `model`.
        about: further fields of the card.

    Raises:
        FileExistsError: the folder exists already.
        OSError: it cannot be written.
    """
    sizes = {name: value.shape for name, value in weights.items()}
    return _write(out, sizes, lambda names: {name: weights[name] for name in names}, recipe, about)


def _write(
    out: Path,
    sizes: Mapping[str, tuple[int, ...]],
    read_some: Callable[[list[str]], dict[str, torch.Tensor]],
    recipe: dict[str, Any],
    about: dict[str, Any],
    files: Callable[[dict[str, Any]], dict[str, str]] = _reference_files,
) -> dict[str, Any]:
    """Write the folder of an export, a file at a time; see `export` and `write_export`."""
    shards = list(_shards(sizes))
    parameters = sum(map(math.prod, sizes.values()))
    with atomic_folder(out) as folder:
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        for file_name, shard in zip(names, shards, strict=True):
            _save(read_some(shard), folder / file_name, out)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": 4 * parameters},
                "weight_map": {name: file for file, names in zip(names, shards, strict=True) for name in names},
            }
            _write_json(folder / INDEX, index)
        config = model_config(recipe["model"])
        copy_frozen_model(config, folder)
        recipe = with_place(recipe, COPY)
        card = {
            "format": EXPORT_FORMAT,
            "architecture": config.family,
            "model": with_place({"model": config.model_dump(mode="json")}, COPY)["model"],
            "parameters": parameters,
            "dtype": "float32",
            "vocabulary": _vocabulary(config),
            "objective": ObjectiveConfig.model_validate(recipe.get("objective", {})).model_dump(mode="json"),
            **about,
            "recipe": recipe,
            "files": {name: sha256_of(folder / name) for name in names},
        }
        _write_json(folder / CARD, card)
        for name, text in files(card).items():
            (folder / name).write_text(text, encoding="utf-8")
    return card


def _vocabulary(config: ModelConfig) -> dict[str, Any]:
    """Return the ids of a model: bytes, separator, padding, and those that its objective adds, if it has any."""
    special = getattr(config, "special_ids", 0)
    ids = {"size": VOCABULARY + special, "bytes": 256, "separator": SEPARATOR, "padding": PADDING}
    return ids | ({"special": {"first": FIRST_SPECIAL_ID, "count": special}} if special else {})


def is_export(folder: Path) -> bool:
    """Return whether a folder is an export."""
    return (folder / CARD).exists()


def read_export(folder: Path) -> Metadata:
    """Return an export as a checkpoint with nothing but weights and the recipe.

    Raises:
        InvalidCheckpointError: the export is damaged, or the folder is not an export.
    """
    card = _read_card(folder / CARD)
    tensors: dict[str, StoredTensor] = {}
    for number, (name, digest) in enumerate(card.files.items()):
        _refuse_other_folders(folder, name)
        try:
            if digest not in (None, sha256_of(folder / name)):  # null, where a person put other weights there
                raise InvalidCheckpointError(f"{folder / name} is not the file that {CARD} has the digest of")
            own = _tensors_in(folder / name, number)
        except OSError as error:
            raise InvalidCheckpointError(
                f"{folder / name} cannot be read: {error.strerror or error}; {folder / CARD} names it"
            ) from error
        if twice := own.keys() & tensors.keys():
            raise InvalidCheckpointError(f"{folder / name}: {_parameter(min(twice))} is in an earlier file too")
        tensors |= own
    state: dict[str, Any] = {"config": card.recipe.model_dump(), "precision": card.precision, CARD_FIELD: card.media}
    state = {name: value for name, value in state.items() if value is not None}
    if card.lineage:
        state[LINEAGE] = card.lineage
    return metadata_of_files(folder, list(card.files), tensors, state, f"sha256:{sha256_of(folder / CARD)}")


class _Data(BaseModel, extra="allow"):
    remote: dict[str, Any] = {}


class _Engine(BaseModel, extra="allow"):
    precision: str = "fp32"


class _Validation(BaseModel, extra="allow"):
    shards: str | None = None


class _Recipe(BaseModel, extra="allow"):
    """Fields of a recipe that commands read; a card written by hand needs only the section `model`."""

    model: dict[str, Any]
    data: _Data = _Data()
    engine: _Engine = _Engine()
    validation: _Validation = _Validation()


class _Card(BaseModel):
    """Fields of card.json that are read."""

    files: dict[str, str | None] = Field(min_length=1)
    """Names of files in the card's folder, each with its sha256; null for a file that a person replaced."""
    recipe: _Recipe
    precision: str | None = None
    """Precision of the run's passes."""
    media: dict[str, Any] | None = None
    """Layout of the training data, if it is media."""
    lineage: list[dict[str, Any]] = []
    """What the weights descend from; see pretrain/training/lineage.py."""


class _Format(BaseModel):
    format: str


def _read_card(path: Path) -> _Card:
    """Return a card.

    Raises:
        InvalidCheckpointError: it is damaged, or has another format.
    """
    advice = "take the export again from its run, by byteloom checkpoint export"
    try:
        stored = read_json(path, _Format, advice)
        if stored is not None and stored.format != EXPORT_FORMAT:
            raise InvalidCheckpointError(f"{path} has format {stored.format!r}; this version reads {EXPORT_FORMAT!r}")
        card = read_json(path, _Card, advice)
    except StateFileError as error:
        raise InvalidCheckpointError(str(error)) from error
    if card is None:
        raise InvalidCheckpointError(f"{path} is missing")
    try:
        model_config(card.recipe.model)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        field = ".".join(map(str, ("recipe", "model", *fault["loc"])))
        raise InvalidCheckpointError(f"{path}: {field}: {fault['msg']}; this version builds no such model") from error
    return card


def _refuse_other_folders(folder: Path, name: str) -> None:
    """Raise InvalidCheckpointError if the name of a card's file leads out of the card's folder."""
    is_plain = name not in ("", ".", "..") and not set(name) & set("/\\\0")
    if not is_plain or (folder / name).resolve().parent != folder.resolve():
        raise InvalidCheckpointError(
            f"{folder / CARD} names the file {json.dumps(name)}; a card may name only files in its own folder"
        )


def _tensors_in(path: Path, number: int) -> dict[str, StoredTensor]:
    """Return where the values of each tensor of a safetensors file lie.

    Args:
        path: of the file.
        number: the file's number among those of the export.

    Raises:
        InvalidCheckpointError: it is not a safetensors file, or a value is not finite.
        OSError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy"):  # checks the header, and that tensors make up the file
            pass
    except (SafetensorError, ValueError) as error:
        raise InvalidCheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise InvalidCheckpointError(f"{path}: {name} is in {entry['dtype']}; weights are taken in F32")
        shape, offset = tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0]
        tensors[fragment_name(MODEL, name)] = StoredTensor(shape, np.array([[number, offset, math.prod(shape)]]))
    _refuse_what_is_not_finite(path, tensors)
    return tensors


def _refuse_what_is_not_finite(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise InvalidCheckpointError if a value is NaN or infinite."""
    content = np.memmap(path, np.uint8, mode="r")
    counts = {}
    for name, tensor in tensors.items():
        ((_, offset, length),) = tensor.ranges.tolist()
        pieces = (
            content[offset + 4 * begin : offset + 4 * min(length, begin + PIECE_VALUES)].view(np.dtype("<f4"))
            for begin in range(0, length, PIECE_VALUES)
        )
        if count := sum(len(piece) - int(np.isfinite(piece).sum()) for piece in pieces):
            counts[_parameter(name)] = count
    if counts:
        first = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:3])
        more = f" and {len(counts) - 3} more" if len(counts) > 3 else ""
        raise InvalidCheckpointError(f"{path} has values that are NaN or infinite, in {first}{more}")


def _parameter(name: str) -> str:
    return split_name(name)[1]


def _shards(sizes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Yield the names of parameters, file by file."""
    shard: list[str] = []
    size = 0
    for name, shape in sizes.items():
        own = 4 * math.prod(shape)
        if shard and size + own > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += own
    yield shard


def _about(checkpoint: Metadata, losses: dict[str, float]) -> dict[str, Any]:
    """Return the fields of a card that say where a checkpoint comes from; fewer for one that is an export."""
    state = checkpoint.state
    config = state["config"]
    kept: dict[str, Any] = {key: state[key] for key in ("precision", CARD_FIELD) if key in state}
    kept[LINEAGE] = stored_lineage(checkpoint)
    if "reading" not in state:
        return kept
    return {
        ObjectiveConfig.model_validate(config.get("objective", {})).metric: losses,
        "run": config["run"]["name"],
        "step": state["reading"]["step"],
        "sequences": state["reading"]["next_sequence"],
        "corpus": {
            "fingerprint": state["fingerprint"],
            "shards": config["data"]["shards"],
            "mixture": {name: source["shards"] for name, source in config["data"]["mixture"].items()},
        },
        "environment": state["environment"],
        **kept,
    }


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(tensors: dict[str, torch.Tensor], path: Path, out: Path) -> None:
    """Write a safetensors file with the permissions that other new files have.

    Raises:
        OSError: it cannot be written; the message names `out`, the folder that it belongs to.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{out} cannot be written: {error}") from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors gives it to its owner alone


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
