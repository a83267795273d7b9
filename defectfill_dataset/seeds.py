"""Random numbers that depend on names, never on what was drawn before: the ground of exact resume."""

import hashlib
import json


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of `parts`, such as (seed, "boxes", step, sample)."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
