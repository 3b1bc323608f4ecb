"""Imports of ranks, done once in the process that all ranks are forks of.

They include what torch and DeepSpeed import when they are used. Nothing here may compute, because a process that has
started threads must not be forked.
"""

import os
import threading

from byteloom.core.packages import long_lived_imports

os.environ.setdefault("DS_ACCELERATOR", "cpu")

with long_lived_imports():  # DeepSpeed collects garbage often; in a fork, that copies all memory that it visits
    import deepspeed.module_inject  # noqa: F401 once it knows what it is to run on
    import setuptools  # noqa: F401
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401

    import pretrain.cli.train
    import pretrain.engines.deepspeed
    import pretrain.terminal.progress
    import tests.distributed.parity  # noqa: F401

pretrain.terminal.progress.QUIET_SECONDS = threading.TIMEOUT_MAX  # see tests/conftest.py
