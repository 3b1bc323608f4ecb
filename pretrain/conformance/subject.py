"""A model family at small size, and the form of a law about it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.vocabulary import SEPARATOR
from pretrain.models import ByteModel, FamilyError, ModelConfig, build_model, form_of, small_config
from pretrain.objectives import OBJECTIVES, Form, ObjectiveConfig, Visibility

SEED = 3
OPTION = "attention_across_documents"
"""Config field of families in which attention may stop at separators."""


class BrokenLawError(AssertionError):
    """A family breaks a law; the message says which positions, values or engines differ."""


@dataclass(frozen=True)
class Subject:
    """A family with a small config."""

    config: ModelConfig

    @classmethod
    def of(cls, name: str, **changes: Any) -> "Subject":
        """Return a family at the small size that it declares.

        Args:
            name: of the family.
            changes: other values of config fields.

        Raises:
            RegistryError: there is no family of this name, or it cannot be used.
            pydantic.ValidationError: the family declares no valid small model.
        """
        return cls(small_config(name, **changes))

    def build(self, dtype: torch.dtype = torch.float32) -> ByteModel:
        """Return a model in evaluation mode.

        Its parameters are first values plus noise of 0.1, so that zeros among first values hide no fault.
        """
        with torch.device("meta"):
            model = build_model(self.config)
        model.to_empty(device="cpu")
        torch.manual_seed(SEED)
        model.initialize()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        return model.to(dtype).eval()

    @property
    def objective(self) -> ObjectiveConfig:
        """First objective that trains the family."""
        for name in OBJECTIVES.names():
            objective = ObjectiveConfig(name=name)
            if objective.entry.reads_pairs:  # the rows of the laws are none
                continue
            try:
                form_of(self.config, objective)
            except FamilyError:
                continue
            return objective
        raise BrokenLawError(f"no objective trains the model family {self.config.family}")

    @property
    def form(self) -> Form:
        """Form of the examples of `objective`."""
        return form_of(self.config, self.objective)

    def example(self, rows: int, seed: int = SEED) -> tuple[Tensor, Tensor]:
        """Return (rows, n) random ids, and (rows, m) given ids, for a model that reads both."""
        form = self.form
        length = form.source_length if form.visibility is Visibility.encoder_decoder else form.length
        return self.ids(rows, form.length, seed), self.ids(rows, length, seed + 1)

    def arguments(self, rows: int, length: int | None = None) -> tuple[Tensor, ...]:
        """Return random arguments of a forward pass over rows of a length; None is the longest."""
        if self.form.visibility is Visibility.causal:
            return (self.ids(rows, length),)
        ids, given = self.example(rows)
        kept = length or ids.shape[1]
        return ids[:, :kept], given[:, :kept] if self.form.visibility is Visibility.bidirectional else given

    @property
    def sequence_length(self) -> int:
        """T: bytes of a training sequence."""
        return self.config.sequence_length

    def within_documents(self) -> "Subject":
        """Return the family with a model whose attention does not cross documents, if its config has the option."""
        if OPTION not in type(self.config).model_fields:
            return self
        return replace(self, config=type(self.config).model_validate(self.config.model_dump() | {OPTION: False}))

    def ids(self, rows: int, length: int | None = None, seed: int = SEED) -> Tensor:
        """Return (rows, length) random bytes and separators."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, SEPARATOR + 1, (rows, length or self.sequence_length), generator=generator)

    def short_documents(self, rows: int, seed: int = SEED) -> Tensor:
        """Return (rows, sequence_length) random bytes in documents of some four bytes."""
        ids = self.ids(rows, seed=seed)
        ends = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
        return ids.masked_fill(ends, SEPARATOR)


@dataclass(frozen=True)
class Law:
    """One statement about every family."""

    name: str
    statement: str
    check: Callable[[Subject, Path], None]
    """Called with a family and an empty folder for files. Raises BrokenLawError."""
    visibilities: frozenset[Visibility] = frozenset(Visibility)
    """Visibilities of the families that it is a law of."""

    def is_of(self, subject: Subject) -> bool:
        """Return whether it is a law of a family."""
        return subject.form.visibility in self.visibilities

    @classmethod
    def of(
        cls, check: Callable[..., None], name: str = "", visibilities: frozenset[Visibility] = frozenset(Visibility)
    ) -> "Law":
        """Return the law of a function `check_NAME`, whose docstring says "Check that" and the statement."""
        function = check.func if isinstance(check, partial) else check
        statement = (function.__doc__ or "").strip().removeprefix("Check that ")
        return cls(name or function.__name__.removeprefix("check_"), statement, check, visibilities)

    def __str__(self) -> str:
        """Return the name, which pytest shows."""
        return self.name


def require(holds: bool, fault: str) -> None:
    """Raise BrokenLawError with the fault unless a condition holds."""
    if not holds:
        raise BrokenLawError(fault)
