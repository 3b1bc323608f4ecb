"""Sizes, batch, bytes and learning rate of a run from a budget of training FLOPs and of a device's memory.

    FLOPs ─▶ width and depth: as many bytes as the FLOPs pay for are BYTES_PER_PARAMETER times the parameters
                 │
                 ├─▶ bytes, batch, steps ─▶ learning rate of the base model
                 └─▶ does a micro-batch fit into the memory?  no: keep less, then shard, then a narrower model

docs/guides/training/transfer.md has the sources of the rules.
"""

import math
from dataclasses import dataclass
from typing import Any

from byteloom.core.errors import CorrectableError
from byteloom.core.text import count
from data_pipeline.stream.mixture import MOST_SEQUENCES
from pretrain.engines import ENGINES, CheckpointingConfig, EngineConfig, compute_dtype, gpu_precision
from pretrain.estimate.activations import KEEP_ALL, activation_lines, on_meta
from pretrain.estimate.states import USABLE, states_on_rank
from pretrain.models import ModelConfig, all_families, family, model_config
from pretrain.models.registry import ModelSize
from pretrain.optim import OPTIMIZERS

BYTES_PER_PARAMETER = 60
"""Bytes that a model of the best size reads for each parameter (Limisiewicz et al. 2026, arXiv:2605.01188). The
paper counts parameters of the global model, and all count here."""
WIDTH_STEP = 64
"""Step of widths: the channels of an attention head."""
WIDEST = 16384
MOST_OF_WIDEST = 2
"""Largest bytes per parameter of a model of this width, in units of BYTES_PER_PARAMETER."""
BASE_WIDTH = 256
"""Width of the base model of `optimizer.scaling` mup."""
BASE_RATE, BASE_BYTES, BASE_BATCH = 2e-3, 16e6, 8192
"""Peak rate of recipes of the base width, at so many bytes in all and in a batch: those of configs/*/books-*.yaml."""
BATCH_FACTOR, BATCH_EXPONENT = 156, 0.383
"""Best batch in bytes: factor times a power of all bytes. The fit of Bergsma et al. 2025 (arXiv:2505.13738) is 0.0306
D^0.383 sequences of 2,048 tokens for D tokens, here of 4.4 bytes each."""
FEWEST_STEPS = 1500
"""Steps for which small runs have smaller batches than that."""
HORIZON_EXPONENT = -0.32
"""Exponent of the best rate in all bytes (Bjorck et al. 2024, arXiv:2409.19913)."""
CONTEXTS = ((1e14, 512), (1e16, 1024), (1e18, 2048), (1e20, 4096), (math.inf, 8192))
"""Largest budgets in FLOPs, and the sequence length up to each."""
SHAPE_FIELDS = frozenset({"width", "heads", "cross_heads"})
"""Config fields in which the base model differs."""


class BudgetError(CorrectableError):
    """No model fits a budget."""


@dataclass(frozen=True)
class DeviceBudget:
    """Devices of a run."""

    memory: float
    """Memory of one GPU, in bytes."""
    gpus: int = 1


@dataclass(frozen=True)
class SizedRun:
    """Sizes of a run."""

    size: ModelSize
    model: ModelConfig
    base: dict[str, Any]
    """Value of `optimizer.base`."""
    parameters: int
    row_flops: int
    """Training FLOPs of one row."""
    global_batch: int
    micro_batch: int
    steps: int
    learning_rate: float
    engine: str
    checkpointing: str
    device_bytes: int
    """Bytes on each GPU, of states and activations."""
    wanted: ModelSize
    """Size that the FLOPs alone ask for, with this context."""

    @property
    def bytes(self) -> int:
        """Return the bytes that the run reads."""
        return self.steps * self.global_batch * self.size.sequence_length

    @property
    def flops(self) -> int:
        """Return the training FLOPs of the run."""
        return self.steps * self.global_batch * self.row_flops


def size_run(name: str, flops: float, devices: DeviceBudget, sequence_length: int | None = None) -> SizedRun:
    """Return the sizes of a run.

    Args:
        name: of the model family.
        flops: training FLOPs.
        devices: the GPUs.
        sequence_length: context; None chooses it by the FLOPs.

    Raises:
        BudgetError: the family declares no sizes, no model fits, or the FLOPs are too few or too many.
        RegistryError: there is no family of this name.
    """
    if family(name).of_size is None:
        known = [each for each, entry in all_families().items() if entry.of_size is not None]
        raise BudgetError(f"the family {name} declares no sizes; use {', '.join(known)}")
    length = sequence_length or context_of(flops)
    wanted = best_size(name, flops, length)
    found = _fitted(name, flops, devices, wanted, wanted) or _widest_fitting(name, flops, devices, wanted)
    if found is None:
        raise BudgetError(
            f"not even a {name} of {WIDTH_STEP} channels and rows of {length} bytes fits into "
            f"{devices.memory / 2**30:g} GiB; give more --memory, or a shorter --sequence-length"
        )
    if (rows := found.steps * found.global_batch) > MOST_SEQUENCES:
        raise BudgetError(
            f"{flops:.3g} FLOPs pay for {rows:.3g} rows with a {name} of {found.size.width:,} channels, the widest "
            f"that fits into {devices.memory / 2**30:g} GiB, and a run can read {MOST_SEQUENCES:,}; give more "
            "--memory, or fewer --flops"
        )
    return found


def context_of(flops: float) -> int:
    """Return the sequence length of a budget."""
    return next(length for most, length in CONTEXTS if flops <= most)


def layers_of(width: int) -> int:
    """Return the depth of a width: as GPT-3's models of 125 million and 1.3 billion parameters (arXiv:2005.14165)."""
    return max(2, round(min(width / 64, 8 + width / 128)))


def best_size(name: str, flops: float, length: int) -> ModelSize:
    """Return the size whose bytes per parameter are nearest to BYTES_PER_PARAMETER, by bisection of the width.

    Raises:
        BudgetError: the FLOPs are less than a step of the narrowest model, or ask for more than the widest one.
    """
    narrow, wide = 1, WIDEST // WIDTH_STEP
    _, least = _cost(model_of(name, ModelSize(WIDTH_STEP, layers_of(WIDTH_STEP), length)))
    if flops < least:
        raise BudgetError(
            f"{flops:.3g} FLOPs are less than one step: a row of {length} bytes costs {least:.3g} "
            f"with a {name} of {WIDTH_STEP} channels, the narrowest; give more --flops, or a shorter --sequence-length"
        )

    def ratio(steps: int) -> float:
        size = ModelSize(steps * WIDTH_STEP, layers_of(steps * WIDTH_STEP), length)
        parameters, row_flops = _cost(model_of(name, size))
        return flops / row_flops * length / parameters / BYTES_PER_PARAMETER

    while wide - narrow > 1:
        middle = (narrow + wide) // 2
        narrow, wide = (middle, wide) if ratio(middle) > 1 else (narrow, middle)
    if wide * WIDTH_STEP == WIDEST and ratio(wide) > MOST_OF_WIDEST:
        raise BudgetError(
            f"{flops:.3g} FLOPs ask for a {name} of more than {WIDEST:,} channels, for which there are no rules; "
            "give fewer --flops"
        )
    best = min((narrow, wide), key=lambda steps: abs(math.log(ratio(steps))))
    return ModelSize(best * WIDTH_STEP, layers_of(best * WIDTH_STEP), length)


def model_of(name: str, size: ModelSize) -> ModelConfig:
    """Return the config of a family's model of a size."""
    of_size = family(name).of_size
    assert of_size is not None
    return model_config({"family": name, "sequence_length": size.sequence_length, "dropout": 0.0, **of_size(size)})


def base_of(name: str, size: ModelSize) -> dict[str, Any]:
    """Return `optimizer.base` for a model of a size: the widths and heads of the base width."""
    of_size = family(name).of_size
    assert of_size is not None
    return _shape(of_size(ModelSize(BASE_WIDTH, size.layers, size.sequence_length)))


def batch_of(run_bytes: float, length: int) -> int:
    """Return the rows of a batch for a run of so many bytes."""
    size = min(BATCH_FACTOR * run_bytes**BATCH_EXPONENT, run_bytes / FEWEST_STEPS)
    return max(1, round(size / length))


def rate_of(run_bytes: float, batch_bytes: float) -> float:
    """Return the peak rate of the base model: as the root of the batch, and falling with the bytes of the run."""
    return BASE_RATE * math.sqrt(batch_bytes / BASE_BATCH) * (run_bytes / BASE_BYTES) ** HORIZON_EXPONENT


def _shape(section: Any) -> dict[str, Any]:
    """Return the fields of a section that are widths and numbers of heads."""
    return {
        key: _shape(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if isinstance(value, dict | list) or key in SHAPE_FIELDS
    }


def _cost(config: ModelConfig) -> tuple[int, int]:
    """Return parameters, and training FLOPs of a row."""
    model = on_meta(config)
    return model.parameter_count(), model.step_flops(config.sequence_length)


def _fitted(name: str, flops: float, devices: DeviceBudget, size: ModelSize, wanted: ModelSize) -> SizedRun | None:
    """Return the run of a model with the first way to hold it that fits into the memory; None if none fits."""
    config, length = model_of(name, size), size.sequence_length
    parameters, row_flops = _cost(config)
    rows = max(devices.gpus, batch_of(flops / row_flops * length, length))
    dtype, usable = compute_dtype(gpu_precision("auto")), devices.memory * USABLE
    adamw, model = OPTIMIZERS.get("adamw"), on_meta(config)
    engines = ["ddp", *(["fsdp"] if devices.gpus > 1 else [])]
    states = {
        engine: sum(states_on_rank(EngineConfig(name=engine), adamw, model, dtype, devices.gpus, passes=2))
        for engine in engines
    }
    if min(states.values()) > usable:
        return None
    for mode in ("none", "full"):
        lines = activation_lines(config, dtype, KEEP_ALL if mode == "none" else CheckpointingConfig(mode=mode))
        for engine in engines:
            gathers = ENGINES.get(engine).sharding.weights and devices.gpus > 1
            line = lines.of(gathers=gathers)
            most = min(line.rows_within(usable - states[engine]), -(-rows // devices.gpus))
            if most < 1:
                continue
            micro_batch = 2 ** int(math.log2(most))
            unit = micro_batch * devices.gpus
            global_batch = max(1, round(rows / unit)) * unit
            steps = max(1, round(flops / (row_flops * global_batch)))
            return SizedRun(
                size=size,
                model=config,
                base=base_of(name, size),
                parameters=parameters,
                row_flops=row_flops,
                global_batch=global_batch,
                micro_batch=micro_batch,
                steps=steps,
                learning_rate=rate_of(steps * global_batch * length, global_batch * length),
                engine=engine,
                checkpointing=mode,
                device_bytes=states[engine] + line.at(micro_batch),
                wanted=wanted,
            )
    return None


def _widest_fitting(name: str, flops: float, devices: DeviceBudget, wanted: ModelSize) -> SizedRun | None:
    """Return the run of the widest model that is narrower than wanted and fits, by bisection; None if none fits."""
    fits, fails, best = 0, wanted.width // WIDTH_STEP, None
    while fails - fits > 1:
        middle = (fits + fails) // 2
        size = wanted._replace(width=middle * WIDTH_STEP, layers=layers_of(middle * WIDTH_STEP))
        found = _fitted(name, flops, devices, size, wanted)
        fits, fails, best = (fits, middle, best) if found is None else (middle, fails, found)
    return best


def devices_in_words(devices: DeviceBudget) -> str:
    """Return the devices as the reader calls them."""
    return count(devices.gpus, f"GPU of {devices.memory / 2**30:g} GiB", f"GPUs of {devices.memory / 2**30:g} GiB each")
