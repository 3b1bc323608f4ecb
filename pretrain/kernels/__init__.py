"""Code for one kind of device. Each kernel has a plain PyTorch equivalent and a test against it."""
