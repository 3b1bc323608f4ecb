"""The formats, and the ways through them: a file to an export folder, a checkpoint to a file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from byteloom.core.mappings import laid_over
from byteloom.core.storage.files import move_into_place, partial_path
from pretrain.checkpoint import Metadata
from pretrain.distributed.fragments import MODEL, fragment_name, whole
from pretrain.models import ModelConfig, build_model, model_config
from pretrain.training.weights.exports import sha256_of, without_further_heads, write_export
from pretrain.training.weights.foreign import hub_folder, nanogpt, perceiver_ar, transformer_xl
from pretrain.training.weights.foreign.source import ForeignFileError, Source, read_numpy, read_torch
from pretrain.training.weights.merging import read_merged, weight_shapes


@dataclass(frozen=True)
class ImportFormat:
    """A format of foreign weights that is read."""

    read: Callable[[Path], Source]
    config_of: Callable[[Source], dict[str, Any]]
    """Returns the section `model`, as far as a file says."""
    to_byteloom: Callable[[Source, Any, list[int] | None, int | None], dict[str, Tensor]]
    """Returns the weights by Byteloom's names, given the config, symbols and start."""


@dataclass(frozen=True)
class ExportFormat:
    """A format of the authors' code that is written."""

    family: str
    """Byteloom's family of its models."""
    from_byteloom: Callable[[Any, dict[str, Tensor]], dict[str, Any]]
    """Returns the content of a file."""
    write: Callable[[Path, dict[str, Any]], None]
    only: Mapping[str, Any]
    """Config fields that a model must have to be exported."""


def _write_torch(path: Path, content: dict[str, Any]) -> None:
    torch.save(content, path)


def _write_numpy(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **content)


IMPORTS = {
    "nanogpt": ImportFormat(read_torch, nanogpt.config_of, nanogpt.to_byteloom),
    "transformer-xl": ImportFormat(read_torch, transformer_xl.config_of, transformer_xl.to_byteloom),
    "perceiver-ar": ImportFormat(read_numpy, perceiver_ar.config_of, perceiver_ar.to_byteloom),
    "hf": ImportFormat(hub_folder.read_folder, hub_folder.config_of, hub_folder.to_byteloom),
}
"""Formats that are read, by their names on the command line."""
EXPORTS = {
    "nanogpt": ExportFormat("transformer", nanogpt.from_byteloom, _write_torch, nanogpt.ONLY),
    "transformer-xl": ExportFormat("transformer_xl", transformer_xl.from_byteloom, _write_torch, transformer_xl.ONLY),
    "perceiver-ar": ExportFormat("perceiver_ar", perceiver_ar.from_byteloom, _write_numpy, perceiver_ar.ONLY),
}
"""Formats of one file that are written. `pretrain.training.weights.hugging_face` writes hf."""


def import_foreign(
    form: str, path: Path, out: Path, given: Mapping[str, Any], symbols: list[int] | None, start: int | None
) -> dict[str, Any]:
    """Write an export folder of a foreign file, all or nothing; return its card.

    Args:
        form: name of the format.
        path: the file, or the folder of a model of transformers.
        out: the new folder.
        given: fields of the section `model`, which replace what the file says.
        symbols: id of each symbol of the vocabulary; None for what the file says, or the ids from 0 on.
        start: id with which rows begin; None for what the file says, or the separator, a newline or a space.

    Raises:
        ForeignFileError: the file is damaged or foreign, or Byteloom has no such model.
        FileExistsError: the folder exists already.
        OSError: a file cannot be read or written.
    """
    entry = IMPORTS[form]
    digest = sha256_of(path / hub_folder.CONFIG if path.is_dir() else path)
    source = entry.read(path)
    config = _config(path, laid_over(entry.config_of(source), given))
    weights = entry.to_byteloom(source, config, symbols, start)
    source.check_all_taken()
    _check_shapes(path, config, weights)
    recipe = {"model": config.model_dump(mode="json"), "data": {"separate_documents": source.separates_documents}}
    origin = {"format": form, "file": path.name, "sha256": digest}
    return write_export(out, weights, recipe, {"origin": origin})


def export_foreign(form: str, checkpoint: Metadata, out: Path) -> None:
    """Write a verified checkpoint's weights to a new file of a foreign format, all or nothing.

    Raises:
        ForeignFileError: the format cannot express the model.
        FileExistsError: the file exists already.
        OSError: it cannot be written.
    """
    entry, checkpoint = EXPORTS[form], without_further_heads(checkpoint)
    config = model_config(checkpoint.state["config"]["model"])
    if config.family != entry.family:
        raise ForeignFileError(f"{form} has models of the family {entry.family}; this is a {config.family}")
    for name, value in entry.only.items():
        if getattr(config, name) != value:
            raise ForeignFileError(f"model.{name} is {getattr(config, name)}; {form} has models with {value} only")
    weights = {name: torch.empty(shape) for name, shape in weight_shapes(checkpoint).items()}
    read_merged(checkpoint, [whole(fragment_name(MODEL, name), tensor) for name, tensor in weights.items()])
    content = entry.from_byteloom(config, weights)
    if out.exists():
        raise FileExistsError(f"{out} exists already")
    partial = partial_path(out)
    try:
        entry.write(partial, content)
        move_into_place(partial, out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _config(path: Path, section: dict[str, Any]) -> ModelConfig:
    """Return the config of a section `model`.

    Raises:
        ForeignFileError: a field is missing or wrong.
    """
    try:
        return model_config(section)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        field = ".".join(["model", *map(str, fault["loc"][1:])])
        if fault["type"] == "missing":
            raise ForeignFileError(f"{path} does not say {field}; add {field}=VALUE") from error
        raise ForeignFileError(f"{path}: {field}: {fault['msg']}") from error


def _check_shapes(path: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise ForeignFileError if weights are not those of the config's model."""
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in build_model(config).named_parameters()}
    found = {name: value.shape for name, value in weights.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise ForeignFileError(f"{path} does not fit this config of the model: {', '.join(wrong[:3])} would differ")
