"""Mamba-2 layer (Dao and Gu, arXiv:2405.21060): a linear recurrence whose decay, input and output depend on the byte.

    x ─▶ gate z │ values x, writes B, reads C ─▶ causal convolution, SiLU │ steps Δ
    state_t = exp(Δ_t A) state_{t-1} + Δ_t x_t ⊗ B_t          for each head: (head width, state)
    y_t     = state_t C_t + D x_t ─▶ times SiLU(z) ─▶ norm ─▶ output

Training computes it in chunks: products within a chunk, and one step of the recurrence for each chunk. A decoder's step
is a chunk of one position.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.kernels import mamba2 as fused
from pretrain.kernels.mamba2 import Kernel, largest_tensor, takes_fused
from pretrain.models.blocks.norms import RMSNorm
from pretrain.models.initial import Initial

TAPS = 4
"""Positions that the convolution reads: its own and those right before it."""
SMALLEST_STEP, LARGEST_STEP = 1e-3, 0.1
"""Range of the first steps Δ, drawn log-uniformly."""
LARGEST_RATE = 16.0
"""Largest of the first rates -A, drawn uniformly from 1 on."""
FORGOTTEN = -104.0
"""Logarithm of a decay that is 0 in fp32. Smaller ones are raised to it: in sums over a chunk, they would round the
decays of other positions away."""


class MambaState:
    """What a layer keeps of the positions decoded so far; its size does not grow."""

    def __init__(self) -> None:
        """Make the state before the first position."""
        self.inputs: Tensor | None = None
        """(rows, TAPS - 1, channels) last inputs of the convolution."""
        self.state: Tensor | None = None
        """(rows, inner, state) state of the recurrence."""
        self.documents: Tensor | None = None
        """(rows, TAPS - 1) documents of the last positions; None if the state crosses documents."""
        self._states: list[Tensor] = []
        """State after each of the last positions that were fed at once."""
        self._inputs: Tensor | None = None
        """(rows, TAPS - 1 + n, channels) inputs of the convolution at these positions and before."""
        self._documents: Tensor | None = None
        """(rows, TAPS - 1 + n) documents of the same positions."""

    def remember(self, states: list[Tensor], inputs: Tensor, documents: Tensor | None) -> None:
        """Keep the states after the last positions, and what their convolution read.

        Args:
            states: after each of the last positions.
            inputs: (rows, n, channels) of at least these positions.
            documents: (rows, n) of the same positions as `inputs`.
        """
        read = TAPS - 1 + len(states)
        self._states, self._inputs = states, _before(inputs, self.inputs)[:, -read:]
        if documents is not None:
            self._documents = _before(documents, self.documents)[:, -read:]
        self.rewind(0)

    def rewind(self, count: int) -> None:
        """Take back the last `count` positions of those that were fed at once."""
        assert self._inputs is not None
        self._states = self._states[: len(self._states) - count]
        self.state = self._states[-1]
        self._inputs = self._inputs[:, : self._inputs.shape[1] - count]
        self.inputs = self._inputs[:, 1 - TAPS :]
        if self._documents is not None:
            self._documents = self._documents[:, : self._documents.shape[1] - count]
            self.documents = self._documents[:, 1 - TAPS :]


class Mamba2(nn.Module):
    """Layer of one Mamba-2 block, without the norm before it.

    In bf16, only the products are in bf16; decays and states are in fp32.
    """

    def __init__(
        self, width: int, head_width: int, state: int, expansion: int, chunk: int, kernel: Kernel = "plain"
    ) -> None:
        """Build the layer.

        Args:
            width: channels of the residual stream.
            head_width: channels of a head, which share a decay.
            state: numbers that the state has for each channel.
            expansion: inner channels by channel of the residual stream.
            chunk: positions of a chunk. It changes the work, not the result.
            kernel: choice of the kernels of passes over whole rows. A decoder uses plain torch.
        """
        super().__init__()
        inner = expansion * width
        self.inner, self.head_width, self.state, self.chunk = inner, head_width, state, chunk
        self.kernel = kernel
        self.expand = nn.Linear(width, 2 * inner, bias=False)
        self.select = nn.Linear(width, 2 * state, bias=False)
        self.step = nn.Linear(width, inner // head_width, bias=False)
        channels = inner + 2 * state
        self.convolution = nn.Conv1d(channels, channels, TAPS, groups=channels)
        self.step_bias = nn.Parameter(torch.empty(inner // head_width))
        self.log_rate = nn.Parameter(torch.empty(inner // head_width))
        self.skip = nn.Parameter(torch.empty(inner // head_width))
        self.norm = RMSNorm(inner)
        self.contract = nn.Linear(inner, width, bias=False)

    def own_initial(self, parameter: str) -> Initial:
        """Return the first values of the layer's own parameters, as in the authors' code."""
        if parameter == "step_bias":
            return Initial(quantile=_first_step_biases)
        if parameter == "log_rate":
            return Initial(quantile=_first_log_rates)
        return Initial(mean=1.0)

    def own_fused_matrices(self) -> dict[str, int]:
        """Return the matrices of gates and values, and of writes and reads; see `FusesMatrices`."""
        return {"expand.weight": 2, "select.weight": 2}

    def forward(self, x: Tensor, state: MambaState | None = None, documents: Tensor | None = None) -> Tensor:
        """Map (rows, n, width) to the same shape.

        Args:
            x: inputs.
            state: of the positions before; the layer updates it. None: there are none.
            documents: (rows, n) document of each position, rising. None: the state crosses documents.
        """
        gate, values = self.expand(x).chunk(2, -1)
        inputs = torch.cat([values, self.select(x)], -1)
        is_fused = state is None and self._is_fused(x)
        mixed = self._fused_convolution(inputs, documents) if is_fused else self._convolve(inputs, state, documents)
        values, write, read = mixed.split([self.inner, self.state, self.state], -1)
        exact = torch.promote_types(x.dtype, torch.float32)
        steps = F.softplus(self.step(x).to(exact) + self.step_bias.to(exact))
        heads, rates = values.unflatten(-1, (-1, self.head_width)), -self.log_rate.to(exact).exp()
        if is_fused:
            skip, chunk = self.skip.to(exact), self.chunk
            y = fused.scan(heads, steps, rates, write, read, skip, chunk=chunk, documents=documents).flatten(-2)
            return self.contract(self.norm(y * F.silu(gate)))
        y, states = scan(
            heads,
            steps,
            rates,
            write,
            read,
            chunk=self.chunk if state is None or state.state is None else 1,  # a decoder can take each position back
            documents=documents,
            before=None if state is None else state.state,
            before_document=None if state is None or state.documents is None else state.documents[:, -1],
        )
        if state is not None:
            state.remember(states if state.state is not None else states[-1:], inputs, documents)
        y = (y + self.skip[:, None] * heads).flatten(-2)
        return self.contract(self.norm(y * F.silu(gate)))

    def _convolve(self, inputs: Tensor, state: MambaState | None, documents: Tensor | None) -> Tensor:
        """Return SiLU of the causal convolution of each channel, which reads no earlier document."""
        length = inputs.shape[1]
        past = _before(inputs, None if state is None else state.inputs)
        if documents is not None:
            earlier = _before(documents, None if state is None else state.documents)
        weight, bias = self.convolution.weight[:, 0], self.convolution.bias
        assert bias is not None
        total = bias.expand_as(inputs)
        for tap in range(TAPS):
            part = past[:, tap : tap + length]
            if documents is not None:
                part = part * (earlier[:, tap : tap + length] == documents)[..., None]
            total = total + part * weight[:, tap]
        return F.silu(total)

    def _is_fused(self, x: Tensor) -> bool:
        """Return whether the fused kernels compute a pass over whole rows."""
        heads, width, channels = self.inner // self.head_width, self.head_width, self.inner + 2 * self.state
        largest = largest_tensor(*x.shape[:2], heads=heads, width=width, state=self.state, chunk=self.chunk)
        return takes_fused(self.kernel, x, channels, largest, required=torch.is_grad_enabled())

    def _fused_convolution(self, inputs: Tensor, documents: Tensor | None) -> Tensor:
        bias = self.convolution.bias
        assert bias is not None
        return fused.convolution(inputs, self.convolution.weight[:, 0], bias, documents)

    def scan_flops(self, length: int) -> int:
        """Return the operations of the matrix products of `scan` over one row."""
        chunk = min(self.chunk, length)
        padded = -(-length // chunk) * chunk
        return 2 * padded * (chunk * (self.state + self.inner) + 2 * self.inner * self.state)


def scan(
    x: Tensor,
    steps: Tensor,
    rates: Tensor,
    write: Tensor,
    read: Tensor,
    *,
    chunk: int,
    documents: Tensor | None = None,
    before: Tensor | None = None,
    before_document: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs of the recurrence, and its states after each chunk.

    Args:
        x: (rows, n, heads, width)
        steps: (rows, n, heads) steps Δ.
        rates: (heads,) rates A, negative.
        write: (rows, n, state) what each position writes, B.
        read: (rows, n, state) what each position reads, C.
        chunk: positions of a chunk.
        documents: (rows, n) document of each position, rising. The state begins at 0 in each document.
        before: (rows, heads * width, state) state before the first position; None is 0.
        before_document: (rows,) document of that state; None is 0.

    Returns:
        (rows, n, heads, width) outputs, and (rows, heads * width, state) states. The last one is after all positions.
    """
    rows, length, heads, width = x.shape
    chunk = min(chunk, length)
    fill = -length % chunk
    x, write, read = (_padded(part, fill).unflatten(1, (-1, chunk)) for part in (x, write, read))
    steps = _padded(steps, fill).unflatten(1, (-1, chunk))  # a step of 0 changes nothing
    log_decays = (steps * rates).clamp(min=FORGOTTEN)
    sums = log_decays.cumsum(2)  # (rows, chunks, chunk, heads) logarithm of the decay since the chunk began
    written = (x * steps[..., None]).to(x.dtype)

    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    kept, entering, carried = (sums[:, :, -1:] - sums).exp(), sums.exp(), sums[:, :, -1].exp()
    if documents is not None:
        numbers = torch.cat([documents, documents[:, -1:].expand(-1, fill)], 1).view(rows, -1, chunk)
        first = documents.new_zeros(rows) if before_document is None else before_document
        previous = torch.cat([first[:, None], numbers[:, :-1, -1]], 1)  # document that enters each chunk
        seen = seen & (numbers[..., :, None] == numbers[..., None, :])[:, :, None]
        kept = kept * (numbers == numbers[..., -1:])[..., None]
        entering = entering * (numbers == previous[..., None])[..., None]
        carried = carried * (numbers[..., -1] == previous)[..., None]

    by_head = sums.transpose(2, 3)
    decay = (by_head[..., :, None] - by_head[..., None, :]).masked_fill(~seen, -math.inf).exp()
    scores = ((read @ write.transpose(-1, -2))[:, :, None] * decay).to(x.dtype)
    y = (scores @ written.transpose(2, 3)).transpose(2, 3)  # (rows, chunks, chunk, heads, width)

    added = (written * kept[..., None]).to(x.dtype).flatten(3).transpose(-1, -2) @ write
    growth = carried.repeat_interleave(width, -1)[..., None]
    state = added.new_zeros(rows, heads * width, write.shape[-1], dtype=sums.dtype) if before is None else before
    states = []
    for number in range(added.shape[1]):
        states.append(state)
        state = growth[:, number] * state + added[:, number]
    earlier = (read @ torch.stack(states, 1).to(x.dtype).transpose(-1, -2)).unflatten(-1, (heads, width))
    y = y + earlier * entering[..., None]
    return y.flatten(1, 2)[:, :length].to(x.dtype), [*states[1:], state]


def _padded(values: Tensor, fill: int) -> Tensor:
    """Append `fill` positions of zeros to (rows, n, …)."""
    return F.pad(values, (0, 0) * (values.dim() - 2) + (0, fill)) if fill else values


def _before(values: Tensor, last: Tensor | None) -> Tensor:
    """Return (rows, n, …) values after those of the TAPS - 1 positions before; None is zeros."""
    earlier = values.new_zeros(len(values), TAPS - 1, *values.shape[2:]) if last is None else last
    return torch.cat([earlier, values], 1)


def _first_step_biases(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map numbers between 0 and 1 to biases whose softplus is log-uniform: the inverse of softplus."""
    steps = SMALLEST_STEP * (LARGEST_STEP / SMALLEST_STEP) ** numbers
    return steps + np.log(-np.expm1(-steps))


def _first_log_rates(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map numbers between 0 and 1 to logarithms of uniform rates."""
    return np.log(1 + (LARGEST_RATE - 1) * numbers)
