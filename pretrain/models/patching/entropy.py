"""Patches that start where a model of bytes is uncertain of the next byte (BLT, arXiv:2412.09871, section 2.3).

    positions   start  T    h    e    ·    c    a    t        what each position reads
    entropy      4.1  2.9  1.2  0.6  3.8  2.2  0.9  0.4       of the prediction that follows it, in nats
    starts        1    1    0    0    1    1    0    0        rule global, threshold 2

The entropy at a position depends on what was read up to it, so a prefix has the patches that it has in the whole row.
"""

import math
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from byteloom.core.storage.locations import LocationText
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.models.patching.frozen import digest_of
from pretrain.models.patching.patcher import Decision, Patcher, PatchState

STEPS_OF_SEARCH = 50
"""Halvings of the interval in which a threshold is searched."""
PRECISION = 10**6
"""Inverse of the step to which a threshold is rounded, in 1 / nats."""


class EntropyConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Patches start where a small model of bytes is uncertain of the next byte: BLT (arXiv:2412.09871, section 2.3)."""

    name: Literal["entropy"] = "entropy"
    """Rule of the patches."""
    model: LocationText
    """Folder of the export of a model of bytes. It is not trained. A run has a copy of it, and so has an export."""
    digest: str | None = None
    """Digest of that export's config and weights. A recipe need not name it. A run records it, and refuses others."""
    rule: Literal["global", "monotonic", "combined"] = "global"
    """Condition of a start. global: the entropy is above the threshold. monotonic: it has risen by more than
    `increase`. combined: both; not at the third position of a document."""
    threshold: float | None = None
    """Entropy in nats, of the rules global and combined. The authors' code has 1.335442066 by default."""
    increase: float | None = None
    """Rise of the entropy since the position before, in nats, of the rules monotonic and combined."""
    max_patch_length: int | None = Field(default=None, ge=1)
    """Longest patch, in bytes. Longer ones are cut into patches of this length and a rest. Null: any length."""
    reset_at_newlines: bool = False
    """True: the small model forgets what it read at each newline byte. A line is then a document to it."""
    entropies: Literal["inline", "corpus"] = "inline"
    """Source of the entropies in training. inline: the small model reads each row in the forward pass. corpus: they are
    read beside the corpus, where `byteloom entropies` writes them; an entropy then depends on its document alone."""

    @property
    def has_contexts(self) -> bool:
        """True if an entropy depends on its document or line alone. False if it depends on the row around it."""
        return self.reset_at_newlines or self.entropies == "corpus"

    @model_validator(mode="before")
    @classmethod
    def _record_digest(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("digest") is None and isinstance(tree.get("model"), str):
            return {**tree, "digest": digest_of(tree["model"])}
        return tree

    @model_validator(mode="after")
    def _rule_has_its_numbers(self) -> Self:
        needed = {"global": {"threshold"}, "monotonic": {"increase"}, "combined": {"threshold", "increase"}}[self.rule]
        for name in ("threshold", "increase"):
            if (getattr(self, name) is not None) != (name in needed):
                raise ValueError(f"rule {self.rule} {'needs' if name in needed else 'has no'} {name}")
        return self


class ByteDecoder(Protocol):
    """Decoder of a model; see `Decoder`."""

    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; return the logits of the next id."""

    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; return the logits of the next id."""


class Uncertainty(Protocol):
    """Model of bytes that is not trained."""

    def entropies(self, read: Tensor) -> Tensor:
        """Map (rows, n) ids that positions of whole rows read to (rows, n) entropies of what follows, in nats."""

    def decoder(self, rows: int, device: torch.device) -> ByteDecoder:
        """Return a new decoder of `rows` rows."""

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products of `entropies` over one row."""

    def weight_bytes(self) -> int:
        """Return the bytes of the weights on a device."""

    def on(self, device: torch.device) -> Any:
        """Return the model on a device. The first call for a device reads the weights.

        Raises:
            FrozenModelError: a file is missing or damaged.
        """


class Entropy(Patcher):
    """A patch starts where a model of bytes is uncertain of the next byte.

    Before its first step, a state holds what was read. From then on it holds the model's decoder, which a step changes.
    """

    def __init__(self, capacity: int, config: EntropyConfig, model: Uncertainty) -> None:
        """Make the rule.

        Args:
            capacity: patches that a row may have.
            config: the rule and its numbers.
            model: whose entropies decide. It is no part of the module: it is not trained, sharded or cast.
        """
        super().__init__(capacity)
        self.config, self.model = config, model

    def rule(self, read: Tensor, state: PatchState, hidden: Tensor | None) -> Decision:
        """Return where the entropies meet the condition; see `Patcher.forward`.

        Args:
            read: ids of the positions.
            state: before them.
            hidden: (rows, n) entropies of whole rows, if they are known.
        """
        memory, decoder = state.memory, state.decoder
        if hidden is not None:
            entropies, kept = hidden.float(), {"read": read}
        elif not state.length:
            entropies, kept = self.model.entropies(read), {"read": read}
        else:
            if decoder is None:
                decoder = self.model.decoder(len(read), read.device)
                decoder.prime(memory["read"][:, 1:])
            steps = [entropy_of(decoder.step(ids)) for ids in read.unbind(1)]
            entropies, kept = torch.stack(steps, 1), {}
        if self.config.entropies == "corpus":  # the precision of those that are stored
            entropies = entropies.half().float()
        starts, carried = entropy_starts(self.config, entropies, read, memory)
        return Decision(starts, memory=carried | kept, decoder=decoder)

    def prepare(self, device: torch.device) -> None:
        """Read the weights of the model whose entropies decide.

        Raises:
            FrozenModelError: a file is missing or damaged.
        """
        self.model.on(device)

    def flops(self, length: int) -> int:
        """Return the operations of the model whose entropies decide: none if a corpus has them."""
        return 0 if self.config.entropies == "corpus" else self.model.flops(length)

    def frozen_bytes(self) -> int:
        """Return the bytes of the weights of that model."""
        return self.model.weight_bytes()


def entropy_starts(
    config: EntropyConfig, entropies: Tensor, read: Tensor, memory: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return where the entropies meet the condition, and what the next positions need.

    Args:
        config: the condition.
        entropies: (rows, n) nats.
        read: (rows, n) ids that the positions read.
        memory: what an earlier call returned; {}: these are the first positions of their rows.
    """
    since = _distances(read == SEPARATOR, memory.get("since"))
    before = entropies[:, :1] if not memory else memory["entropy"][:, None]
    risen = entropies - torch.cat([before, entropies[:, :-1]], 1)
    threshold = math.inf if config.threshold is None else config.threshold
    increase = math.inf if config.increase is None else config.increase
    if config.rule == "global":
        starts = (entropies > threshold) & (since >= 1)
    elif config.rule == "monotonic":
        starts = (since == 1) | ((risen > increase) & (since >= 2))
    else:
        both = (risen > increase) & (entropies > threshold)
        starts = (since == 1) | (both & (since >= 3))
    carried = {"since": since[:, -1], "entropy": entropies[:, -1]}
    if config.max_patch_length is not None:
        starts = starts | (read == SEPARATOR)
        length = _distances(starts, memory.get("length"))
        starts = starts | (length % config.max_patch_length == 0)
        carried["length"] = length[:, -1]
    return starts, carried


def entropy_of(logits: Tensor) -> Tensor:
    """Map (..., symbols) logits to the entropies of their distributions, (...) nats."""
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def find_threshold(config: EntropyConfig, entropies: Tensor, read: Tensor, bytes_per_patch: float) -> EntropyConfig:
    """Return a config whose patches have a mean length.

    Args:
        config: its `increase` is changed if the rule is monotonic, its `threshold` if not.
        entropies: (rows, n) nats, of a sample of rows.
        read: (rows, n) ids that the positions read; padding does not count.
        bytes_per_patch: mean length.
    """
    name = "increase" if config.rule == "monotonic" else "threshold"
    counted = read != PADDING
    wanted = int(counted.sum()) / bytes_per_patch
    low, high = -float(entropies.max()), float(entropies.max())
    for _ in range(STEPS_OF_SEARCH):
        middle = (low + high) / 2
        changed = config.model_copy(update={name: middle})
        starts, _ = entropy_starts(changed, entropies, read, {})
        if int(((starts | (read == SEPARATOR)) & counted).sum()) > wanted:
            low = middle
        else:
            high = middle
    return config.model_copy(update={name: math.ceil(high * PRECISION) / PRECISION})


def _distances(marks: Tensor, before: Tensor | None) -> Tensor:
    """Return the positions since the last mark, 0 at a mark.

    Args:
        marks: (rows, n) booleans.
        before: (rows,) distance at the position before these; None: there is none.
    """
    places = torch.arange(marks.shape[1], device=marks.device)
    first = -1 if before is None else -1 - before[:, None]
    last = torch.where(marks, places, first).cummax(1).values
    return places - last
