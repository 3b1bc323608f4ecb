"""Homes of checkpoints: a folder or a bucket, and the fence that lets only the newest start of a run write there."""
