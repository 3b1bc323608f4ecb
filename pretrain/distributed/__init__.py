"""Ranks, collectives, and the named ranges of tensors that a rank owns."""
