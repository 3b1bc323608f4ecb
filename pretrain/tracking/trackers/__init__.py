"""Trackers beside MLflow, one file each. A file here registers itself; docs/extending.md has one of another package."""
