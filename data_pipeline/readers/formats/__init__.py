"""Readers, one file a kind of source."""
