"""Copies of parameters in the precision of the passes, made once a step.

    masters, fp32 ─ refresh, once a step ─▶ copies, bf16 ─ each pass ─▶ gradients of the copies, bf16
          ▲                                                                         │
          └───────────────── added to the masters' gradients, in fp32 ◀─────────────┘

For each parameter, bf16 passes move 6 bytes to make a copy, and 10 bytes to add a gradient: 2 read, 8 updated.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Copies:
    """Copies of a model's parameters in another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Make no copy yet.

        Args:
            dtype: of the copies.
        """
        self._dtype = dtype
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self.sums_in_place = True
        """Backward adds to the gradients of masters itself. False: autograd adds them, and DDP's hooks run."""
        self.see: Callable[[Tensor], None] | None = None
        """Called with each gradient of a pass."""

    def of(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> Callable[[], dict[str, Tensor]]:
        """Allocate copies of named parameters, and return the function that gives them to a pass by name."""
        copies = {name: (master, torch.empty_like(master, dtype=self._dtype)) for name, master in parameters}
        self._pairs.extend(copies.values())

        def of_pass() -> dict[str, Tensor]:
            if not torch.is_grad_enabled():
                return {name: copy for name, (_, copy) in copies.items()}
            return {name: _Copied.apply(master, copy, self) for name, (master, copy) in copies.items()}

        return of_pass

    def watch(self, see: Callable[[Tensor], None]) -> Callable[[], None]:
        """Call a function with each gradient of a pass; return the function that ends this."""
        self.see = see

        def end() -> None:
            self.see = None

        return end

    @torch.no_grad()
    def refresh(self) -> None:
        """Set all copies to the values of their masters."""
        for master, copy in self._pairs:
            copy.copy_(master)


class _Copied(torch.autograd.Function):
    """Cast of a parameter whose result exists already."""

    @staticmethod
    def forward(ctx: Any, master: nn.Parameter, copy: Tensor, copies: Copies) -> Tensor:
        ctx.master, ctx.copies = master, copies
        return copy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        master: nn.Parameter = ctx.master
        if ctx.copies.see is not None:
            ctx.copies.see(gradient)
        if ctx.copies.sums_in_place and master.grad is not None:
            master.grad.add_(gradient)
            return None, None, None
        return gradient.to(master.dtype), None, None
