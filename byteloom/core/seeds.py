"""Seeds of random generators, each a function of the purpose of its numbers."""

import hashlib


def seed_of(*what: object) -> int:
    """Return the seed of a purpose, such as ("dropout", seed, step)."""
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
