"""What ranks need, imported once in the process that they are forks of; also what torch and DeepSpeed import when used.

Nothing here may compute: a process that has started threads is not to be forked.
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.module_inject  # noqa: F401 once it knows what it is to run on
import setuptools  # noqa: F401
import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401

import pretrain.cli.app
import pretrain.engines.deepspeed  # noqa: F401
import tests.distributed.parity  # noqa: F401
