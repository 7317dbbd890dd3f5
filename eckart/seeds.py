"""Seeds from names, so that a result depends on what is computed and not on the order of the work."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_of(seed: int, *names: str) -> int:
    """A 63-bit seed from a run's seed and names.

    Args:
        seed: the seed of the run.
        *names: what the numbers are for, for instance a tensor's name.

    Returns:
        An integer in [0, 2**63).

    Example:
        >>> seed_of(0, "layers.0.q_proj") == seed_of(0, "layers.0.q_proj")
        True
    """
    text = "\x00".join((str(int(seed)), *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str, device: str | torch.device = "cpu") -> torch.Generator:
    """An own generator seeded by `seed_of(seed, *names)`; the global one is never touched."""
    import torch

    return torch.Generator(device=device).manual_seed(seed_of(seed, *names))
