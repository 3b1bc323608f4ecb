"""Seeds of random generators, each a function of what is to be drawn."""

import hashlib


def seed_of(*what: object) -> int:
    """A seed that only this has."""
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
