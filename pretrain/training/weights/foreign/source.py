"""Foreign files: tensors by name, and the arguments of the model that they belong to."""

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.vocabulary import SEPARATOR, VOCABULARY
from pretrain.checkpoint import CheckpointError

START = VOCABULARY
"""Symbol for the input before the first id of a row."""
ABSENT = -1e4
"""Bias of the head for an id that a foreign vocabulary lacks. Its probability is 0 in fp32."""


class ForeignFileError(CheckpointError):
    """A file of another program cannot be imported, or a model cannot be exported for it."""


@dataclass
class Source:
    """Content of a foreign file."""

    path: Path
    tensors: dict[str, Tensor]
    """Tensors by the authors' names, in fp32. `take` removes them."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the authors' constructor, as far as the file has them."""
    symbols: list[int] | None = None
    """Id of each of the vocabulary's symbols, if the file says so."""
    start: int | None = None
    """Id with which rows begin, if the file says so."""
    separates_documents: bool = False
    """Whether documents follow a separator in training."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            ForeignFileError: there is no such tensor.
        """
        if name not in self.tensors:
            raise ForeignFileError(f"{self.path} has no {name}")
        return tuple(self.tensors[name].shape)

    def matrix(self, name: str) -> tuple[int, int]:
        """Return the shape of a matrix.

        Raises:
            ForeignFileError: there is no such tensor, or it has not two dimensions.
        """
        shape = self.shape(name)
        if len(shape) != 2:
            raise ForeignFileError(f"{self.path}: {name} has shape {list(shape)}, not two dimensions")
        return shape[0], shape[1]

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor of this shape, and remove it.

        Raises:
            ForeignFileError: there is no such tensor, it has another shape, or a value that is not finite.
        """
        if self.shape(name) != shape:
            raise ForeignFileError(f"{self.path}: {name} has shape {list(self.shape(name))}, not {list(shape)}")
        if count := int((~self.tensors[name].isfinite()).sum()):
            raise ForeignFileError(f"{self.path} has {count:,} values that are NaN or infinite, in {name}")
        return self.tensors.pop(name)

    def check_all_taken(self) -> None:
        """Raise ForeignFileError if tensors are left."""
        if self.tensors:
            names = list(self.tensors)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ForeignFileError(f"{self.path} has tensors that no such model has: {', '.join(names[:3])}{more}")

    def check_arguments(self, only: Mapping[str, Any]) -> None:
        """Raise ForeignFileError if an argument differs from the one value that Byteloom can express."""
        for name, value in only.items():
            if self.arguments.get(name, value) != value:
                raise ForeignFileError(
                    f"{self.path}: {name} is {self.arguments[name]!r}; Byteloom has models with {value!r} only"
                )

    def symbols_for(self, count: int, given: list[int] | None, most: int = VOCABULARY - 1) -> list[int]:
        """Return the id of each of `count` symbols: as given, as the file says, or the ids from 0 on.

        Args:
            count: symbols of the vocabulary.
            given: ids that the command names.
            most: largest id.

        Raises:
            ForeignFileError: they are not `count` different ids.
        """
        symbols = given or self.symbols
        if symbols is None and count > VOCABULARY:
            raise ForeignFileError(
                f"{self.path} has {count:,} symbols, and Byteloom has {VOCABULARY} ids; name their bytes by --symbols"
            )
        symbols = list(range(count)) if symbols is None else symbols
        if len(symbols) != count:
            raise ForeignFileError(f"{self.path} has {count:,} symbols, but {len(symbols):,} are named")
        if wrong := [symbol for symbol in symbols if symbol not in range(most + 1)]:
            raise ForeignFileError(f"{self.path}: a symbol is {wrong[0]!r}, which is no id from 0 to {most}")
        if twice := {symbol for symbol in symbols if symbols.count(symbol) > 1}:
            raise ForeignFileError(f"{self.path}: two symbols are the id {min(twice)}")
        return symbols

    def start_for(self, symbols: list[int], given: int | None) -> int:
        """Return the id with which rows begin: as given, as the file says, or one that the vocabulary has.

        Raises:
            ForeignFileError: the vocabulary lacks it.
        """
        stated = given if given is not None else self.start
        usual = (id for id in (START, SEPARATOR, ord("\n"), ord(" ")) if id in symbols)
        start = stated if stated is not None else next(usual, None)
        if start not in symbols:
            found = "no separator, newline or space" if start is None else f"no symbol {start}"
            raise ForeignFileError(f"{self.path} has {found}; say by --start with which id rows begin")
        return start


def read_torch(path: Path) -> Source:
    """Return the content of a torch file: tensors by name, or a dict of them as `model` beside `model_args`.

    Raises:
        ForeignFileError: it is no such file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of any kind
        raise ForeignFileError(
            f"{path} is no file of tensors, or it is damaged ({type(error).__name__}); a file that holds a model "
            "object would run code: write it again by torch.save(model.state_dict(), FILE)"
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ForeignFileError(f"{path} holds no tensors by name, nor a dict of them as `model`")
    about = content if state is not content else {}
    arguments, symbols, start = about.get("model_args", {}), about.get("symbols"), about.get("start")
    if not isinstance(arguments, dict):
        raise ForeignFileError(f"{path}: model_args is no dict")
    tensors = {str(name).removeprefix("_orig_mod."): as_fp32(path, name, value) for name, value in state.items()}
    return Source(path, tensors, arguments, symbols, start)


def read_numpy(path: Path) -> Source:
    """Return the content of an .npz file: arrays by name, and `arguments` as JSON.

    Raises:
        ForeignFileError: it is no such file.
        OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        arguments = json.loads(str(arrays.pop("arguments", "{}")))
    except (ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ForeignFileError(
            f"{path} is no .npz file of arrays, or it is damaged ({type(error).__name__})"
        ) from error
    if not isinstance(arguments, dict):
        raise ForeignFileError(f"{path}: arguments is no JSON object")
    tensors = {}
    for name, value in arrays.items():
        if value.dtype.kind != "f":
            raise ForeignFileError(f"{path}: {name} is in {value.dtype}; write it as float32")
        tensors[name] = torch.from_numpy(value.astype(np.float32))
    return Source(path, tensors, arguments)


def as_fp32(path: Path, name: object, value: Tensor) -> Tensor:
    """Return a tensor in fp32.

    Raises:
        ForeignFileError: it holds no real numbers.
    """
    if value.is_complex() or value.is_sparse or value.is_quantized:
        raise ForeignFileError(f"{path}: {name} is in {value.dtype}; weights are dense real numbers")
    return value.detach().float().contiguous()
