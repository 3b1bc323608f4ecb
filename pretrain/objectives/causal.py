"""Causal objective: each id from those before it. Its loss is the only one in bits per byte."""

from pretrain.objectives.registry import ObjectiveEntry, Visibility, register_objective

register_objective(ObjectiveEntry(name="causal", show=None, unit="byte", visibilities=(Visibility.causal,)))
