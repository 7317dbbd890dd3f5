"""Square windows of a matrix, all of one shape whatever the matrix: exponents of matrices of different aspect become comparable.

The spectrum of pure noise depends on the aspect of the matrix, and an exponent fitted to it does too: from 2.1 (square) to 4.5 (1:8) at the
median. Windows of a fixed aspect take that away (FARMS, arXiv:2506.06280).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from .tails import Tail, hill

SIDE = 64
POSITIONS = 5


@dataclass(frozen=True)
class Windowed:
    """A tail fitted to the pooled values of all windows.

    Args:
        tail: from the median of the pooled values on. Its `error` counts them as independent; values of one matrix repel each other, so
            that alpha scatters less: on Gaussian matrices by a third of it.
        side: rows of a window, `across` its columns.
        across: see `side`.
        windows: how many.
    """

    tail: Tail
    side: int
    across: int
    windows: int


def farms(weight: Tensor, *, side: int = SIDE, aspect: float = 1.0, positions: int = POSITIONS) -> Windowed | None:
    """Hill's exponent from the median on, of the squared singular values of windows, pooled and fitted once.

    Windows lie on a grid of at most `positions` along each side of the matrix. A matrix that is too small for them shrinks both sides of
    the window, so that the aspect holds (the released program cuts the longer side only); the longer side of a window lies along the
    longer side of the matrix, so that transposing changes nothing.

    Args:
        weight: (m, n), finite.
        side: shorter side of a window.
        aspect: longer side over shorter side, at least 1.
        positions: along each side of the matrix.

    Returns:
        The fit, or None: the windows hold fewer than two distinct values that are not zero.

    Raises:
        UsageError: a setting out of range.

    Example:
        >>> flat = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> round(farms(flat).tail.alpha, 1)
        2.1
    """
    from ..linalg.stack import stack_squares

    if side < 1 or positions < 1 or not (math.isfinite(aspect) and aspect >= 1):
        raise UsageError(
            f"farms: expected side and positions of 1 or more and an aspect of 1 or more, found {side}, {positions}, {aspect}."
        )
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    rows, cols = wide.shape
    a = min(side, rows, int(cols / aspect))
    if a < 1:
        return None
    b = min(cols, round(a * aspect))
    cut = [wide[i : i + a, j : j + b] for i in starts(rows, a, positions) for j in starts(cols, b, positions)]
    squares = stack_squares(torch.stack(cut))
    squares = squares.where(squares > len(squares[0]) * torch.finfo(torch.float64).eps * squares.max(), 0.0)
    tail = hill(squares)
    if tail is None:
        return None
    return Windowed(tail, a, b, len(cut))


def starts(length: int, window: int, positions: int) -> list[int]:
    """First indices of at most `positions` windows, evenly spaced from the beginning.

    Example:
        >>> starts(10, 4, 3), starts(4, 4, 3), starts(5, 4, 3)
        ([0, 3, 6], [0], [0, 1])
    """
    room = length - window
    if positions == 1 or room == 0:
        return [0]
    step = max(1, room // (positions - 1))
    return [i * step for i in range(min(positions, room // step + 1))]
