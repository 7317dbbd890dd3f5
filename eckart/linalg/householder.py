"""Orthonormal bases as products of Householder reflections, and back; differentiable, so that a basis can train and stay one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError


def reflectors(basis: Tensor, name: str = "basis") -> tuple[Tensor, Tensor]:
    """Unit vectors v_i and signs e with basis = H(v_1) ... H(v_r) I[:, :r] diag(e), H(v) = I - 2 v v^T.

    Not LAPACK's packed output, whose last reflection may be the identity: a unit vector cannot say that, and the signs say it instead.

    Args:
        basis: (m, r), orthonormal columns.
        name: used in messages.

    Returns:
        V (m, r), zero above its diagonal, and e (r,) of +1 and -1, in the basis's type.

    Raises:
        UsageError: columns that are not orthonormal to 1e-3.

    Example:
        >>> v, e = reflectors(torch.eye(3)[:, :2])
        >>> torch.allclose(reflect(v) * e, torch.eye(3)[:, :2])
        True
    """
    work = basis.to(torch.float64).clone()
    r = work.shape[1]
    eye = torch.eye(r, dtype=torch.float64, device=work.device)
    if work.ndim != 2 or work.shape[0] < r or float((work.T @ work - eye).abs().amax()) > 1e-3:
        raise UsageError(
            f"{name}: expected orthonormal columns, found {tuple(basis.shape)} that are not. A metric gives such factors: set metric.kind=identity."
        )
    vectors = torch.zeros_like(work)
    signs = torch.ones(r, dtype=torch.float64, device=work.device)
    for i in range(r):
        v = work[i:, i].clone()
        signs[i] = -1.0 if v[0] >= 0 else 1.0  # away from the column: no cancellation
        v[0] -= signs[i] * v.norm()
        v /= v.norm()
        vectors[i:, i] = v
        work[i:] -= 2 * torch.outer(v, v @ work[i:])
    return vectors.to(basis.dtype), signs.to(basis.dtype)


def reflect(vectors: Tensor) -> Tensor:
    """H(v_1) ... H(v_r) I[:, :r] of vectors of any length above zero, (m, r) orthonormal to rounding.

    Args:
        vectors: V (m, r), r <= m.

    Returns:
        I[:, :r] - V T V[:r]^T with the triangular T of the compact WY form; det of the whole product is (-1)^r.

    Example:
        >>> reflect(torch.tensor([[1.0], [0.0]])).T.tolist()
        [[-1.0, 0.0]]
    """
    m, r = vectors.shape
    gram = vectors.T @ vectors
    inverse = gram.triu(1) + torch.diag(gram.diagonal() / 2)
    middle = torch.linalg.solve_triangular(inverse, vectors[:r].T, upper=True)
    return torch.eye(m, r, dtype=vectors.dtype, device=vectors.device) - vectors @ middle
