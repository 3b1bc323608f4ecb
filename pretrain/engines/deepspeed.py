"""DeepSpeed engine: ZeRO-1, -2 and -3.

Each of W ranks holds so many numbers of N parameters:

              weights              gradients              masters, moments
    zero1        N                     N                     N/W, 2N/W
    zero2        N                    N/W                    N/W, 2N/W
    zero3   N/W, and a block          N/W                    N/W, 2N/W

Weights and the gradient of one pass have the precision of the passes; the other tensors are fp32. Under zero1, each
rank sums the gradients of its passes, and the ranks sum theirs once, after the last pass. Under zero2 and zero3, the
ranks sum gradients after each pass, some blocks at a time, and each rank sums its share over passes. Sums over ranks
are fp32.

DeepSpeed keeps masters and moments in flat ranges that ignore the boundaries of parameters.
tests/distributed/engines/test_deepspeed.py lists the internals that are used here, so another version fails there
first.
"""

import copy
import importlib
import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from byteloom.core.mappings import laid_over
from byteloom.core.packages import needed_by
from pretrain.distributed.fragments import MODEL, Fragment, fragment_name
from pretrain.distributed.world import World
from pretrain.engines.base import BaseEngine, materialize
from pretrain.engines.blocks import prepare_blocks
from pretrain.engines.config import EngineConfig
from pretrain.engines.engine import EngineError
from pretrain.engines.frozen import FrozenParameters
from pretrain.engines.process_state import set_up_deepspeed, set_up_deepspeed_environment
from pretrain.models.base import ByteModel, Memory
from pretrain.optim import OptimizerConfig
from pretrain.optim.adamw import MOMENTS, adam_of
from pretrain.optim.groups import parameter_rules, set_rate

_KINDS = {MODEL: None} | {moment: moment for moment in MOMENTS}
"""Kinds of fragments, and DeepSpeed's name of each."""


class DeepSpeedEngine(BaseEngine):
    """Engine of zero1, zero2 and zero3."""

    def __init__(
        self,
        config: EngineConfig,
        model: ByteModel,
        optimizer: OptimizerConfig,
        seed: int,
        world: World,
        *,
        global_batch: int,
        micro_batch: int,
    ) -> None:
        super().__init__(config, model, seed, world, global_batch=global_batch, micro_batch=micro_batch)
        deepspeed = _import_deepspeed(config.name, self.device.type, world.local_rank)
        settings = _settings(config, model, micro_batch, optimizer.clip_norm)
        try:
            deepspeed.DeepSpeedConfig(copy.deepcopy(settings))
        except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
            reason = " ".join(str(error).split())
            raise EngineError(f"DeepSpeed refuses its config, which includes engine.deepspeed: {reason}") from error
        model.train()
        prepare_blocks(config, model, self.device)
        rules = parameter_rules(optimizer, model)
        self._stage = int(config.name[-1])
        self._offloads = config.offload
        model.to(self.dtype)
        if self._stage == 3:
            for unit in model.units():
                unit.register_forward_pre_hook(_with_gradient)
            _partition(deepspeed, model, self.device, settings)
        else:
            materialize(model, self.device)
        with redirect_stdout(io.StringIO()):  # it prints the memory in use
            self._deepspeed, self._zero, *_ = deepspeed.initialize(
                model=model,
                optimizer=adam_of(optimizer, model.trained_parameters(), rules),
                config=settings,
                dist_init_required=False,
            )
        if self._stage == 3:
            for parameter in model.outside_units().values():  # the model's own forward pass uses it
                deepspeed.zero.register_external_parameter(model, parameter)
        self._is_bf16_stage_1 = hasattr(self._zero, "fp32_groups_flat_partition")
        """Whether DeepSpeed uses its own class for bf16 and stage 1, which it does unless it offloads."""
        self._masters: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat
            if self._stage == 3
            else self._zero.fp32_groups_flat_partition
            if self._is_bf16_stage_1
            else self._zero.single_partition_of_fp32_groups
        )
        """This rank's share of each group of parameters: flat, padded to the same length on all ranks."""
        self._state = self._zero.optimizer.state
        for flat in self._masters:
            moments = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
            self._state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()
        self._frozen = FrozenParameters(model.named_parameters(), world, offloads=config.offload)
        self._full_gradient = deepspeed.utils.safe_get_full_grad
        self.forget()

    def fragments(self) -> list[Fragment]:
        """Return this rank's ranges of masters and moments, and the memory of its rows."""
        find = self._shares_of_stage_3 if self._stage == 3 else self._shares
        own = [
            Fragment(fragment_name(kind, name), shape, start, data.detach())
            for name, parameter in self.model.trained_parameters().items()
            for kind, shape, start, data in find(parameter)
        ]
        return [*own, *self._frozen.fragments(), *self._memory_fragments()]

    def owned_fragments(self) -> list[Fragment]:
        """Return all fragments of this rank."""
        return self.fragments()  # masters and moments are on one rank each

    def counters(self) -> dict[str, int]:
        """Return the number of updates that the moments are made of."""
        return {"optimizer_steps": int(self._state[self._masters[0]]["step"])}

    def restore(self, counters: dict[str, int]) -> None:
        """Set the number of updates, and cast the masters to the weights of the passes."""
        for flat in self._masters:
            self._state[flat]["step"].fill_(counters["optimizer_steps"])
        self._frozen.cast()
        with torch.no_grad():
            if self._stage < 3:
                self._zero.update_lp_params()
                return
            self._zero._partition_all_parameters()
            for group in range(len(self._masters)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := self._zero.persistent_parameters:  # empty unless engine.deepspeed sets a threshold
                persistent[0].all_gather(persistent)

    def _shares(self, parameter: Tensor) -> Iterator[tuple[str, tuple[int, ...], int, Tensor]]:
        """Yield kind, shape, start and values of this rank's ranges of a parameter's fp32 state, for stages 1 and 2."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            for kind, key in _KINDS.items():
                start = mapping.lp_fragment_address.start
                yield kind, tuple(parameter.shape), start, mapping.get_hp_fragment(key)

    def _shares_of_stage_3(self, parameter: Any) -> Iterator[tuple[str, tuple[int, ...], int, Tensor]]:
        """Yield the same for stage 3. All ranks have parts of equal length; the last ones may be padding."""
        start = self._world.rank * parameter.ds_tensor.ds_numel
        length = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)
        if length > 0:
            for kind, key in _KINDS.items():
                part, _ = self._zero._get_fp32_opt_state_partition(parameter, True, key)
                yield kind, tuple(parameter.ds_shape), start, part[:length]

    def _forward(self, ids: Tensor, memory: Memory, given: Tensor | None = None) -> tuple[Tensor, Memory]:
        if memory:
            return self._deepspeed(ids, memory)
        return (self._deepspeed(ids) if given is None else self._deepspeed(ids, given)), {}

    def _prepare(self, *, last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(last)

    def _backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def _clip(self) -> Tensor:
        squares = get_total_norm(self._gradients()).double().square()
        self._world.sum_in_place(squares)
        return squares.sqrt().float()

    def _update(self, learning_rate: float, is_fit: Tensor) -> None:
        # DeepSpeed decides about non-finite gradients by itself, on the host, and drops them, which hides their place.
        # It knows no other condition, so the host decides here.
        if is_fit:
            set_rate(self._zero.optimizer, learning_rate)
            self._deepspeed.step()

    def _after_update(self) -> None:
        pass  # DeepSpeed's step has dropped the gradient

    def _gradients(self) -> list[Tensor]:
        """Return this rank's share of the accumulated gradient, after the last pass."""
        if self._offloads:
            return [flat.grad for flat in self._masters if flat.grad is not None]
        if self._is_bf16_stage_1:
            return list(self._zero.fp32_groups_gradient_flat_partition)
        return [gradient for group in self._zero.averaged_gradients.values() for gradient in group]

    def _not_finite(self) -> list[str]:
        trained = self.model.trained_parameters()
        gradients = ((name, self._full_gradient(parameter)) for name, parameter in trained.items())
        return [name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all()]

    def squares_of_gradient(self) -> Tensor:
        """Return the sums of squares of the accumulated gradient (see `BaseEngine`)."""
        squares = []
        for parameter in self.model.parameters():
            # All ranks get the whole gradient.
            gradient = self._full_gradient(parameter) if parameter.requires_grad else None
            norm = 0.0 if gradient is None else float(torch.linalg.vector_norm(gradient, dtype=torch.float32))
            squares.append(norm**2 / self._world.size)
        return torch.tensor(squares, dtype=torch.float64)

    def _drop_gradient(self) -> None:
        zero = self._zero
        if self._stage == 3:
            zero._pre_step()
            zero._partition_all_parameters()
        zero.zero_grad()
        if self._is_bf16_stage_1:
            return
        if self._stage < 3:
            zero.micro_step_id = -1
        for gradients in (zero.averaged_gradients, getattr(zero, "all_grad_tensors", {})):
            gradients.update(dict.fromkeys(gradients))
        if self._offloads:
            zero.reset_cpu_buffers()


def _import_deepspeed(engine: str, device_type: str, local_rank: int) -> Any:
    """Return DeepSpeed, set up for a device and for the process group that exists.

    Args:
        engine: `engine.name`.
        device_type: cpu or cuda.
        local_rank: number of this rank on its machine.

    Raises:
        MissingPackageError: DeepSpeed is not installed.
    """
    set_up_deepspeed_environment(device_type, local_rank)
    with needed_by(f"engine.name {engine}", "deepspeed"):
        deepspeed = importlib.import_module("deepspeed")
    set_up_deepspeed(deepspeed)
    return deepspeed


def _settings(config: EngineConfig, model: ByteModel, micro_batch: int, clip_norm: float) -> dict[str, Any]:
    """Return DeepSpeed's config for a recipe."""
    block = max(sum(parameter.numel() for parameter in unit.parameters()) for unit in model.units())
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # BaseEngine counts passes, and sums of nats are not averaged
        "gradient_clipping": clip_norm,
        # Add each gradient to its fp32 sum at once; otherwise all bf16 gradients live until the update.
        "bf16": {"enabled": config.precision == "bf16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": int(config.name[-1]),
            "offload_optimizer": {"device": "cpu" if config.offload else "none"},
            "reduce_bucket_size": block,
            "allgather_bucket_size": block + block % 2,
            "stage3_prefetch_bucket_size": block,
            "stage3_max_live_parameters": 2 * block,
            "stage3_param_persistence_threshold": 0,
        },
    }
    return laid_over(ours, config.deepspeed)


def _with_gradient(unit: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a block's arguments, whose first tensor of numbers needs a gradient in training.

    If frozen parameters alone make it, it needs none. DeepSpeed would then sum the gradients of the block over ranks
    before the backward pass has computed them.
    """
    floating = (n for n, each in enumerate(arguments) if isinstance(each, Tensor) and each.is_floating_point())
    first = next(floating, None)
    if first is None or not torch.is_grad_enabled() or arguments[first].requires_grad:
        return arguments
    return *arguments[:first], arguments[first].detach().requires_grad_(), *arguments[first + 1 :]


def _partition(deepspeed: Any, model: ByteModel, device: torch.device, settings: dict[str, Any]) -> None:
    """Shard parameters over ranks, one module at a time, so that no rank ever holds more than one module whole.

    Each block is gathered as a whole when it is used.
    """
    for unit in model.units():
        deepspeed.utils.set_z3_leaf_module(unit, True)
    for module in reversed(list(model.modules())):  # inner modules first
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.to(device)
            module.register_parameter(name, nn.Parameter(values.detach(), parameter.requires_grad))
        deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=next(model.parameters()).dtype)
