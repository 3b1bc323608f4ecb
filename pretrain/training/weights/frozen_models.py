"""Copies of the model whose entropies make a model's patches, in its run and in its exports.

    RUN/entropy_model/       from the first start on
    EXPORT/entropy_model/    card.json names it relative to the export

Each copy is an export itself. The config has its digest, so the copies and the original can stand for each other.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from byteloom.core.storage.files import atomic_folder
from pretrain.checkpoint import Metadata
from pretrain.models import ModelConfig
from pretrain.models.patching.frozen import digest_of, frozen_config

log = logging.getLogger(__name__)

COPY = "entropy_model"
"""Folder of the copy."""


def frozen_model(config: ModelConfig) -> Path | None:
    """Return the folder of the export that a model runs and does not train; None if there is none."""
    place = getattr(getattr(config, "patcher", None), "model", None)
    return None if place is None else Path(place)


def check_frozen_model(config: ModelConfig) -> None:
    """Check that the export that a model runs is there. Its weights are not read.

    Raises:
        FrozenModelError: there is no export, or another one than that with the recorded digest.
    """
    if (place := frozen_model(config)) is not None:
        frozen_config(str(place), getattr(config, "patcher").digest)  # noqa: B009 of its config


def with_run_copy(config: ModelConfig, run: Path) -> ModelConfig:
    """Return a model's config that names the copy in the run's folder, if the export that it names is gone."""
    place, copy = frozen_model(config), str(run / COPY)
    if place is None or digest_of(str(place)) is not None or (digest := digest_of(copy)) is None:
        return config
    log.warning("%s is gone; the patches are made by the run's copy, %s", place, copy)
    patcher: BaseModel = getattr(config, "patcher")  # noqa: B009 of its config
    recorded = getattr(patcher, "digest", None) or digest
    return config.model_copy(update={"patcher": patcher.model_copy(update={"model": copy, "digest": recorded})})


def copy_frozen_model(config: ModelConfig, folder: Path) -> None:
    """Copy the export that a model runs into a folder, unless it is there. Replace a copy of another export.

    Raises:
        OSError: it cannot be read or written.
    """
    source, target = frozen_model(config), folder / COPY
    if source is None:
        return
    if target.exists():
        if digest_of(str(source)) in (None, digest_of(str(target))):
            return
        shutil.rmtree(target)
    with atomic_folder(target) as copy:
        for path in sorted(source.iterdir()):
            if path.is_file():
                shutil.copyfile(path, copy / path.name)


def with_place(recipe: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a recipe whose model runs the export in a place, if it runs one."""
    patcher = recipe["model"].get("patcher")
    if not isinstance(patcher, dict) or "model" not in patcher:
        return dict(recipe)
    return {**recipe, "model": {**recipe["model"], "patcher": {**patcher, "model": place}}}


def with_copy(checkpoint: Metadata) -> Metadata:
    """Return a checkpoint whose model runs the copy of its run or export, if there is one with its digest."""
    folder, config = checkpoint.folder, checkpoint.state["config"]
    patcher = config["model"].get("patcher")
    if not isinstance(folder, Path) or not isinstance(patcher, dict) or "model" not in patcher:
        return checkpoint
    for parent in (folder, folder.parent, folder.parent.parent):  # an export; or RUN/checkpoints/step-00001200
        if (parent / COPY).is_dir() and digest_of(str(parent / COPY)) == patcher["digest"]:
            placed = with_place(config, str(parent / COPY))
            return replace(checkpoint, state={**checkpoint.state, "config": placed})
    return checkpoint
