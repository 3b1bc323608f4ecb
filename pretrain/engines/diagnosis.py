"""Norms by layer and gradient noise scale of a step, where the recipe asks for them.

    backward pass of a micro-batch ─▶ squares by micro-batch ─┐
    accumulated gradient, masters ──▶ squares by layer ───────┴─▶ sums of this rank ─▶ with the numbers of the step

Gradients are read before they are summed over passes and ranks, and before they are clipped. Nothing is changed. The
ranks have no exchange for this: their sums are in the vectors that they exchange in each step (step_numbers.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from pretrain.distributed.fragments import MODEL, Fragment, split_name
from pretrain.engines.blocks import named_units
from pretrain.engines.engine import StepResult
from pretrain.models.base import ByteModel

NOISE_SUMS = 3
"""Sums of a rank that the gradient noise is estimated from."""


class Diagnosed(Protocol):
    """An engine, as far as its gradients are measured."""

    model: ByteModel
    device: torch.device

    def watch_gradients(self, see: Callable[[Tensor], None]) -> Callable[[], None]:
        """Call a function with the gradients of each pass (see `BaseEngine`)."""

    def squares_of_gradient(self) -> Tensor:
        """Return sums of squares of the accumulated gradient (see `BaseEngine`)."""

    def owned_fragments(self) -> list[Fragment]:
        """Return the fragments that this rank owns."""


class Diagnosis:
    """Measurement of one step.

    Args:
        engine: of the step.
        has_noise: whether each rank's passes are those of whole micro-batches.
    """

    def __init__(self, engine: Diagnosed, *, has_noise: bool) -> None:
        self._engine, self._has_noise = engine, has_noise
        self._squares: list[Tensor] = []
        """Squared norm of the gradient of each pass: fp64 scalars on the device."""
        self._layers = layers_of(engine.model)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the gradients of the passes within."""
        end = self._engine.watch_gradients(self._see) if self._has_noise else lambda: None
        try:
            yield
        finally:
            end()

    def begin_pass(self) -> None:
        """Begin the pass of a micro-batch."""
        self._squares.append(torch.zeros((), dtype=torch.float64, device=self._engine.device))

    def _see(self, gradient: Tensor) -> None:
        """Add the gradient of a parameter to its pass."""
        square = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).double().square()
        self._squares[-1] += square.to(self._engine.device)

    def sums(self, scale: Tensor, target_bytes: Sequence[int]) -> Tensor:
        """Return this rank's sums, in fp64 on the device: those of the noise, then squares of the layers.

        It measures the accumulated gradient, and the weights before the update. All ranks call it.

        Args:
            scale: by which the passes multiplied the nats.
            target_bytes: of each micro-batch of this rank.
        """
        engine = self._engine
        gradients = engine.squares_of_gradient().to(engine.device)
        weights = squares_of_weights(engine.owned_fragments(), engine.model, engine.device)
        noise = self._noise_sums(scale, target_bytes)
        return torch.cat([noise, _by_layer(gradients, self._layers), _by_layer(weights, self._layers)])

    def _noise_sums(self, scale: Tensor, target_bytes: Sequence[int]) -> Tensor:
        """Return sums over the micro-batches: of their gradients' squared norms, of their inverse sizes, their count.

        A micro-batch's gradient is that of the mean over its own target bytes. Those without any do not count.
        """
        sums = torch.zeros(NOISE_SUMS, dtype=torch.float64, device=self._engine.device)
        if not self._has_noise:
            return sums
        counted = [(square, size) for square, size in zip(self._squares, target_bytes, strict=True) if size > 0]
        for square, size in counted:
            sums[0] += square / (scale * size).square()
        sums[1] += sum(1 / size for _, size in counted)
        sums[2] += len(counted)
        return sums

    def added_to(self, result: StepResult, by_rank: Sequence[Sequence[float]]) -> StepResult:
        """Return the result of the step with its measured numbers.

        Args:
            result: of the step.
            by_rank: sums of each rank.
        """
        sums = [math.fsum(of_ranks) for of_ranks in zip(*by_rank, strict=True)]
        first_weight = NOISE_SUMS + len(self._layers)
        numbers = noise_numbers(sums[:NOISE_SUMS], result.gradient_norm, result.target_bytes)
        for kind, squares in (("gradient", sums[NOISE_SUMS:first_weight]), ("weight", sums[first_weight:])):
            for layer, square in zip(self._layers, squares, strict=True):
                numbers[f"layer_{kind}_norm/{layer}"] = math.sqrt(square)
        return replace(result, diagnosis=numbers)


def noise_numbers(sums: Sequence[float], norm: float, target_bytes: int) -> dict[str, float]:
    """Return the gradient noise scale of a step (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

    A mean gradient over b bytes has E|g|^2 = |G|^2 + tr(S) / b. The micro-batches, of about b bytes, and the global
    batch, of B bytes, give two such equations, which are solved for the squared true gradient |G|^2 and the trace of
    the covariance tr(S). Both are unbiased and noisy, and may be negative: average each over steps before you divide.

    Args:
        sums: over all micro-batches: of the squared norms of their gradients, of their 1 / b, and their number.
        norm: norm of the gradient of the global batch.
        target_bytes: B.

    Returns:
        Both, and tr(S) / |G|^2 if it is positive: the bytes of a batch whose noise equals its signal. Nothing for fewer
        than two micro-batches.
    """
    square, inverse_size, count = sums
    if count < 2:
        return {}
    trace = (square / count - norm**2) / (inverse_size / count - 1 / target_bytes)
    signal = norm**2 - trace / target_bytes
    numbers = {"gradient_noise/trace": trace, "gradient_noise/signal": signal}
    return numbers | ({"gradient_noise/scale_bytes": trace / signal} if trace > 0 and signal > 0 else {})


def layers_of(model: ByteModel) -> dict[str, list[int]]:
    """Return the numbers of the parameters of each layer: of a block, or of one parameter outside of all blocks."""
    units = [name for name, _ in named_units(model)]
    layers: dict[str, list[int]] = {}
    for number, (name, _) in enumerate(model.named_parameters()):
        layer = next((unit for unit in units if name.startswith(f"{unit}.")), name)
        layers.setdefault(layer, []).append(number)
    return layers


def squares_of_weights(fragments: Sequence[Fragment], model: ByteModel, device: torch.device) -> Tensor:
    """Return the sum of squares of this rank's masters of each parameter: (parameters,), in fp64 on the device."""
    squares = {name: torch.zeros((), dtype=torch.float64, device=device) for name, _ in model.named_parameters()}
    for fragment in fragments:
        kind, name = split_name(fragment.name)
        if kind == MODEL:
            norm = torch.linalg.vector_norm(fragment.data, dtype=torch.float32).to(device)
            squares[name] += norm.double().square()
    return torch.stack(list(squares.values()))


def _by_layer(squares: Tensor, layers: dict[str, list[int]]) -> Tensor:
    """Return the sum of each layer, given numbers of the parameters."""
    of_parameter = squares.unbind()
    return torch.stack([torch.stack([of_parameter[i] for i in of_layer]).sum() for of_layer in layers.values()])
