"""Muon for the matrices within blocks, and AdamW for the other parameters."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain.models.base import ByteModel
from pretrain.optim import adamw
from pretrain.optim.config import OptimizerConfig, decoupled_decay_warnings
from pretrain.optim.groups import parameter_groups, parameter_rules, with_moments
from pretrain.optim.registry import OptimizerEntry, register_optimizer

MOMENTUM = "momentum_buffer"
"""Name of the mean of gradients of a matrix."""
ITERATIONS = 5
"""Iterations of Newton and Schulz."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of X, (X Xᵀ) X and (X Xᵀ)² X in an iteration (Jordan 2024)."""
SMALLEST_NORM = 1e-7
"""Smallest divisor of a matrix before the iterations."""
USUAL_STEP = 0.2
"""Root mean square of AdamW's usual step, in learning rates (Liu et al. 2025, section 2.2)."""


class Muon(Optimizer):
    """Muon (Jordan 2024), at updates of AdamW's size (Liu et al. 2025, arXiv:2502.16982).

    A parameter may hold several logical matrices, such as those of queries, keys and values. Each has its own update.

    Ranks that hold rows of a parameter exchange what its update needs as in algorithm 1 of Liu et al., Distributed
    Muon: each rank keeps the momentum of its rows, all ranks gather the whole matrix in bf16, the precision of the
    iterations, and each rank takes its rows of the result. Every update is then that of one process, for two bytes a
    number. Each rank repeats the iterations of the others.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float,
        momentum: float,
        matrices: Mapping[nn.Parameter, int],
    ) -> None:
        """Make the optimizer, without moments.

        Args:
            groups: groups of parameters of two dimensions, each with its weight decay.
            lr: learning rate of all groups.
            momentum: decay per step of the mean of gradients.
            matrices: number of logical matrices of equal rows that a parameter holds; 1 if it is not among them.
        """
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        self._matrices = dict(matrices)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # engines pass no closure
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter][MOMENTUM]
                mean.lerp_(parameter.grad, 1 - momentum)
                whole, own_rows = _gathered(parameter.grad.lerp(mean, momentum).bfloat16())
                parts = whole.chunk(self._matrices.get(parameter, 1))
                size = USUAL_STEP * math.sqrt(max(parts[0].shape))
                update = own_rows(torch.cat([orthogonalized(part) for part in parts]))
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-rate * size)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return about U Vᵀ of a bf16 matrix U S Vᵀ; its singular values are about 0.7 to 1.2 (Jordan 2024)."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def _gathered(update: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return all rows of an update, and a function that returns this rank's part of a tensor of all rows.

    The gathered rows are on the device of the ranks, also if they are held in the host's memory.
    """
    if not hasattr(update, "device_mesh"):
        return update, lambda whole: whole
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415 it takes a second, and few need it

    assert isinstance(update, DTensor)
    mesh, placements = update.device_mesh, update.placements
    own = update.to_local()
    shape: dict[str, Any] = {"shape": update.shape, "stride": update.stride()}
    on_device = DTensor.from_local(own.to(mesh.device_type), mesh, placements, run_check=False, **shape)

    def own_rows(whole: Tensor) -> Tensor:
        replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        part = replicated.redistribute(placements=placements).to_local().to(own.device)
        return DTensor.from_local(part, mesh, placements, run_check=False, **shape)

    return on_device.full_tensor(), own_rows


def _matrices(model: ByteModel) -> dict[str, nn.Parameter]:
    outside = model.outside_units()
    return {name: p for name, p in model.trained_parameters().items() if name not in outside and p.dim() == 2}


def _build(config: OptimizerConfig, model: ByteModel) -> list[Optimizer]:
    rules, matrices = parameter_rules(config, model), _matrices(model)
    rest = {name: p for name, p in model.trained_parameters().items() if name not in matrices}
    fused = {matrices[name]: number for name, number in model.fused_matrices().items() if name in matrices}
    groups = parameter_groups(config, matrices, rules)
    built: list[Optimizer] = []
    if matrices:
        built.append(with_moments(Muon(groups, config.learning_rate, config.momentum, fused), MOMENTUM))
    if rest:
        built.append(adamw.adam_with_moments(config, rest, rules))
    return built


def _moment_values(model: ByteModel) -> int:
    in_matrices = sum(matrix.numel() for matrix in _matrices(model).values())
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    return in_matrices + len(adamw.MOMENTS) * (trained - in_matrices)


register_optimizer(
    OptimizerEntry(
        name="muon",
        build=_build,
        moments=(MOMENTUM, *adamw.MOMENTS),
        moment_values=_moment_values,
        fields=adamw.FIELDS | {"momentum"},
        works_on_dtensors=True,
        has_sized_steps=True,
        whole_matrices=_matrices,
        warnings=decoupled_decay_warnings,
    )
)
