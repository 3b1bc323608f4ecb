"""Checks of a run before it trains."""
