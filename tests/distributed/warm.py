"""What ranks need, imported once in the process that they are forks of."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401 once it knows what it is to run on

import pretrain.cli  # noqa: F401
import tests.distributed.parity  # noqa: F401
