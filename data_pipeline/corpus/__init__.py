"""Corpora on disk or at a URL: blocks, shards, manifests, verification and repair."""
