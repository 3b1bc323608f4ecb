"""Folders that transformers has saved of a Byteloom model: `save_pretrained`, or a copy from the Hub."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.vocabulary import SEPARATOR
from pretrain.training.weights.foreign.source import ForeignFileError, Source, as_fp32

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_folder(folder: Path) -> Source:
    """Return the content of a folder, with the section `model` as an argument.

    Raises:
        ForeignFileError: it is no folder of a Byteloom model, or it is damaged.
        OSError: it cannot be read.
    """
    config = _read_json(folder / CONFIG)
    section = config.get("byteloom")
    if config.get("model_type") != "byteloom" or not isinstance(section, dict):
        raise ForeignFileError(f"{folder / CONFIG} is not that of a Byteloom model")
    names = [WEIGHTS]
    if (folder / INDEX).exists():
        files = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or any(Path(str(name)).name != name for name in files.values()):
            raise ForeignFileError(f"{folder / INDEX} has no weight_map of files in its own folder")
        names = sorted(set(files.values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            found = load_file(folder / name)
        except (SafetensorError, ValueError) as error:
            raise ForeignFileError(f"{folder / name} is not a whole safetensors file: {error}") from error
        tensors |= {key: as_fp32(folder / name, key, value) for key, value in found.items()}
    return Source(folder, tensors, section, separates_documents=config.get("bos_token_id") == SEPARATOR)


def config_of(source: Source) -> dict[str, Any]:
    """Return the section `model` of a recipe."""
    return source.arguments


def to_byteloom(source: Source, config: Any, symbols: list[int] | None, start: int | None) -> dict[str, Tensor]:
    """Return the weights, which have Byteloom's names already."""
    if symbols is not None or start is not None:
        raise ForeignFileError(f"{source.path} has Byteloom's own ids; leave out --symbols and --start")
    return {name: source.take(name, *source.shape(name)) for name in list(source.tensors)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ForeignFileError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ForeignFileError(f"{path} is damaged: it holds no object")
    return content
