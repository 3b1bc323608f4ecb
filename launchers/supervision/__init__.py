"""Supervision of ranks: heartbeats, restarts, and the record of launches."""
