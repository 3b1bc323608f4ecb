"""Corpora to bytes: documents, blocks, shards, and the stream that is a function of the step."""
