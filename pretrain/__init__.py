"""Models, engines, checkpoints and the training loop."""
