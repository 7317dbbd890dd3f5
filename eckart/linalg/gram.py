"""The whole spectrum from the float64 Gram of the smaller side.

The relative error of a singular value is about eps64 (sigma_1 / sigma_i)²: for float32 input better than a float32 SVD down to 1e-7 of the
largest. On a wide matrix the Gram is all that touches the long side, so it costs a quarter of an SVD.
"""

from __future__ import annotations

import math

from torch import Tensor

from .finish import Draft, descending, project
from .operator import Operator
from .rank import Target


def gram(op: Operator, target: Target, total: float, *, seed: int) -> Draft:
    """Leading triples of A (m, n), m <= n, with the whole spectrum.

    Args:
        op: the matrix.
        target: rank, or share of energy; full rank when it is neither.
        total: ‖A‖².
        seed: of the directions that stand in for those of zero singular values.
    """
    squares, vectors = descending(op.gram("left"))
    rank = pick(target, squares)
    U, S, Vh = project(op, vectors[:, :rank], squares[:rank], seed)
    following = math.sqrt(float(squares[rank])) if rank < len(squares) else None
    return Draft("gram", U, S, Vh, missed=0.0, kind="bound", spectrum=squares, following=following, passes=2)


def pick(target: Target, squares: Tensor) -> int:
    """The rank on a whole spectrum: all of it where a share of 1 is lost to rounding, or nothing was asked."""
    return target.pick(squares, float(squares.sum())) or len(squares)
