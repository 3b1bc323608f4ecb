"""Base of the engines: the passes of a step over this rank's micro-batches.

    micro-batches   0  1  2  3  4        of the global batch
    rank 0 of 2     0     2     4
    rank 1 of 2        1     3     –     joins the last pass with weight zero

Engines differ in how they hold parameters, in the backward pass and in the update.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byteloom.core.seeds import seed_of
from byteloom.core.text import count
from data_pipeline.stream.dealing import deal
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Ids, Rows
from data_pipeline.vocabulary import PADDING, SEPARATOR, count_bytes
from pretrain.distributed.fragments import MEMORY, MODEL, Fragment, fragment_name, split_name
from pretrain.distributed.world import World
from pretrain.engines.config import EngineConfig
from pretrain.engines.engine import EngineError, NonFiniteError, StepResult
from pretrain.engines.phases import Clock, PassTimes, RankStep, peak_memory_bytes
from pretrain.engines.precision import compute_dtype
from pretrain.engines.process_state import keep_freed_memory, seed_generators
from pretrain.models.base import ByteModel, Memory


class BaseEngine(ABC):
    """Base class of the engines.

    Args:
        config: of the engine. Its precision is not auto.
        model: on the meta device, or with values that are the same on all ranks.
        seed: of the run.
        world: the ranks.
        global_batch: rows of an optimizer step, over all ranks.
        micro_batch: rows of a forward pass.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ByteModel,
        seed: int,
        world: World,
        *,
        global_batch: int,
        micro_batch: int,
    ) -> None:
        self.device = choose_device(config.device, world.local_rank)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype = compute_dtype(config.precision)
        self.model = model
        self._seed = seed
        self._world = world
        self._passes = len(deal(global_batch, micro_batch, 0, world.size))
        self._rows_of = deal(global_batch, micro_batch, world.rank, world.size)
        """Rows of the global batch, by this rank's micro-batches."""
        self._global_batch = global_batch
        self._memory: dict[int, Memory] = {}
        self._clock = Clock(self.device)
        self._pass_times = PassTimes(self._clock)
        """Times of the current step."""

    @abstractmethod
    def _forward(self, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the nats, and the next memory if the model carries one."""

    @abstractmethod
    def _prepare(self, *, last: bool) -> None:
        """Prepare a pass of a step. After the last pass, gradients must be the mean over ranks."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the accumulated gradient."""

    @abstractmethod
    def _update(self, learning_rate: float) -> float:
        """Clip the gradient, step, and drop the gradient; return the global norm before clipping.

        If the norm is not finite, do not step.
        """

    @abstractmethod
    def _not_finite(self) -> list[str]:
        """Return the names of the parameters whose gradient on this rank is not finite."""

    @abstractmethod
    def _drop_gradient(self) -> None:
        """Drop the accumulated gradient."""

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """Return what this rank holds (see `Engine`)."""

    @abstractmethod
    def restore(self, counters: dict[str, int]) -> None:
        """Set the counters (see `Engine`)."""

    def begin(self) -> None:
        """Give every parameter its first values."""
        for fragment in self.fragments():
            kind, name = split_name(fragment.name)
            if kind == MODEL:
                values = self.model.first_values(name, fragment.shape, self._seed).view(-1)
                fragment.data.copy_(values[fragment.start : fragment.start + len(fragment.data)])
        self.restore({"optimizer_steps": 0})

    def rehearse(self, rows: int) -> None:
        """Run the passes of a made-up micro-batch, and drop its gradient.

        Raises:
            EngineError: there is too little memory.
        """
        ids = torch.zeros(rows, self.model.sequence_length, dtype=torch.long, device=self.device)
        try:
            self._prepare(last=True)
            self._backward(self._forward(ids, self._empty_memory(rows))[0].mean())
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
                raise EngineError(
                    f"a micro-batch of {count(rows, 'row')} of {self.model.sequence_length:,} bytes does not fit into "
                    f"the memory of {self.device}; lower train.micro_batch"
                ) from error
            raise
        self._drop_gradient()

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        step: int,
        learning_rate: float,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Do one optimizer step (see `Engine`)."""
        scored_targets = [self._scored_targets(micro_batch, step) for micro_batch in micro_batches]
        own_bytes = sum(count_bytes(m.ids, t) for m, t in zip(micro_batches, scored_targets, strict=True))
        counted = time.perf_counter()
        target_bytes = int(self._world.sum(own_bytes)[0])
        waited = time.perf_counter() - counted
        scale = self._world.size / max(target_bytes, 1)  # engines average over ranks, and the loss is a sum
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        carried: dict[int, Memory] = {}
        times = self._pass_times = PassTimes(self._clock)
        for number, (micro_batch, scored) in enumerate(zip(micro_batches, scored_targets, strict=True), 1):
            self._prepare(last=number == self._passes)
            seed_generators(self._seed_of(micro_batch, step))
            ids = _widened(micro_batch.rows, self.device)
            targets = torch.from_numpy(scored).to(self.device)
            row_nats, carried[micro_batch.index] = self._forward(ids, self._memory.get(micro_batch.index, {}))
            batch_nats = torch.where(targets, row_nats, 0.0).sum()
            self._backward_watched(batch_nats * scale)
            nats += batch_nats.detach()
        for number in range(len(micro_batches) + 1, self._passes + 1):
            self._idle_pass(last=number == self._passes)
        passed = self._clock.mark()
        before_update()
        norm = self._update(learning_rate)
        updated = self._clock.mark()
        own = RankStep(
            nats=nats.item(),
            forward_backward=self._clock.seconds(times.begin, times.computed) - times.waited,
            optimizer=self._clock.seconds(passed, updated),
            communication=waited + times.waited + self._clock.seconds(times.computed, passed),
            peak_memory_bytes=peak_memory_bytes(self.device),
        )
        ranks = own.gathered(self._world)
        all_nats = math.fsum(rank.nats for rank in ranks)
        if not np.isfinite(norm):
            fault = self._describe_non_finite(all_nats)
            self._drop_gradient()
            raise NonFiniteError(fault)
        for index, memory in carried.items():
            for name, tensor in memory.items():
                self._memory[index][name].copy_(tensor)
        return StepResult(all_nats, target_bytes, norm, ranks)

    def nats(self, ids: Ids) -> Tensor:
        """Return the nats of ids, without gradient, dropout and memory."""
        self.model.eval()
        with torch.no_grad():
            result, _ = self._forward(torch.from_numpy(ids).to(self.device), {})
        self.model.train()
        return result.cpu()

    def forget(self) -> None:
        """Empty the memory that the model carries."""
        self._memory = {index: self._empty_memory(len(rows)) for index, rows in self._rows_of.items()}

    def _empty_memory(self, rows: int) -> Memory:
        return {name: tensor.float() for name, tensor in self.model.empty_memory(rows).items()}

    def _memory_fragments(self) -> list[Fragment]:
        """Return the memory of this rank's rows of the global batch. No other rank holds it."""
        return [
            Fragment(
                fragment_name(MEMORY, name),
                (self._global_batch, *tensor.shape[1:]),
                self._rows_of[index].start * math.prod(tensor.shape[1:]),
                tensor.view(-1),
            )
            for index, memory in self._memory.items()
            for name, tensor in memory.items()
        ]

    def _idle_pass(self, *, last: bool) -> None:
        """Join a pass for which other ranks have a micro-batch and this rank has none."""
        self._prepare(last=last)
        ids = torch.zeros(1, self.model.sequence_length, dtype=torch.long, device=self.device)
        nats, _ = self._forward(ids, self._empty_memory(1))
        self._backward_watched(0.0 * nats.sum())

    def _backward_watched(self, loss: Tensor) -> None:
        self._pass_times.watch(loss)
        self._backward(loss)

    def _scored_targets(self, micro_batch: MicroBatch, step: int) -> NDArray[np.bool_]:
        """Return the targets of a micro-batch that the model will score: (rows, T)."""
        seed_generators(self._seed_of(micro_batch, step))
        rows, length = micro_batch.targets.shape
        return micro_batch.targets & self.model.draw_scored(rows, length).numpy()

    def _seed_of(self, micro_batch: MicroBatch, step: int) -> int:
        """Return the seed of a micro-batch. Crops and dropout are the same on any number of ranks."""
        return seed_of("micro-batch", self._seed, step, micro_batch.index)

    def _describe_non_finite(self, nats: float) -> str:
        bad = sorted({name for names in self._world.gather(self._not_finite()) for name in names})
        where = (
            f" in {count(len(bad), 'parameter')}, the first of which is {bad[0]}"
            if bad
            else "; the gradient of each parameter is finite"
        )
        return f"the gradient is not finite (loss {nats} nats){where}"


def materialize(model: ByteModel, device: torch.device) -> None:
    """Move a model to a device, or allocate it there if it has no values yet."""
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    else:
        model.to(device)


def _widened(rows: Rows, device: torch.device) -> Tensor:
    """Return (rows, T) int16 ids on the device. They are sent as bytes."""
    ids = torch.from_numpy(rows.bytes).to(device).to(torch.int16, memory_format=torch.contiguous_format)
    ids.view(-1)[torch.from_numpy(rows.separators).to(device)] = SEPARATOR
    if rows.padding is not None:
        ids[torch.from_numpy(rows.padding).to(device)] = PADDING
    return ids


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of a name; on CUDA, make this rank's own device the current one.

    Args:
        name: `EngineConfig.device`.
        local_rank: number of this rank on its machine.

    Raises:
        EngineError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EngineError("the device is set to cuda, but torch finds none on this machine; set it to cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise EngineError(
            f"rank {local_rank} of this machine has no CUDA device: the machine has "
            f"{count(torch.cuda.device_count(), 'device')}; start one rank for each device"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
