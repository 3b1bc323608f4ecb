"""Waits of the host for the device that a training step may have: the list of the fake device's test and of gpu.py."""

NUMBERS = "transfers:wait"
"""Wait for the numbers of a step, which are there before its update ends: FILE:FUNCTION. It waits for an event."""
WAITS_BEFORE_UPDATE = {"muon": "pytorch:_update"}
"""Reads of a value by optimizers that cannot skip an update on the device: FILE:FUNCTION by optimizer."""
