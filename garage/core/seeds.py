"""One seed, many independent named streams.

Every consumer of randomness derives its own seed from the run's seed and its name, so that adding a consumer never shifts the
numbers another one sees. Derivation is BLAKE2b over the names; collisions are as unlikely as 63 bits allow.
"""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names` of the run seeded with `seed`."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
