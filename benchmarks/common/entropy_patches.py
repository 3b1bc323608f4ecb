"""The model of bytes that decides where a BLT of comparison.py starts patches, and what it costs.

FLOPs of all ─┬─▶ model of bytes, STEPS at most ─▶ export ─▶ threshold on training text
              └─▶ the rest: the BLT, whose steps count a forward pass of the model of bytes
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byteloom.core.storage.files import replace_file
from common.compared import byte_model_tree
from common.corpora import byteloom
from common.task import Task
from data_pipeline.corpus.corpus import Corpus
from pretrain.models import build_model, model_config
from pretrain.training.weights.exports import write_export

STEPS = 200
"""Most steps of the model of bytes."""
SHARE = 2 / 3
"""Most steps of the model of bytes, as a share of MEGABYTE's."""
BYTES_PER_PATCH = 5.4
"""Mean length of the patches on all corpora: that of words in English books."""
SAMPLE = 1 << 17
"""Bytes of training text by which the threshold is found."""
NAME = "model of bytes"


@dataclass(frozen=True)
class ByteModel:
    """A trained model of bytes, and the rule of patches by its entropies."""

    trained: dict[str, Any]
    """Entry of `byteloom compare --json`."""
    patcher: dict[str, Any]
    """Section `model.patcher` of the BLT."""
    bytes_per_patch: float
    """Mean length of the patches on the sample."""

    def __str__(self) -> str:
        """Return its cost and results in a sentence."""
        trained = self.trained
        return (
            f"patches by entropy: a model of {trained['parameters']:,} parameters was trained for {trained['steps']:,} "
            f"steps ({trained['bytes'] / 1e6:.2f} MB, {trained['flops']:.3g} FLOPs, {trained['seconds']['mean']:.0f} s;"
            f" {trained['validation_loss']['mean']:.4f} bits per byte), and patches start above "
            f"{self.patcher['threshold']:.4f} nats: {self.bytes_per_patch:.2f} bytes a patch of training text"
        )


def byte_model(task: Task) -> ByteModel:
    """Train and export the model of bytes of a task, with its first seed, and find the threshold."""
    tree, title = byte_model_tree(task.size, task.context), f"{task.title}-entropy-model"
    flops = task.flops_of(tree, max(1, min(STEPS, round(SHARE * task.steps))))
    trained = task.trained(title, {NAME: tree}, flops, seeds=task.seeds.partition(",")[0])[NAME]
    folder = task.runs / f"{title}.compare"
    export, found, sample = folder / "export", folder / "threshold.json", folder / "sample"
    if not export.exists():
        byteloom("checkpoint", "export", task.runs / trained["runs"][0]["run"], "--out", export)
    if not found.exists():
        sample.write_bytes(stretches(task.train, task.context - 1))
        replace_file(found, byteloom("threshold", export, sample, "--bytes-per-patch", BYTES_PER_PATCH, "--json"))
    threshold = json.loads(found.read_text())
    return ByteModel(trained, threshold["patcher"], threshold["bytes_per_patch"])


def export_untrained(tree: dict[str, Any], folder: Path) -> None:
    """Write an export of a model with random weights, which does the work of a trained one.

    Args:
        tree: section `model` of its recipe.
        folder: of the export.
    """
    config = model_config(tree)
    weights = {name: parameter.detach() for name, parameter in build_model(config).named_parameters()}
    write_export(folder, weights, {"model": config.model_dump(mode="json")}, {})


def stretches(corpus: Path, length: int) -> bytes:
    """Return stretches of a corpus, at equal distances: SAMPLE bytes together, or the whole of a smaller corpus.

    Args:
        corpus: the corpus.
        length: bytes of a stretch.
    """
    text = b"".join(piece.content for piece in Corpus(corpus).pieces())
    count = SAMPLE // length
    if len(text) <= count * length:
        return text
    starts = [number * (len(text) - length) // max(count - 1, 1) for number in range(count)]
    return b"".join(text[start : start + length] for start in starts)
