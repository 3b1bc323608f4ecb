"""Exports of models that another model runs and does not train: their digest, config and weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from byteloom.core.errors import CorrectableError
from byteloom.core.storage.locations import locate

CARD = "card.json"
"""File of an export that has the model's config, and the digest of each file of weights."""


class FrozenModelError(CorrectableError):
    """The export of a model that another model runs cannot be used."""


def digest_of(place: str) -> str | None:
    """Return the digest of an export's config and weights; None if there is no export."""
    try:
        card = _card(place)
    except FrozenModelError:
        return None
    return hashlib.sha256(json.dumps([card["model"], card["files"]], sort_keys=True).encode()).hexdigest()


def frozen_config(place: str, digest: str | None) -> dict[str, Any]:
    """Return the section `model` of an export.

    Args:
        place: its folder.
        digest: of its config and weights.

    Raises:
        FrozenModelError: there is no export, or another one.
    """
    card = _card(place)
    if (found := digest_of(place)) != digest:
        raise FrozenModelError(
            f"{place} is not the model that makes these patches: its digest is {found}, and model.patcher.digest is "
            f"{digest}; set model.patcher.model to the export with this digest, or to its copy in the run's folder"
        )
    config: dict[str, Any] = card["model"]
    return config


def frozen_weights(place: str) -> dict[str, Tensor]:
    """Return the parameters of an export by name.

    Raises:
        FrozenModelError: a file is missing or damaged.
    """
    from safetensors.torch import load  # noqa: PLC0415 only runs of such models read weights here

    weights: dict[str, Tensor] = {}
    for name, digest in _card(place)["files"].items():
        path = _folder(place) / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise FrozenModelError(f"{path} cannot be read: {error.strerror or error}") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise FrozenModelError(f"{path} is not the file that {CARD} has the digest of; take the export again")
        weights |= load(content)
    return weights


def _folder(place: str) -> Path:
    folder = locate(place)
    if not isinstance(folder, Path):
        raise FrozenModelError(f"model.patcher.model is {place}; copy this export into a folder, and name the folder")
    return folder


def _card(place: str) -> dict[str, Any]:
    """Return the card of an export.

    Raises:
        FrozenModelError: there is none.
    """
    try:
        card = json.loads((_folder(place) / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FrozenModelError(
            f"{place} is no export ({error}); write one with `byteloom checkpoint export RUN --out FOLDER`, and set "
            "model.patcher.model to the folder"
        ) from error
    if not isinstance(card, dict) or not {"model", "files"} <= card.keys() or None in card["files"].values():
        raise FrozenModelError(f"{place}/{CARD} has no model, or a file of weights without a digest")
    return card
