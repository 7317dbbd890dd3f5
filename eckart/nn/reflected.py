"""A branch whose two bases train as products of Householder reflections, and so stay orthonormal."""

from __future__ import annotations

from torch import Tensor

from ..linalg.householder import reflect
from .branch import LowRank


class Reflected(LowRank):
    """`LowRank` with `left` (m, r) and `right` (r, n) holding reflection vectors instead of the factors, which are orthonormal whatever is trained.

    The singular values of what it adds are the absolute values of its core, up to the scale, throughout training.
    Lengths of the vectors do not matter, so weight decay only moves the effective step size.

    Args:
        *args, **how: as of `LowRank`; the core must be a diagonal.
    """

    def _tensors(self, initial: bool = False) -> dict[str, Tensor]:
        found = super()._tensors(initial)
        return {**found, "left": reflect(found["left"]), "right": reflect(found["right"].T).T}

    def bases(self, initial: bool = False) -> tuple[Tensor, Tensor]:
        """(left (m, r), right (r, n)) orthonormal, as they are or as they began."""
        found = self._tensors(initial)
        return found["left"], found["right"]
