"""Base of the engines: the passes of a step over this rank's micro-batches.

    micro-batches   0  1  2  3  4        of the global batch
    rank 0 of 2     0     2     4
    rank 1 of 2        1     3     –     joins the last pass with weight zero

With context parallelism, a group of ranks takes a micro-batch together, and each computes a part of its positions.

Engines differ in how they hold parameters, in the backward pass and in the update.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from byteloom.core.seeds import seed_of
from byteloom.core.text import count
from byteloom.core.torch_compat import annotate
from data_pipeline.stream.dealing import deal
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.mixture import RowSources
from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import count_bytes
from pretrain.distributed.context import Context, group_of
from pretrain.distributed.fragments import MEMORY, MODEL, Fragment, fragment_name, split_name
from pretrain.distributed.transfers import Transfers
from pretrain.distributed.world import World
from pretrain.engines.config import EngineConfig
from pretrain.engines.diagnosis import Diagnosis
from pretrain.engines.engine import NO_LIMITS, EngineError, NonFiniteError, RowLoss, StepResult, Upcoming, UpdateLimits
from pretrain.engines.phases import Clock, PassTimes, StepMarks, StepTimes, device_memory
from pretrain.engines.precision import compute_dtype
from pretrain.engines.process_state import keep_freed_memory, seed_generators, set_up_cuda
from pretrain.engines.source_losses import SourceLosses
from pretrain.engines.staging import StagedBatch, stage
from pretrain.engines.step_numbers import numbers_of_device, numbers_of_host, result_of
from pretrain.models.base import ByteModel, Memory
from pretrain.models.initial import FIRST_VALUES, WHOLE_DRAWING
from pretrain.models.patching.watching import PatchCounts

DRAWN_VALUES = 1 << 24
"""First values that are drawn at a time, and then sent to the device."""


@dataclass(frozen=True)
class CountedBatch:
    """This rank's part of a global batch, with the targets that the model will score."""

    micro_batches: Sequence[MicroBatch]
    step: int
    scored: list[NDArray[np.bool_]]
    """(rows, T) positions that count in the loss, by micro-batch."""
    bytes_of: list[int]
    """Target bytes of each micro-batch."""
    all_bytes: int | None = None
    """Sum of `own_bytes` over all ranks; None if they have not exchanged it."""

    @property
    def own_bytes(self) -> int:
        """Return the target bytes of this rank."""
        return sum(self.bytes_of)


class Passes(NamedTuple):
    """Results of the passes of a step on this rank."""

    nats: Tensor
    """Negative log-likelihood of its micro-batches: an fp64 scalar on the device."""
    by_row: list[Tensor]
    """That of each row, by micro-batch."""
    memory: dict[int, Memory]
    """Memory that the model carries from each micro-batch, by its index."""


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
        if self.device.type == "cuda":
            set_up_cuda(deterministic=config.deterministic)
        else:
            keep_freed_memory()
        self.dtype = compute_dtype(config.precision)
        self.model = model
        self._seed = seed
        self._world = world
        self._context = Context.of(world, config.context)
        model.set_context(self._context)
        self._patchers = model.patchers()
        group, groups = group_of(world.rank, world.size, config.context)
        self._passes = len(deal(global_batch, micro_batch, 0, groups))
        self._rows_of = deal(global_batch, micro_batch, group, groups)
        """Rows of the global batch, by this rank's micro-batches."""
        self._global_batch = global_batch
        self._memory: dict[int, Memory] = {}
        self._next: CountedBatch | None = None
        """Batch of the next step, if the ranks have exchanged its target bytes."""
        self._transfers = Transfers(self.device)
        self._clock = Clock(self.device)
        self._step_times = StepTimes(self._clock)
        self._pass_times = PassTimes(self._clock)
        """Times of the current step."""

    @abstractmethod
    def _forward(self, ids: Tensor, memory: Memory, given: Tensor | None = None) -> tuple[Tensor, Memory]:
        """Return the nats, and the next memory if the model carries one.

        Args:
            ids: ids that are predicted.
            memory: of the rows; empty if the model carries none.
            given: second argument of a model that reads more than `ids`; None for other models.
        """

    @abstractmethod
    def _prepare(self, *, last: bool) -> None:
        """Prepare a pass of a step. After the last pass, gradients must be the mean over ranks."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the accumulated gradient."""

    @abstractmethod
    def _clip(self) -> Tensor:
        """Clip the gradient, unless the update does. Return its global norm before clipping: a scalar."""

    @abstractmethod
    def _update(self, learning_rate: float, is_fit: Tensor) -> None:
        """Step if `is_fit`, a boolean scalar on the device, is true; else change nothing."""

    def _after_update(self) -> None:
        """Drop the gradient, once the host knows that the update is done."""
        self._drop_gradient()

    @abstractmethod
    def squares_of_gradient(self) -> Tensor:
        """Return the sum of squares of the accumulated gradient of each parameter, in fp64, before clipping.

        The sum over ranks is that of the whole gradient.
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
    def owned_fragments(self) -> list[Fragment]:
        """Return the fragments that this rank owns (see `Engine`)."""

    @abstractmethod
    def restore(self, counters: dict[str, int]) -> None:
        """Set the counters (see `Engine`)."""

    def begin(self, version: int = FIRST_VALUES) -> None:
        """Give every parameter its first values (see `Engine`). This rank draws only what it holds."""
        for fragment in self.fragments():
            kind, name = split_name(fragment.name)
            if kind == MODEL:
                self._begin_parameter(fragment, name, version)
        self.restore({"optimizer_steps": 0})

    def _begin_parameter(self, fragment: Fragment, name: str, version: int) -> None:
        length = len(fragment.data)
        window = length if version == WHOLE_DRAWING else DRAWN_VALUES
        for first in range(0, length, window):
            begin = fragment.start + first
            end = min(begin + window, fragment.start + length)
            values = self.model.first_values(name, fragment.shape, self._seed, begin=begin, end=end, version=version)
            fragment.data[first : first + window].copy_(values)

    def rehearse(self, rows: int) -> None:
        """Run the passes of a made-up micro-batch, and drop its gradient.

        Raises:
            EngineError: there is too little memory.
        """
        self._begin_passes(True)
        ids, given = self.model.empty_example(rows, self.device)
        try:
            self._prepare(last=True)
            self._backward(self._forward(ids, self._empty_memory(rows), given)[0].mean())
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
        sources: RowSources | None = None,
        limits: UpdateLimits = NO_LIMITS,
        look_ahead: Callable[[], Upcoming] | None = None,
        diagnose: bool = False,
    ) -> StepResult:
        """Do one optimizer step (see `Engine`)."""
        self._begin_passes(True)
        batch = self._counted(micro_batches, step)
        by_source = SourceLosses(sources, micro_batches, batch.scored, self.device)
        staged = stage(self._transfers, micro_batches, batch.scored, by_source.of_rows)
        counting = self._clock.mark()
        target_bytes = self._target_bytes(batch)
        counted = self._clock.mark()
        scale = self._world.size / target_bytes.clamp(min=1)  # engines average over ranks, and the loss is a sum
        diagnosis = Diagnosis(self, has_noise=self._context.size == 1) if diagnose else None
        patches = PatchCounts(self._patchers, self.device) if self._patchers else None
        passes = self._run_passes(batch, staged, scale, by_source, diagnosis, patches)
        passed = self._clock.mark()
        with annotate("checkpoint: wait for the copy"):
            before_update()
        measured = [] if diagnosis is None else [diagnosis.sums(scale, batch.bytes_of)]
        counted_patches = [] if patches is None else [patches.sums()]
        with annotate("update"):
            norm = self._clip().to(self.device)
            is_fit = self._fits(limits, passes.nats, target_bytes, norm)
            own = numbers_of_device([*measured, *counted_patches], passes.nats, norm, is_fit, by_source)
            decided = self._transfers.mark()
            self._update(learning_rate, is_fit)
        marks = StepMarks(counting, counted, self._pass_times, passed, self._clock.mark())
        upcoming = [] if look_ahead is None else self._upcoming(look_ahead(), step + 1)
        of_host = numbers_of_host(
            self._step_times.known(marks), device_memory(self.device), batch.own_bytes, by_source, upcoming
        )
        by_rank = self._exchanged(decided, own, of_host, waits_for_data=look_ahead is not None)
        first, end = sum(map(len, measured)), sum(map(len, measured + counted_patches))
        numbers = [of_rank[end:] for of_rank in by_rank] if end else by_rank
        result = result_of(numbers, self._world.rank, self._context.size, len(upcoming))
        if diagnosis is not None:
            result = diagnosis.added_to(result, [of_rank[:first] for of_rank in by_rank])
        if patches is not None:
            result = replace(result, patches=patches.numbers([of_rank[first:end] for of_rank in by_rank]))
        if look_ahead is not None:
            result = self._heard(result)
        self._step_times.read(marks)
        if not result.is_updated:
            result = replace(result, rows=self._row_losses(batch, passes.by_row))
            fault = "" if np.isfinite(result.gradient_norm) else self._describe_non_finite(result.nats)
            self._drop_gradient()
            if fault:
                raise NonFiniteError(fault, result)
            return result
        self._after_update()
        for index, memory in passes.memory.items():
            for name, tensor in memory.items():
                self._memory[index][name].copy_(tensor)
        return result

    def _run_passes(
        self,
        batch: CountedBatch,
        staged: Iterable[StagedBatch],
        scale: Tensor,
        by_source: SourceLosses,
        diagnosis: Diagnosis | None,
        patches: PatchCounts | None,
    ) -> Passes:
        """Run the passes of a step: those of this rank's micro-batches, then those that it joins with weight zero."""
        passes = Passes(torch.zeros((), dtype=torch.float64, device=self.device), [], {})
        self._pass_times = PassTimes(self._clock)
        with (
            nullcontext() if diagnosis is None else diagnosis.watching(),
            nullcontext() if patches is None else patches.watching(),
        ):
            for number, (micro_batch, rows) in enumerate(zip(batch.micro_batches, staged, strict=True), 1):
                self._prepare(last=number == self._passes)
                seed_generators(self._seed_of(micro_batch, batch.step))
                if diagnosis is not None:
                    diagnosis.begin_pass()
                memory = self._memory.get(micro_batch.index, {})
                with annotate("forward"):
                    nats, passes.memory[micro_batch.index] = self._forward(rows.ids, memory, rows.given)
                if patches is not None:
                    patches.add(rows.ids, rows.targets)
                target_nats = torch.where(rows.targets, nats, 0.0)
                batch_nats = target_nats.sum()
                self._backward_watched(batch_nats * scale.to(batch_nats.dtype))
                passes.nats.add_(batch_nats.detach())
                by_source.add(rows.sources, target_nats)
                passes.by_row.append(target_nats.detach().sum(1))
        for number in range(len(batch.micro_batches) + 1, self._passes + 1):
            self._idle_pass(last=number == self._passes)
        return passes

    def _exchanged(
        self, decided: torch.cuda.Event | None, own: Tensor, of_host: Sequence[float], *, waits_for_data: bool
    ) -> list[list[float]]:
        """Return the vectors of numbers of all ranks, by rank. The host waits for them, and not for the update.

        Args:
            decided: moment of the device at which its numbers are known.
            own: this rank's numbers on the device.
            of_host: this rank's numbers on the host.
            waits_for_data: whether another rank may wait for its data before.
        """
        with (
            self._world.waits_for_hosts() if waits_for_data else nullcontext(),
            self._transfers.on_own_stream(decided, own),
        ):
            sent = self._transfers.send(np.array(of_host, np.float64)).take()[0]
            numbers = self._transfers.fetch(self._world.gather_tensor(torch.cat([own, sent])))
        by_rank: list[list[float]] = numbers.wait().tolist()
        return by_rank

    def _counted(self, micro_batches: Sequence[MicroBatch], step: int) -> CountedBatch:
        """Return this rank's micro-batches of a step, with their targets; all ranks have counted them or none."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead.micro_batches is micro_batches and ahead.step == step:
            return ahead
        scored = [self._scored_targets(micro_batch, step) for micro_batch in micro_batches]
        bytes_of = [count_bytes(m.ids, t) for m, t in zip(micro_batches, scored, strict=True)]
        return CountedBatch(micro_batches, step, scored, bytes_of)

    def _upcoming(self, upcoming: Upcoming, step: int) -> list[float]:
        """Count the targets of the next step; return what this rank tells the others about it."""
        self._next = self._counted(upcoming.micro_batches, step)
        return [self._next.own_bytes, *upcoming.numbers]

    def _heard(self, result: StepResult) -> StepResult:
        """Take the target bytes of the next step out of a result."""
        assert self._next is not None
        self._next = replace(self._next, all_bytes=int(sum(of_rank[0] for of_rank in result.upcoming)))
        return replace(result, upcoming=[numbers for _, *numbers in result.upcoming])

    def _target_bytes(self, batch: CountedBatch) -> Tensor:
        """Return the target bytes of the global batch: an fp64 scalar on the device. The host does not wait on CUDA."""
        known = batch.own_bytes if batch.all_bytes is None else batch.all_bytes
        total = self._transfers.send(np.array([known], np.float64)).take()[0]
        if batch.all_bytes is None:
            self._world.sum_in_place(total)
        return total[0] / self._context.size

    def _fits(self, limits: UpdateLimits, nats: Tensor, target_bytes: Tensor, norm: Tensor) -> Tensor:
        """Return whether the numbers of the global batch are within limits: a boolean scalar on the device.

        Without limits, each rank sees by itself whether the norm is finite. With limits, rounding may differ between
        ranks, so they use the mean of their norms.
        """
        finite = torch.isfinite(norm)
        if limits == NO_LIMITS:
            return finite
        numbers = torch.stack([nats, norm.double()])
        self._world.sum_in_place(numbers)
        loss, mean_norm = numbers[0] / target_bytes.clamp(min=1), numbers[1] / self._world.size
        return finite & (loss <= limits.nats_per_byte) & (mean_norm <= limits.gradient_norm)

    def _row_losses(self, batch: CountedBatch, nats: Sequence[Tensor]) -> list[RowLoss]:
        """Return the loss of each row of the global batch, from the nats of this rank's rows by micro-batch."""
        own = [
            (row, row_nats, count_bytes(m.ids[i : i + 1], targets[i : i + 1]))
            for m, targets, own_nats in zip(batch.micro_batches, batch.scored, nats, strict=True)
            for i, (row, row_nats) in enumerate(zip(self._rows_of[m.index], own_nats.tolist(), strict=False))
        ]
        rows: dict[int, RowLoss] = {}
        for row, row_nats, target_bytes in (each for of_rank in self._world.gather(own) for each in of_rank):
            rows[row] = RowLoss(row, (rows[row].nats if row in rows else 0.0) + row_nats, target_bytes)
        return [rows[row] for row in sorted(rows)]

    def nats(self, ids: Ids, given: NDArray[np.number] | None = None) -> Tensor:
        """Return the nats of ids, without gradient, dropout and memory (see `Engine`)."""
        self._begin_passes(False)
        with torch.no_grad():
            further = None if given is None else torch.from_numpy(given).to(self.device)
            result, _ = self._forward(torch.from_numpy(ids).to(self.device), {}, further)
            return self._context.sum(result).cpu()

    def _begin_passes(self, training: bool) -> None:
        """Prepare the passes of a step, or a scoring pass: set the mode of the model."""
        if self.model.training is not training:  # setting it visits every module
            self.model.train(training)

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
        ids, given = self.model.empty_example(1, self.device)
        nats, _ = self._forward(ids, self._empty_memory(1), given)
        self._backward_watched(0.0 * nats.sum())

    def _backward_watched(self, loss: Tensor) -> None:
        self._pass_times.watch(loss)
        with annotate("backward"):
            self._backward(loss)

    def watch_gradients(self, see: Callable[[Tensor], None]) -> Callable[[], None]:
        """Call a function with each gradient that a pass computes; return the function that ends this.

        The gradients are those of one pass of this rank, before sums over passes and ranks.
        """
        handles = [each.register_hook(see) for each in self._watched_parameters() if each.requires_grad]

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end

    def _watched_parameters(self) -> Iterable[nn.Parameter]:
        """Return the leaves of the passes' graphs."""
        return self.model.parameters()

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


ONE_DEVICE_A_RANK = {"SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND"}
"""Variables of `srun` by which each rank may see its own device alone, as number 0."""


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
    if ONE_DEVICE_A_RANK & os.environ.keys() and torch.cuda.device_count() == 1:
        local_rank = 0
    if local_rank >= torch.cuda.device_count():
        raise EngineError(
            f"rank {local_rank} of this machine has no CUDA device: the machine has "
            f"{count(torch.cuda.device_count(), 'device')}; start one rank for each device"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
