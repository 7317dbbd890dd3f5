"""How many triples: a number, or a share of the energy that the spectrum must reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError


@dataclass(frozen=True)
class Target:
    """A rank, or the share of ‖A‖² to be held. Both None: full rank.

    Args:
        rank: number of triples.
        share: of the squared Frobenius norm, in (0, 1].
    """

    rank: int | None = None
    share: float | None = None

    def pick(self, squares: Tensor, total: float) -> int | None:
        """Rank for squares of singular values in descending order, or None when those given do not hold enough.

        Args:
            squares: (k,) float64.
            total: ‖A‖².
        """
        if self.share is None:
            return self.rank if self.rank is None or self.rank <= squares.shape[0] else None
        held = squares.cumsum(0)
        enough = torch.nonzero(held >= self.share * total * (1 - 1e-14))
        return int(enough[0]) + 1 if enough.shape[0] else None


def target(size: int, rank: int | None, energy: float | None, error: float | None, name: str = "matrix") -> Target:
    """The target that a call names, checked.

    Raises:
        UsageError: more than one of the three, or a value out of range.

    Example:
        >>> target(10, None, None, 0.5).share
        0.75
    """
    given = [k for k, v in (("rank", rank), ("energy", energy), ("error", error)) if v is not None]
    if len(given) > 1:
        raise UsageError(f"{name}: at most one of rank, energy and error chooses the rank, found {' and '.join(given)}.")
    if rank is not None:
        if isinstance(rank, bool) or int(rank) != rank or not 1 <= rank <= size:
            raise UsageError(f"{name}: expected a rank from 1 to {size} (the smaller side), found {rank}.")
        return Target(rank=int(rank))
    if energy is not None:
        if not 0 < energy <= 1:
            raise UsageError(f"{name}: energy is the share of the squared Frobenius norm to keep, in (0, 1], found {energy}.")
        return Target(share=float(energy))
    if error is not None:
        if not 0 <= error < 1:
            raise UsageError(f"{name}: error is relative to the Frobenius norm, in [0, 1), found {error}.")
        return Target(share=1.0 - float(error) ** 2)
    return Target()
