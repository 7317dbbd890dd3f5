"""Small symmetric systems of two factors: the pseudo-inverse of a Gram matrix, and P X + X Q = C."""

from __future__ import annotations

import torch
from torch import Tensor

from .psd import eigh_psd


def pinv_psd(matrix: Tensor, floor: float = 1e-10, name: str = "matrix") -> Tensor:
    """Pseudo-inverse of a symmetric positive semidefinite matrix, float64; of zero it is zero.

    Not a damped inverse: directions below the floor are left out, since a Gram matrix of rounded factors holds only noise there.

    Args:
        matrix: (k, k).
        floor: eigenvalues up to this share of the largest count as zero.
        name: used in messages.

    Returns:
        (k, k).

    Raises:
        Refused: not square, or not finite.

    Example:
        >>> import torch
        >>> pinv_psd(torch.diag(torch.tensor([4.0, 0.0]))).tolist()
        [[0.25, 0.0], [0.0, 0.0]]
    """
    values, vectors = eigh_psd(matrix, name)
    top = values[0] if len(values) else values.new_zeros(())
    keep = values > floor * top
    inverse = torch.where(keep, 1 / values.masked_fill(~keep, 1), torch.zeros_like(values))
    return (vectors * inverse) @ vectors.T


def sylvester_psd(p: Tensor, q: Tensor, c: Tensor, floor: float = 1e-10) -> Tensor:
    """X with P X + X Q = C, for symmetric positive semidefinite P and Q, float64.

    In the eigenbases of both the equation is a division by sums of eigenvalues. Where a sum is up to the floor the entry of X is free (or
    none exists) and zero is taken.

    Args:
        p: (k, k).
        q: (l, l).
        c: (k, l).
        floor: share of the largest sum of eigenvalues.

    Returns:
        (k, l).

    Raises:
        Refused: not square, or not finite.

    Example:
        >>> import torch
        >>> sylvester_psd(torch.eye(2), torch.eye(2), 4 * torch.ones(2, 2)).round(decimals=9).tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """
    left, u = eigh_psd(p, "sylvester (left)")
    right, v = eigh_psd(q, "sylvester (right)")
    sums = left[:, None] + right
    keep = sums > floor * sums.max() if sums.numel() else sums > 0
    inner = u.T @ c.to(torch.float64) @ v
    return u @ torch.where(keep, inner / sums.masked_fill(~keep, 1), torch.zeros_like(inner)) @ v.T
