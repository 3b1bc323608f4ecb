"""Scores of a model, and text that it generates."""
