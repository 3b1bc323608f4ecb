"""Part sharded: FSDP2 of one rank, with and without offload, has the losses of one process."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from gpu_parts import Row, Setting
from gpu_parts.models import FAMILIES, engine_of, train
from pretrain.models import small_config

TOLERANCE = 1e-3
"""Largest difference of a loss, relative: bf16 rounds in another order."""
STEPS = 3


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the difference of losses, and the memory of the device."""
    for name in setting.pick(FAMILIES, FAMILIES[:1]):
        config = small_config(name, dropout=0.0)
        plain = train(engine_of(setting, config, micro_batch=2), config, range(STEPS), micro_batch=2)
        for offload in (False, True):
            setting.free_memory()
            engine = engine_of(setting, config, micro_batch=2, name="fsdp", offload=offload)
            losses = train(engine, config, range(STEPS), micro_batch=2)
            worst = max(abs(own / other - 1) for own, other in zip(losses, plain, strict=True))
            memory = f"; {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the device" if setting.is_cuda else ""
            title = f"{name}, fsdp{', offload' if offload else ''}: largest difference of a loss"
            yield Row(title, worst, "", f"at most {TOLERANCE:g}{memory}", worst <= TOLERANCE)
            del engine
    dist.destroy_process_group()
