"""Inspection of a stream: what an epoch reads of a corpus, and where the ids of a sequence come from."""
