"""The PyTorch engine, for one process."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from data_pipeline.loader import MicroBatch
from data_pipeline.rows import Ids, Rows
from data_pipeline.vocabulary import PADDING, SEPARATOR, count_bytes
from pretrain.engines.engine import EngineConfig, EngineError, NonFiniteError, StepResult
from pretrain.fragments import Fragment, whole
from pretrain.models.byte_model import ByteModel, Memory
from pretrain.optimizers import OptimizerConfig, build_optimizer


class SingleProcessEngine:
    """fp32 masters in the model itself; the forward pass runs on copies cast to the precision.

    The cast is part of the graph, so gradients arrive at the masters in fp32 and accumulate there.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ByteModel,
        optimizer: OptimizerConfig,
        seed: int,
        *,
        global_batch: int = 1,
        micro_batch: int = 1,
    ) -> None:
        self.device = choose_device(config.device)
        self.dtype = compute_dtype(config.precision)
        self.model = model.to(self.device).train()
        for block in model.units():
            block.recomputed = config.activation_checkpointing
            if config.compile:
                block.compile(dynamic=False)  # shapes are few; torch 2.13 fails on some that it takes to be dynamic
        self.optimizer = build_optimizer(optimizer, model.parameters())
        self._clip_norm = optimizer.clip_norm
        self._seed = seed
        self._global_batch, self._micro_batch = global_batch, micro_batch
        empty = self.model.empty_memory(global_batch)
        self._memory: Memory = {name: tensor.float() for name, tensor in empty.items()}
        """Of every row of the global batch."""

    def rehearse(self, rows: int) -> None:
        ids = torch.zeros(rows, self.model.sequence_length, dtype=torch.long, device=self.device)
        try:
            self._forward(ids, self.model.empty_memory(rows))[0].mean().backward()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
                raise EngineError(
                    f"a micro-batch of {rows} rows of {self.model.sequence_length:,} bytes does not fit into the "
                    f"memory of {self.device}; lower train.micro_batch"
                ) from error
            raise
        self.optimizer.zero_grad()

    def train_step(self, micro_batches: Sequence[MicroBatch], *, step: int, learning_rate: float) -> StepResult:
        scored_targets = [self._scored_targets(micro_batch, step) for micro_batch in micro_batches]
        target_bytes = sum(count_bytes(m.ids, t) for m, t in zip(micro_batches, scored_targets, strict=True))
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        carried: list[tuple[slice, Memory]] = []
        for micro_batch, scored in zip(micro_batches, scored_targets, strict=True):
            torch.manual_seed(_micro_batch_seed(self._seed, step, micro_batch.index))
            ids = _widened(micro_batch.rows, self.device)
            targets = torch.from_numpy(scored).to(self.device)
            first = micro_batch.index * self._micro_batch
            rows = slice(first, first + len(ids))
            row_nats, memory = self._forward(ids, {name: tensor[rows] for name, tensor in self._memory.items()})
            carried.append((rows, memory))
            batch_nats = torch.where(targets, row_nats, 0.0).sum()
            (batch_nats / max(target_bytes, 1)).backward()
            nats += batch_nats.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        if not torch.isfinite(norm):
            fault = self._describe_non_finite(nats.item())
            self.optimizer.zero_grad()
            raise NonFiniteError(fault)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        for rows, memory in carried:  # not before: a step that is refused leaves it as it was
            self._remember(rows, memory)
        return StepResult(nats.item(), target_bytes, norm.item())

    def nats(self, ids: Ids) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            result, _ = self._forward(torch.from_numpy(ids).to(self.device), {})
        self.model.train()
        return result.cpu()

    def forget(self) -> None:
        self._remember(slice(None), self.model.empty_memory(self._global_batch))

    def fragments(self) -> list[Fragment]:
        fragments = []
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            fragments.append(whole(f"model/{name}", parameter))
            fragments.extend(whole(f"{moment}/{name}", state[moment]) for moment in ("exp_avg", "exp_avg_sq"))
        return fragments + [whole(f"memory/{name}", tensor) for name, tensor in self._memory.items()]

    def counters(self) -> dict[str, int]:
        return {"optimizer_steps": int(next(iter(self.optimizer.state.values()))["step"])}

    def restore(self, counters: dict[str, int]) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(counters["optimizer_steps"])

    def _scored_targets(self, micro_batch: MicroBatch, step: int) -> NDArray[np.bool_]:
        """The targets of a micro-batch that the model will score: (rows, T)."""
        torch.manual_seed(_micro_batch_seed(self._seed, step, micro_batch.index))
        rows, length = micro_batch.targets.shape
        return micro_batch.targets & self.model.draw_scored(rows, length).numpy()

    def _forward(self, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The nats, and the next memory if the model carries one."""
        parameters = {name: p.to(self.dtype) for name, p in self.model.named_parameters()}
        if memory:
            return functional_call(self.model, parameters, (ids, memory))
        return functional_call(self.model, parameters, (ids,)), {}

    def _remember(self, rows: slice, memory: Memory) -> None:
        for name, tensor in memory.items():
            self._memory[name][rows].copy_(tensor)

    def _describe_non_finite(self, nats: float) -> str:
        bad = [
            name for name, p in self.model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        where = f" in {len(bad)} parameters, the first {bad[0]}" if bad else ", though every parameter's is"
        return f"the gradient is not finite (loss {nats} nats){where}"


def _widened(rows: Rows, device: torch.device) -> Tensor:
    """(rows, T) int16 ids on the device, where they come as bytes."""
    ids = torch.from_numpy(rows.bytes).to(device).to(torch.int16, memory_format=torch.contiguous_format)
    ids.view(-1)[torch.from_numpy(rows.separators).to(device)] = SEPARATOR
    if rows.padding is not None:
        ids[torch.from_numpy(rows.padding).to(device)] = PADDING
    return ids


def compute_dtype(precision: str) -> torch.dtype:
    """The type of parameters and activations under a precision of EngineConfig."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def choose_device(name: str) -> torch.device:
    """The device of EngineConfig's name for it.

    Raises:
        EngineError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError("the device is to be cuda, and this machine has none that torch can use")
    return torch.device(name)


def _micro_batch_seed(seed: int, step: int, index: int) -> int:
    """The random generator's seed of one micro-batch, so that crops and dropout are the same on any number of ranks."""
    digest = hashlib.sha256(f"micro-batch {seed} {step} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
