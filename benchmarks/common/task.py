"""Settings that the models of comparison.py share, and their training by `byteloom compare`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.compared import flops_per_byte, model_tree
from common.corpora import byteloom

RECIPE = Path(__file__).parents[2] / "configs/comparison.yaml"
WARMUP = 0.1
"""Share of the steps in which the learning rate rises, unless their number is given."""


@dataclass(frozen=True)
class Task:
    """Training of models on one corpus."""

    corpus: str
    train: Path
    """Corpus to train on."""
    validation: Path
    """Corpus to score."""
    runs: Path
    """Folder of the runs."""
    size: str
    context: int
    """Bytes of a row; a Transformer-XL may have shorter rows."""
    batch: int
    """Bytes of every batch."""
    steps: int
    """Steps of MEGABYTE."""
    rate: float
    """Peak learning rate."""
    seeds: str
    """Seeds, by commas."""
    warmup: int | None = None
    """Steps in which the learning rate rises; None: WARMUP."""

    @property
    def title(self) -> str:
        """Name of the comparison, and beginning of the names of its runs."""
        warmup = "" if self.warmup is None else f"-warmup-{self.warmup}"
        return f"{self.size}-{self.corpus}-{self.context}-{self.steps}-at-{self.rate:g}{warmup}"

    @property
    def flops(self) -> float:
        """FLOPs of training that each model has."""
        return self.flops_of(model_tree(self.size, "MEGABYTE", self.context), self.steps)

    def flops_of(self, tree: dict[str, Any], steps: int) -> float:
        """Return the FLOPs of some steps of a model."""
        return steps * self.batch * flops_per_byte(tree)

    def trained(
        self, title: str, trees: dict[str, dict[str, Any]], flops: float, seeds: str | None = None
    ) -> dict[str, dict[str, Any]]:
        """Train the models that are not trained yet, and return the results of all.

        Args:
            title: name of the comparison.
            trees: section `model` by the model's name.
            flops: FLOPs of training that each model has.
            seeds: by commas; None for those of the task.

        Returns:
            The entries of `byteloom compare --json` by the model's name.
        """
        words = [f"{key_of(name)}={RECIPE}" for name in trees]
        for name, tree in trees.items():
            rows = self.batch // tree["sequence_length"]
            warmup = self.warmup or round(WARMUP * flops / self.batch / flops_per_byte(tree))
            fields = {
                "model": json.dumps(tree),
                "data.lanes": rows,
                "train.global_batch": rows,
                "train.micro_batch": rows,
                "optimizer.schedule.warmup_steps": warmup,
            }
            words += [f"{key_of(name)}:{field}={value}" for field, value in fields.items()]
        words += [f"run.root={self.runs}", f"data.shards={self.train}", f"validation.shards={self.validation}"]
        words += [f"optimizer.learning_rate={self.rate}", "engine.precision=bf16", "health.spike=ignore"]
        options = ("--flops", flops, "--name", title, "--seeds", seeds or self.seeds, "--json")
        entries = json.loads(byteloom("compare", *words, *options))["recipes"]
        by_key = {each["name"]: each for each in entries}
        return {name: by_key[key_of(name)] for name in trees}


def key_of(name: str) -> str:
    """Return the name of a model in the comparison."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
