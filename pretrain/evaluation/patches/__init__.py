"""Patches of a text, for a person to look at: where they start, their sizes, and what their starts agree with."""
