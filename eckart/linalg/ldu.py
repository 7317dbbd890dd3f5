"""Factorisations that take rows and columns as they come: LDU with row pivots, and Nyström from the leading ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Refused

TINY = 1e-6  # of a row's largest entry: below it the pivot does not scale the row


def ldu(matrix: Tensor, name: str = "matrix") -> tuple[Tensor, Tensor, Tensor]:
    """W = L diag(d) U with the row exchanges of partial pivoting taken into L, which is a permuted unit lower triangle.

    Not an approximation when cut: the first r pivots of a matrix without structure leave a larger remainder than the matrix itself.

    Args:
        matrix: W (m, n); k = min(m, n).
        name: used in messages.

    Returns:
        L (m, k), d (k,), U (k, n) in the matrix's type, float32 for narrower ones; their product is W to rounding. U has ones where its
        diagonal is, except in rows whose pivot is below 1e-6 of their largest entry: these have length 1 in the largest entry.

    Raises:
        Refused: not a matrix, or values that are not finite.

    Example:
        >>> left, d, right = ldu(torch.tensor([[1.0, 2.0], [4.0, 4.0]]))
        >>> d.tolist(), right.tolist()
        ([4.0, 1.0], [[1.0, 1.0], [0.0, 1.0]])
    """
    if matrix.ndim != 2 or not bool(torch.isfinite(matrix).all()):
        raise Refused(f"{name}: expected a finite matrix, found shape {tuple(matrix.shape)} or values that are NaN or Inf.")
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    packed, pivots, _ = torch.linalg.lu_factor_ex(matrix.to(torch.float64))  # a zero pivot is no error here
    m, n = packed.shape
    k = min(m, n)
    lower = packed[:, :k].tril(-1)
    lower.diagonal().fill_(1)
    order = torch.arange(m, device=packed.device)
    for i, p in enumerate((pivots.long() - 1).tolist()):  # the exchanges in the order in which they were made
        order[[i, p]] = order[[p, i]]
    left = torch.empty_like(lower)
    left[order] = lower
    upper = packed[:k].triu()
    d = upper.diagonal().clone()
    largest = upper.abs().amax(1)
    d = torch.where(d.abs() > TINY * largest, d, largest)
    right = upper / torch.where(d == 0, torch.ones_like(d), d)[:, None]
    return left.to(dtype), d.to(dtype), right.to(dtype)


def nystrom(matrix: Tensor, rank: int, ridge: float = 0.0, name: str = "matrix") -> tuple[Tensor, Tensor, Tensor]:
    """The leading columns C, the regularised pseudoinverse of the block where they cross the leading rows R, and these rows.

    Not the best approximation of its rank. Without a ridge C N R has the rows R and the columns C of W exactly, if the block is regular; an
    ill-conditioned block makes N huge, which the ridge bounds by 1 / (2 ridge s_1).

    Args:
        matrix: W (m, n).
        rank: r, number of rows and of columns.
        ridge: share of the block's largest singular value s_1; N = V diag(s / (s² + (ridge s_1)²)) U^T.
        name: used in messages.

    Returns:
        C (m, r), N (r, r), R (r, n).

    Raises:
        Refused: values that are not finite.

    Example:
        >>> w = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0]))
        >>> c, n, r = nystrom(w, 1)
        >>> torch.allclose(c @ n @ r, w)
        True
    """
    from .full import dense_svd

    dtype = torch.promote_types(matrix.dtype, torch.float32)
    work = matrix.to(torch.float64)
    columns, rows = work[:, :rank], work[:rank]
    u, s, vh, _ = dense_svd(work[:rank, :rank], name)
    floor = torch.finfo(dtype).eps * rank * s[:1]  # what is below it is rounding of the stored weight
    inverse = torch.where(s > floor, s / (s.square() + (ridge * s[:1]).square()).clamp_min(torch.finfo(torch.float64).tiny), 0)
    middle = (vh.T * inverse) @ u.T
    return columns.to(dtype), middle.to(dtype), rows.to(dtype)
