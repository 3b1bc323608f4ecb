"""PyTorch engine: one process, DDP, FSDP2 and HSDP.

The model's own parameters are the fp32 masters. In one process and under DDP, the passes of a step run on the same
copies in the compute precision, and gradients accumulate in fp32 (copies.py). FSDP2 casts when it gathers, and sums
over ranks and passes in fp32.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from byteloom.core.torch_compat import all_gather_single, reduce_scatter_single, unsharded_parameters
from data_pipeline.stream.rows import Ids
from pretrain.distributed.fragments import MODEL, Fragment, fragment_name
from pretrain.distributed.world import ALONE, World
from pretrain.engines.base import BaseEngine, materialize
from pretrain.engines.blocks import prepare_blocks
from pretrain.engines.config import EngineConfig
from pretrain.engines.copies import Copies
from pretrain.engines.process_state import ignore_view_warnings
from pretrain.models.base import ByteModel, Memory
from pretrain.optim import OptimizerConfig, build_optimizers
from pretrain.optim.groups import set_rate


class PyTorchEngine(BaseEngine):
    """Engine of ddp, fsdp and hsdp."""

    def __init__(
        self,
        config: EngineConfig,
        model: ByteModel,
        optimizer: OptimizerConfig,
        seed: int,
        world: World = ALONE,
        *,
        global_batch: int = 1,
        micro_batch: int = 1,
    ) -> None:
        super().__init__(config, model, seed, world, global_batch=global_batch, micro_batch=micro_batch)
        model.train()
        prepare_blocks(config, model, self.device)
        shards = {"ddp": 1, "hsdp": config.shards}.get(config.name)
        self._copies: Copies | None = None
        """Weights of the passes of one process and of DDP, if these are not fp32."""
        self._shards = shards or world.size
        """Number of ranks that hold one whole model together."""
        if config.name == "ddp":
            materialize(model, self.device)
            self._module: nn.Module = model if self.dtype == torch.float32 else self._on_copies()
            if world.size > 1:
                self._module = DistributedDataParallel(self._module, gradient_as_bucket_view=True, init_sync=False)
        else:
            self._module = self._sharded(config)
            materialize(model, torch.device("cpu") if config.offload else self.device)
        self._optimizers = build_optimizers(optimizer, model)
        self._optimizer_steps = 0
        self._selects_on_device = (
            self.device.type == "cuda"
            and not config.offload
            and all(getattr(each, "_step_supports_amp_scaling", False) for each in self._optimizers)
        )
        """True if the device skips a rejected update by itself. The host then does not wait for the norm."""
        self._clip_norm = optimizer.clip_norm
        self.forget()

    def _on_copies(self) -> nn.Module:
        """Return the model, which runs on copies of its parameters: each block on its own."""
        self._copies = Copies(self.dtype)
        for unit in self.model.units():
            unit.weights = self._copies.of(unit.named_parameters())
        return _WithWeights(self.model, self._copies.of(self.model.outside_units().items()))

    def _sharded(self, config: EngineConfig) -> nn.Module:
        """Return the model, sharded: each block is gathered when it is used, and the other parameters together."""
        self._world.ensure_group(self.device.type)
        sizes = {"replicate": self._world.size // self._shards, "shard": self._shards}
        if config.name == "fsdp":
            del sizes["replicate"]
        how: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)),
            "mp_policy": MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
            "reshard_after_forward": config.reshard_after_forward,
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if config.offload
            else OffloadPolicy(),
        }
        units: list[Any] = self.model.units()
        for unit in units[:-1]:
            fully_shard(unit, **how)
        how["reshard_after_forward"] = False  # backward begins with the last block and the parameters outside
        fully_shard(units[-1], **how)
        fully_shard(self.model, **how)
        if self.device.type == "cuda":  # gloo's gathers block the host, so they cannot run ahead
            for unit, following in pairwise(units):
                unit.set_modules_to_forward_prefetch([following])
                following.set_modules_to_backward_prefetch([unit])
        if self.device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    gather: Any = _Blocking(all_gather_single, self._waited)
                    scatter: Any = _Blocking(reduce_scatter_single, self._waited)
                    module.set_custom_all_gather(gather)
                    module.set_custom_reduce_scatter(scatter)
        ignore_view_warnings()
        return self.model

    def nats(self, ids: Ids, given: NDArray[np.number] | None = None) -> Tensor:
        """Return the nats of ids (see `Engine`). No backward pass follows, so what was gathered is dropped here."""
        result = super().nats(ids, given)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return result

    def _waited(self, seconds: float) -> None:
        self._pass_times.wait(seconds)

    def fragments(self) -> list[Fragment]:
        """Return what this rank holds: all of each tensor, or its rows of it."""
        return self._parameter_fragments() + self._memory_fragments()

    def owned_fragments(self) -> list[Fragment]:
        """Return this rank's share of each fragment; replicas divide what they all hold."""
        replica, replicas = self._world.rank // self._shards, self._world.size // self._shards
        own = [fragment.share(replica, replicas) for fragment in self._parameter_fragments()]
        return own + self._memory_fragments()

    def counters(self) -> dict[str, int]:
        """Return the number of updates that the moments are made of."""
        return {"optimizer_steps": self._optimizer_steps}

    def restore(self, counters: dict[str, int]) -> None:
        """Set the number of updates."""
        self._optimizer_steps = counters["optimizer_steps"]
        for state in self._states().values():
            if "step" in state:
                state["step"].fill_(counters["optimizer_steps"])

    def _states(self) -> dict[Tensor, dict[str, Tensor]]:
        return {parameter: state for optimizer in self._optimizers for parameter, state in optimizer.state.items()}

    def _parameter_fragments(self) -> list[Fragment]:
        fragments, states = [], self._states()
        for name, parameter in self.model.named_parameters():
            moments = {kind: tensor for kind, tensor in states.get(parameter, {}).items() if kind != "step"}
            fragments.append(self._fragment(fragment_name(MODEL, name), parameter))
            fragments.extend(self._fragment(fragment_name(kind, name), moment) for kind, moment in moments.items())
        return fragments

    def _fragment(self, name: str, tensor: Tensor) -> Fragment:
        """Return all of a tensor, or this rank's rows of it; FSDP2 splits rows as torch.chunk does."""
        length, *rest = tensor.shape
        rows = -(-length // self._shards)
        start = min(self._world.rank % self._shards * rows, length) * math.prod(rest)
        return Fragment(name, tuple(tensor.shape), start, _local_part(tensor.detach()).view(-1))

    def _forward(self, ids: Tensor, memory: Memory, given: Tensor | None = None) -> tuple[Tensor, Memory]:
        if memory:
            return self._module(ids, memory)
        return (self._module(ids) if given is None else self._module(ids, given)), {}

    def _begin_passes(self, training: bool) -> None:
        super()._begin_passes(training)
        if self._copies is not None:
            self._copies.refresh()

    def _prepare(self, *, last: bool) -> None:
        if self._copies is not None:
            self._copies.sums_in_place = not last or self._world.size == 1
        if isinstance(self._module, FSDPModule):
            self._module.set_requires_gradient_sync(last)
        elif isinstance(self._module, DistributedDataParallel):
            self._module.require_backward_grad_sync = last  # what the context manager no_sync sets

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _clip(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _watched_parameters(self) -> Iterable[nn.Parameter]:
        if not isinstance(self._module, FSDPModule):
            return self.model.parameters()
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        return [parameter for module in sharded for parameter in unsharded_parameters(module)]

    def watch_gradients(self, see: Callable[[Tensor], None]) -> Callable[[], None]:
        """Call a function with the gradients of each pass (see `BaseEngine`)."""
        if self._copies is None:
            return super().watch_gradients(see)
        return self._copies.watch(see)

    def squares_of_gradient(self) -> Tensor:
        """Return the sums of squares of the accumulated gradient (see `BaseEngine`)."""
        gradients = [parameter.grad for parameter in self.model.parameters()]
        norms = [
            torch.zeros((), device=self.device)
            if gradient is None
            else torch.linalg.vector_norm(_local_part(gradient), dtype=torch.float32).to(self.device)
            for gradient in gradients
        ]
        replicas = self._world.size // self._shards
        return torch.stack(norms).double().square() / replicas

    def _update(self, learning_rate: float, is_fit: Tensor) -> None:
        if self._selects_on_device or is_fit:
            for optimizer in self._optimizers:
                if self._selects_on_device:  # fused optimizers select on the device, as for a GradScaler
                    optimizer.found_inf = (~is_fit).float()  # type: ignore[attr-defined]
                set_rate(optimizer, learning_rate)
                optimizer.step()

    def _after_update(self) -> None:
        self._optimizer_steps += 1
        super()._after_update()

    def _not_finite(self) -> list[str]:
        return [
            name
            for name, p in self.model.named_parameters()
            if p.grad is not None and not torch.isfinite(_local_part(p.grad)).all()
        ]

    def _drop_gradient(self) -> None:
        self.model.zero_grad()


class _Blocking:
    """Collective of FSDP2 that blocks the host, as all of gloo's do, and reports the seconds."""

    def __init__(self, collective: Callable[..., Any], waited: Callable[[float], None]) -> None:
        self._collective, self._waited = collective, waited

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **how: Any) -> Any:
        begin = time.perf_counter()
        work = self._collective(output_tensor, input_tensor, **how)
        self._waited(time.perf_counter() - begin)
        return work


class _WithWeights(nn.Module):
    """Model that runs on other weights in place of its parameters outside all blocks."""

    def __init__(self, model: ByteModel, weights: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__()
        self.model = model
        self._weights = weights

    def forward(self, *arguments: Any) -> Any:
        return functional_call(self.model, self._weights(), arguments)


def _local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
