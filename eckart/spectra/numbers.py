"""Numbers read off the singular values of one matrix. All take s (k,), descending and not negative, and return plain numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

POINTS = 64  # of a spectrum kept for plots


def squares(s: Tensor) -> Tensor:
    """Squared singular values, float64, without those that may be rounding: up to len(s) eps of float64 of the largest.

    Example:
        >>> squares(torch.tensor([2.0, 1.0, 1e-9], dtype=torch.float64)).tolist()
        [4.0, 1.0]
    """
    square = s.to(torch.float64).square()
    return square[square > len(s) * torch.finfo(torch.float64).eps * square.max()] if len(s) else square


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


def entropy(s: Tensor) -> float:
    """-sum p log p in nats, p = s^2 / sum(s^2): on squared singular values, unlike `effective_rank`. At most log(len(s)); 0 for a zero matrix.

    Example:
        >>> round(entropy(torch.ones(4)), 4)
        1.3863
    """
    p = s.to(torch.float64).square()
    total = float(p.sum())
    if total == 0:
        return 0.0
    p = p[p > 0] / total
    return max(0.0, float(-(p * p.log()).sum()))


def relative_error(s: Tensor, rank: int) -> float:
    """Frobenius error of the best approximation of that rank over the norm (Eckart and Young 1936); 0 for a zero matrix.

    Example:
        >>> relative_error(torch.tensor([4.0, 3.0]), 1)
        0.6
    """
    square = s.to(torch.float64).square()
    total = float(square.sum())
    return math.sqrt(float(square[rank:].sum()) / total) if total > 0 else 0.0


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
