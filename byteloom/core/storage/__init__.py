"""Files, locks and locations."""
