"""The training loop, and what a run writes to its folder."""
