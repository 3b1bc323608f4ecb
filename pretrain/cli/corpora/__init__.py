"""Commands of corpora."""
