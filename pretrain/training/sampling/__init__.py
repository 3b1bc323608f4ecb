"""Samples that a run writes during its training.

    checkpoint of a step ─▶ byteloom samples (another process) ─▶ RUN/samples/step-00001200/ ─▶ log, report, trackers

Another process reads the weights from the checkpoint and decodes on the CPU. Training neither waits for it nor shares
memory, random numbers or a device with it, and the engine does not matter.
"""

from pretrain.training.sampling.config import SamplesConfig

__all__ = ["SamplesConfig"]
