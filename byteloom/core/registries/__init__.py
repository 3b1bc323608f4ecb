"""Registries of what a package may add by name."""
