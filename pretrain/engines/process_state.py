"""State of the whole process that engines change.

                        changed                                      undone
    malloc              kept memory, by an engine on a CPU           no: it changes no result
    random generators   seeded before each pass of a step            no: every pass seeds them again
    CUDA arithmetic     no TF32; deterministic algorithms            no: each engine on CUDA sets it
    CUDA allocator      expandable segments                          no
    warnings            two messages of libraries are ignored        no
    DeepSpeed           environment, one switch, its communication   no: it reads them at any time

Other changes are torch's own: the current CUDA device (`choose_device`) and the activation budget of torch.compile
(`prepare_blocks`), which each engine sets for itself.
"""

import ctypes
import os
import warnings
from typing import Any

import torch

from byteloom.core.torch_compat import set_allocator

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""
ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""Variables with which a user sets torch's allocator."""
LARGEST_KEPT = 32 << 20
"""Size of the largest tensor whose memory is kept, in bytes. Larger ones return to the kernel, because a fragmented
heap may be twice as large as its contents."""


def keep_freed_memory() -> None:
    """Make malloc reuse freed memory instead of returning it to the kernel.

    Every step frees and allocates the same tensors. The kernel clears the memory that it hands out, on one core and
    while the loop waits: a tenth of a step. Only glibc's malloc has these settings; others stay as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_TOP_PAD, 64 << 20)


def set_up_cuda(*, deterministic: bool) -> None:
    """Set how CUDA computes and allocates. Call it before the first matrix product.

    fp32 products and convolutions are computed in fp32, not in TF32. Segments that can grow leave fewer holes in device
    memory, since the sizes of a step vary; a user's own setting of the allocator stays.

    Args:
        deterministic: whether equal inputs give equal results, bit for bit.
    """
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    if not ALLOCATOR_VARIABLES & os.environ.keys():
        set_allocator("expandable_segments:True")
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it with its first handle
    # Deterministic mode fills new memory, which takes time. Nothing reads memory that is not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_generators(seed: int) -> None:
    """Seed torch's default generators, from which models draw crops and dropout.

    `torch.manual_seed` formats the stack for each device that is not in use: 0.1 ms or more.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def ignore_view_warnings() -> None:
    """Ignore FSDP2's warning that a wrapped module returns a view; nothing writes into losses."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")


def set_up_deepspeed_environment(device_type: str, local_rank: int) -> None:
    """Set the variables that DeepSpeed reads when it is imported and later, unless a launcher has set them.

    Args:
        device_type: cpu or cuda.
        local_rank: number of this rank on its machine.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))


def set_up_deepspeed(deepspeed: Any) -> None:
    """Make DeepSpeed use the process group that exists.

    Args:
        deepspeed: the imported package.
    """
    warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning, "torch.distributed")  # called by DeepSpeed
    # An all-reduce for inference on CPUs, whose compilation here takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
