"""Rules that make patches without the model that reads these patches."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.evaluation.patches.finding import PatchedText, patches_of_rows, patches_of_rule
from pretrain.evaluation.scores import EvaluationError
from pretrain.models.document_entropies import ContextRule, ContextTracker, entropies_of
from pretrain.models.entropy_model import EntropyModel
from pretrain.models.patching.entropy import Entropy, EntropyConfig, find_threshold
from pretrain.models.patching.frozen import frozen_config
from pretrain.models.patching.rules import ByteClass, Fixed

ROWS = 16
"""Rows that a model of bytes reads at once."""

Progress = Callable[[int], None]
"""Callback with the number of bytes read since the last call."""


class RuleName(StrEnum):
    """Rules that need no model with patches."""

    byte_class = "byte_class"
    fixed = "fixed"
    entropy = "entropy"


@dataclass(frozen=True)
class RuleChoice:
    """A rule with its numbers. Those of another rule are None."""

    name: RuleName
    model: str | None = None
    """Export whose entropies decide."""
    size: int | None = None
    """Bytes of a fixed patch."""
    threshold: float | None = None
    """Entropy above which patches start, in nats. With `increase` too, both conditions must hold."""
    increase: float | None = None
    """Rise of the entropy from which patches start, in nats."""
    bytes_per_patch: float | None = None
    """Mean bytes of a patch, for which a threshold is found."""
    reset_at_newlines: bool = False
    """True: the model of bytes forgets what it read at each newline."""

    def __post_init__(self) -> None:
        """Check that the rule has its numbers and no others.

        Raises:
            EvaluationError: one is missing, or has no effect.
        """
        numbers = (self.threshold, self.increase, self.bytes_per_patch)
        if (self.name is RuleName.fixed) is (self.size is None):
            raise EvaluationError(f"--rule {self.name} {'needs' if self.size is None else 'takes no'} --size")
        if self.name is not RuleName.entropy:
            if self.model is not None:
                raise EvaluationError(f"--rule {self.name} shows patches without a model: leave out RUN")
            if self.reset_at_newlines or any(number is not None for number in numbers):
                raise EvaluationError(
                    "--threshold, --increase, --bytes-per-patch and --reset-at-newlines are for --rule entropy"
                )
            return
        if self.model is None:
            raise EvaluationError("--rule entropy needs the export of a model of bytes in place of RUN")
        if (self.bytes_per_patch is None) is (self.threshold is self.increase is None):
            raise EvaluationError("--rule entropy needs --bytes-per-patch, or --threshold or --increase or both")

    def patches(self, data: bytes, device: torch.device, progress: Progress) -> tuple[PatchedText, str]:
        """Return a text with the patches of the rule, and the rule in words.

        Args:
            data: the text, at least one byte.
            device: of the model of bytes.
            progress: called with the bytes read; a search for a threshold reads them too.

        Raises:
            FrozenModelError: the model of bytes cannot be used.
        """
        if self.name is RuleName.byte_class:
            return patches_of_rule(ByteClass(len(data)), data, progress), "rule byte_class"
        if self.size is not None:
            rule = Fixed(len(data), min(self.size, len(data)))  # a larger size has the same patches
            return patches_of_rule(rule, data, progress), f"rule fixed of size {self.size}"
        assert self.model is not None
        config = EntropyConfig(
            model=self.model,
            rule="global" if self.increase is None else "monotonic" if self.threshold is None else "combined",
            threshold=0.0 if self.bytes_per_patch is not None else self.threshold,
            increase=self.increase,
            reset_at_newlines=self.reset_at_newlines,
        )
        length = int(frozen_config(config.model, config.digest)["sequence_length"])
        model = EntropyModel(config, length, across_documents=True)
        if self.bytes_per_patch is not None:
            config = find_threshold(
                config, *entropies_of_rows(model, data, length, device, progress), self.bytes_per_patch
            )
        found = patches_of_rows(Entropy(length, config, model), data, length, ROWS, progress, device)
        named = {"threshold": config.threshold, "increase": config.increase}
        numbers = ", ".join(f"{name} {number:.4g}" for name, number in named.items() if number is not None)
        return found, f"rule entropy of {self.model}, {numbers}"


def entropies_of_rows(
    model: EntropyModel, data: bytes, length: int, device: torch.device, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Return the entropies of rows of a text, and what their positions read, (rows, length) each on the CPU.

    A row begins with a separator. The last one ends with padding.
    """
    ids = torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int64))
    ids = F.pad(ids, (0, -len(ids) % (length - 1)), value=PADDING).view(-1, length - 1)
    read, found = F.pad(ids, (1, 0), value=SEPARATOR), []
    for rows in read.split(ROWS):
        found.append(model.entropies(rows.to(device)).cpu())
        progress(int((rows < SEPARATOR).sum()))
    return torch.cat(found), read


def entropies_of_document(
    model: EntropyModel, data: bytes, length: int, device: torch.device, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Return the entropies of rows of a text that is one document, as they are stored beside a corpus.

    Arguments and results are those of `entropies_of_rows`. A row continues the one before it.
    """
    ids = np.frombuffer(data, np.uint8).astype(np.int16)
    tracker, found = ContextTracker(ContextRule.of(model)), []
    for first in range(0, len(ids), ROWS * length):
        found += entropies_of(model, [tracker.add(ids[first : first + ROWS * length])], device)
        progress(len(found[-1]))
    rest = -len(ids) % length
    predicted = F.pad(torch.from_numpy(ids).long(), (0, rest), value=PADDING).view(-1, length)
    entropies = F.pad(torch.from_numpy(np.concatenate(found)).float(), (0, rest)).view(-1, length)
    return entropies, F.pad(predicted[:, :-1], (1, 0), value=SEPARATOR)
