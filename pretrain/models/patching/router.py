"""Learned patches: the router and the smoothing of H-Net (Hwang et al. 2025, arXiv:2507.07955).

    p_i = (1 - cos(W_q x_{i-1}, W_k x_i)) / 2       a patch starts where p_i > 1/2
    z_k = P_k y_k + (1 - P_k) z_{k-1}               smoothing of outputs y over patches; P_k is p where patch k starts

All of it is computed in fp32 or more precise, once a pass. A mask that a backward pass computed again in other kernels
could differ.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.models.patching.patcher import Decision, Patcher, Patches, PatchState
from pretrain.models.patching.ratio import ratio_loss

SHARPEST = 1e-4
"""Least distance of the smoothing's weights from 0 and from 1."""


class LearnedConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Patches start where neighbouring states differ: H-Net's router (arXiv:2507.07955, section 2.2)."""

    name: Literal["learned"] = "learned"
    """Rule of the patches."""
    size: float = Field(gt=1)
    """N: positions of a patch at which the ratio loss aims. Trained models stay below it: 4.7 to 4.8 for 6 in the
    paper."""
    ratio_weight: float = Field(default=0.03, ge=0)
    """Factor of the ratio loss in the gradient. Reported losses are without it."""
    routing: Literal["cosine", "linear"] = "cosine"
    """Source of the probability of a start. cosine: the distance of neighbouring states. linear: a linear map of each
    state alone and a sigmoid, the paper's ablation."""
    smoothing: bool = True
    """Whether outputs of patches are smoothed over patches. False is the paper's ablation."""
    straight_through: bool = True
    """True: the confidence of a decision changes gradients alone. False, the paper's ablation: it also multiplies the
    outputs of patches."""


class Router(Patcher):
    """A patch starts where the state of a position points away from that of the position before.

    Separators start patches with probability 1, as the start of a row does.
    """

    def __init__(self, capacity: int, width: int, config: LearnedConfig) -> None:
        """Make the router of states of `width` channels."""
        super().__init__(capacity)
        self.target_ratio, self.ratio_weight = config.size, config.ratio_weight
        self.score = self.query = self.key = None
        if config.routing == "linear":
            self.score = ExactLinear(width, 1)
        else:
            self.query = ExactLinear(width, width, bias=False)
            self.key = ExactLinear(width, width, bias=False)

    def rule(self, read: Tensor, state: PatchState, hidden: Tensor | None) -> Decision:
        """Return where neighbouring states differ, and the probabilities."""
        assert hidden is not None, "a router reads hidden states"
        memory: dict[str, Tensor] = {}
        if self.query is None or self.key is None:
            assert self.score is not None
            probabilities = self.score(hidden)[..., 0].sigmoid()
        else:
            queries, keys = self.query(hidden), self.key(hidden)
            last = state.memory.get("query", torch.zeros_like(queries[:, 0]))
            before = torch.cat([last[:, None], queries[:, :-1]], 1)
            probabilities = ((1 - F.cosine_similarity(before, keys, -1)) / 2).clamp(0, 1)
            memory = {"query": queries[:, -1].detach()}
        probabilities = probabilities.masked_fill(read == SEPARATOR, 1.0)
        return Decision(probabilities > 0.5, probabilities, memory)

    def loss(self, patches: Patches, read: Tensor) -> Tensor:
        """Return the (rows,) ratio loss of each row, times its weight. Positions that read PADDING do not count.

        Args:
            patches: of whole rows.
            read: (rows, n) ids that positions read.
        """
        assert patches.probabilities is not None and self.target_ratio is not None
        counted = read != PADDING
        number = counted.sum(1)
        share = (patches.wanted & counted).sum(1) / number
        mean = (patches.probabilities * counted).sum(1) / number
        return self.ratio_weight * ratio_loss(share, mean, self.target_ratio)


class ExactLinear(nn.Linear):
    """Linear map that is computed in fp32 or more precise, whatever the precision of a pass."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        exact = torch.promote_types(input.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(exact)
        return F.linear(input.to(exact), self.weight.to(exact), bias)


def smooth(values: Tensor, probabilities: Tensor, before: Tensor | None = None) -> Tensor:
    """Return the moving averages of vectors of patches.

    Args:
        values: (rows, k, width), in fp32 or more precise.
        probabilities: (rows, k) weight of each vector against the average before it.
        before: (rows, width) average before the first vector; None is 0.

    Returns:
        (rows, k, width)
    """
    weights = probabilities.clamp(SHARPEST, 1 - SHARPEST)
    if before is None:
        done: Tensor = _Smooth.apply(values, weights)
        return done
    values = torch.cat([before[:, None], values], 1)
    weights = torch.cat([torch.ones_like(weights[:, :1]), weights], 1)
    return _Smooth.apply(values, weights)[:, 1:]


class _Smooth(torch.autograd.Function):
    """Moving average by a scan that doubles its reach: log2 k passes forward, and as many backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor) -> Tensor:
        averages = _scan(1 - weights, weights[..., None] * values)
        ctx.save_for_backward(values, weights, averages)
        return averages

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values, weights, averages = ctx.saved_tensors
        decays = F.pad((1 - weights[:, 1:]).flip(1), (1, 0))  # that of the patch after each one, in reverse
        later = _scan(decays, gradient.flip(1)).flip(1)
        earlier = F.pad(averages[:, :-1], (0, 0, 1, 0))
        return weights[..., None] * later, (later * (values - earlier)).sum(-1)


def _scan(decays: Tensor, added: Tensor) -> Tensor:
    """Return s_k = decays_k s_{k-1} + added_k for (rows, k) decays and (rows, k, width) vectors, from s = 0."""
    decays, reach = decays[..., None], 1
    while reach < added.shape[1]:
        added = added + decays * F.pad(added[:, :-reach], (0, 0, reach, 0))
        decays = decays * F.pad(decays[:, :-reach], (0, 0, reach, 0))
        reach *= 2
    return added
