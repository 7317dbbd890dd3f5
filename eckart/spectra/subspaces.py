"""Numbers read off two subspaces, or off the singular vectors of two matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Refused
from ..linalg import Factors, svdvals


def principal_angles(U: Tensor, V: Tensor) -> Tensor:
    """Angles between the spans of two orthonormal bases, in radians, ascending. Not between their vectors: any rotation of a basis gives the same.

    Small angles come from their sines and large ones from their cosines (Björck and Golub 1973, doi:10.1090/S0025-5718-1973-0348991-3), so
    both ends are good to the precision of the bases.

    Args:
        U: (m, r) orthonormal columns.
        V: (m, s) orthonormal columns.

    Returns:
        (min(r, s),) float64, in [0, pi/2].

    Raises:
        Refused: bases of different spaces, or an empty one.

    Example:
        >>> e = torch.eye(3)
        >>> [round(float(a), 4) for a in principal_angles(e[:, :2], e[:, 1:])]
        [0.0, 1.5708]
    """
    if U.ndim != 2 or V.ndim != 2 or U.shape[0] != V.shape[0] or 0 in (*U.shape, *V.shape):
        raise Refused(f"principal angles: expected bases (m, r) and (m, s) of one space, found {tuple(U.shape)} and {tuple(V.shape)}.")
    wide, thin = (U, V) if U.shape[1] >= V.shape[1] else (V, U)
    wide, thin = wide.to(torch.float64), thin.to(torch.float64)
    inner = wide.T @ thin
    cosines = svdvals(inner).clamp(max=1)
    sines = svdvals(thin - wide @ inner).flip(0).clamp(max=1)
    return torch.where(cosines.square() > 0.5, torch.asin(sines), torch.acos(cosines))


def overlap(U: Tensor, V: Tensor) -> float:
    """‖U^T V‖² / min(r, s): mean squared cosine of the principal angles, 1 for equal spans; max(r, s) / m is what random ones give.

    Example:
        >>> overlap(torch.eye(3)[:, :2], torch.eye(3)[:, 1:])
        0.5
    """
    return float((U.to(torch.float64).T @ V.to(torch.float64)).square().sum()) / min(U.shape[1], V.shape[1])


def singular_alignment(a: Factors, b: Factors, threshold: float = 0.1) -> float:
    """Agreement of the singular vectors of two matrices, pair by pair: sum over i, j of (u_i . p_j)(v_i . q_j) / sqrt(k l).

    The sum runs over the k and l triples whose singular value is above `threshold` times the largest of its matrix. It is the cosine between
    the two truncated polar factors: 1 when the leading triples are the same, about 0 for unrelated matrices. It does not weigh by singular values.
    Ito, Yamada and Kumagai (arXiv:2402.04051) use such a score; their normalisation could not be checked, this one is ours.

    Args:
        a: all triples of the first matrix.
        b: all triples of the second one, of the same shape.
        threshold: relative to the largest singular value.

    Example:
        >>> f = Factors(torch.eye(2), torch.tensor([2.0, 1.0]), torch.eye(2))
        >>> singular_alignment(f, f)
        1.0
    """
    k, l = (max(1, int((f.S / f.S[0] > threshold).sum())) for f in (a, b))
    left = a.U[:, :k].to(torch.float64).T @ b.U[:, :l].to(torch.float64)
    right = a.Vh[:k].to(torch.float64) @ b.Vh[:l].to(torch.float64).T
    return float((left * right).sum()) / (k * l) ** 0.5
