"""Everything random in step t is a function of (seed, t): no random state is ever saved, and a resumed run is exact."""

import hashlib

import torch


def seed_of(seed: int, *keys: int | str) -> int:
    """A 63-bit seed from a run's seed and any keys (what is drawn, which step, which draw)."""
    text = "/".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    return torch.Generator().manual_seed(seed_of(seed, *keys))
