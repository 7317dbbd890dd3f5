"""Numbers read off the singular values of one matrix. All take s (k,), descending and not negative, and return plain numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

POINTS = 64  # of a spectrum kept for plots


def energy_rank(s: Tensor, share: float) -> int:
    """Smallest r whose leading squared singular values hold `share` of the total; 0 for a zero matrix.

    Example:
        >>> energy_rank(torch.tensor([3.0, 1.0]), 0.9)
        1
    """
    square = s.to(torch.float64).square()
    total = float(square.sum())
    if total == 0:
        return 0
    return min(int((square.cumsum(0) < share * total * (1 - 1e-12)).sum()) + 1, len(s))


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of s / sum(s) (Roy and Vetterli 2007): on singular values, not on their squares. 0 for a zero matrix.

    Example:
        >>> round(effective_rank(torch.ones(4)), 6)
        4.0
    """
    p = s.to(torch.float64)
    total = float(p.sum())
    if total == 0:
        return 0.0
    p = p[p > 0] / total
    return math.exp(float(-(p * p.log()).sum()))


def stable_rank(s: Tensor) -> float:
    """sum(s^2) / max(s)^2: at least 1, at most the rank; 0 for a zero matrix.

    Example:
        >>> stable_rank(torch.tensor([2.0, 2.0, 1.0]))
        2.25
    """
    square = s.to(torch.float64).square()
    top = float(square.max())
    return float(square.sum()) / top if top > 0 else 0.0


def participation_rank(s: Tensor) -> float:
    """(sum s^2)^2 / sum s^4: the number of equal values that would spread the energy as widely; 0 for a zero matrix.

    Example:
        >>> round(participation_rank(torch.ones(5)), 6)
        5.0
    """
    square = s.to(torch.float64).square()
    fourth = float(square.square().sum())
    return float(square.sum()) ** 2 / fourth if fourth > 0 else 0.0


def numerical_rank(s: Tensor, shape: tuple[int, int], eps: float = torch.finfo(torch.float32).eps) -> int:
    """Values above max(shape) * eps * max(s): LAPACK's and NumPy's default threshold, with the eps of float32 storage."""
    return int((s > max(shape) * eps * float(s.max())).sum()) if float(s.max()) > 0 else 0


def thin(s: Tensor, points: int = POINTS) -> dict[str, Any]:
    """A spectrum on at most `points` logarithmically spaced ranks (1-based), for plots."""
    count = len(s)
    at = torch.unique(torch.logspace(0, math.log10(count), points, dtype=torch.float64).round().long().clamp(1, count))
    return {"spectrum": [float(v) for v in s[at - 1]], "spectrum_at": at.tolist()}
