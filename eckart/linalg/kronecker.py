"""A matrix as a sum of Kronecker products: the layout of Van Loan and Pitsianis, in which the best such sum is a truncated SVD."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def split_shape(m: int, n: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((m1, n1), (m2, n2)) with m1 m2 = m and n1 n2 = n: factors that are as square, and as equal in size, as divisors allow.

    Args:
        m: rows.
        n: columns.

    Example:
        >>> split_shape(2048, 5504)
        ((32, 86), (64, 64))
    """
    m1, n2 = _divisor(m), _divisor(n)
    return (m1, n // n2), (m // m1, n2)


def _divisor(size: int) -> int:
    """The largest divisor up to the square root."""
    return next(d for d in range(isqrt(size), 0, -1) if size % d == 0)


def terms(m: int, n: int) -> int:
    """Kronecker products that are enough for every m x n matrix."""
    (m1, n1), (m2, n2) = split_shape(m, n)
    return min(m1 * n1, m2 * n2)


def laid_out(matrix: Tensor) -> Tensor:
    """W (m, n) as (m1 n1, m2 n2), in which A (x) B is the outer product of A's and B's entries. A permutation: norms stay.

    A plain reshape to this shape is none of that: it mixes rows of both factors.

    Args:
        matrix: W.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, 3), torch.arange(6.0).reshape(3, 2)
        >>> bool((laid_out(torch.kron(a, b)) == torch.outer(a.reshape(-1), b.reshape(-1))).all())
        True
    """
    (m1, n1), (m2, n2) = split_shape(*matrix.shape)
    return matrix.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
