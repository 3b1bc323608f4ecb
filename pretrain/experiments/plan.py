"""Plan of a comparison, stored so that the same command resumes it: ROOT/NAME.compare/compare.json."""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from byteloom.core.errors import CorrectableError
from byteloom.core.provenance import changes
from byteloom.core.storage.files import replace_file
from byteloom.core.storage.state_files import read_json
from pretrain.config.errors import ConfigError
from pretrain.config.schema import Config
from pretrain.experiments.budget import Budget

FREE_SECTIONS = frozenset(
    {"run", "loader", "checkpoint", "launch", "supervise", "tracking", "profile", "report", "samples", "callbacks"}
)
"""Sections that a resumed run of a set may change, because its numbers do not depend on them."""
FREE_OF_TRAIN = ("steps", "seed", "micro_batch")
"""Fields of `train` that may change: the budget and the seeds set them, or no number depends on them."""
SHOWN_CHANGES = 5
"""Most changed fields that an error names."""


class PlannedRecipe(BaseModel, frozen=True):
    """A recipe of a comparison, with the cost of a step and the steps that the budget pays for."""

    recipe: str
    """Name or path, as it was given."""
    config: dict[str, Any]
    """Fields that must not change, from `lasting_fields`."""
    parameters: int
    steps: int
    step_flops: int
    step_bytes: int
    step_seconds: float | None = None
    """Time of a step in the trial; None without a trial."""


class Plan(BaseModel):
    """Content of compare.json."""

    id: str
    """Identity of the comparison in MLflow."""
    budget: Budget
    recipes: dict[str, PlannedRecipe] = {}


def plan_file(folder: Path) -> Path:
    """Return the file of a plan."""
    return folder / "compare.json"


def read_plan(folder: Path, budget: Budget) -> Plan:
    """Return the plan of a comparison; a new one if it has none.

    Raises:
        ConfigError: it began with another budget.
        StateFileError: the file is damaged.
    """
    stored = read_json(plan_file(folder), Plan, "restore it, or choose another --name")
    if stored is None:
        return Plan(id=uuid.uuid4().hex, budget=budget)
    if stored.budget != budget:
        raise ConfigError(
            f"{folder} began with the budget {stored.budget}, and this command has {budget}; give the same budget, or "
            "choose another --name"
        )
    return stored


def save_plan(folder: Path, plan: Plan) -> None:
    """Write a plan."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(plan_file(folder), json.dumps(plan.model_dump(mode="json"), indent=1))


def check_same(folder: Path, name: str, planned: PlannedRecipe, config: Config) -> None:
    """Check that a recipe is the one that a comparison began with.

    Args:
        folder: of the comparison.
        name: of the recipe.
        planned: what was stored.
        config: the recipe now.

    Raises:
        ConfigError: it is another one.
    """
    now, whole = lasting_fields(config), config.as_tree()
    then = completed(
        {name: whole[name] for name in FREE_SECTIONS}
        | planned.config
        | {"train": {name: whole["train"][name] for name in FREE_OF_TRAIN} | planned.config["train"]}
    )
    if different := changes(planned.config if then is None else lasting_fields(then), now):
        more = f"; and {len(different) - SHOWN_CHANGES} more" if len(different) > SHOWN_CHANGES else ""
        raise ConfigError(
            f"recipe {name} has changed since {folder} began: {'; '.join(different[:SHOWN_CHANGES])}{more}; restore "
            "it, give it another name (OTHER=RECIPE), or choose another --name"
        )


def completed(stored: Mapping[str, Any]) -> Config | None:
    """Return a stored config with the defaults of fields that are newer than it; None if it is no longer valid."""
    try:
        return Config.model_validate(stored)
    except (ValidationError, CorrectableError):
        return None


def lasting_fields(config: Config) -> dict[str, Any]:
    """Return the fields of a recipe that must not change during a comparison, without its steps and its seed."""
    tree = {name: section for name, section in config.as_tree().items() if name not in FREE_SECTIONS}
    train: Mapping[str, Any] = tree["train"]
    tree["train"] = {name: value for name, value in train.items() if name not in FREE_OF_TRAIN}
    return tree
