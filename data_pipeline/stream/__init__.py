"""Byte streams: from a sequence number to its bytes, and from a stream to a rank's micro-batches."""
