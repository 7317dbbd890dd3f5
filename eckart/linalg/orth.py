"""Orthonormal bases of thin blocks. Not the polar factor: the basis of `orth` depends on the order of the columns."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import Refused, UsageError

Method = Literal["auto", "qr", "cholesky"]


def orth(matrix: Tensor, method: Method = "auto") -> Tensor:
    """Q (m, k) with orthonormal columns whose span holds the columns of the matrix.

    Cholesky-QR2 is made of products only and suits GPUs; where the columns are too dependent for it (condition about 1e7 in float32) Householder QR takes over.

    Args:
        matrix: (m, k), m >= k, float32 or float64.
        method: "qr" (Householder), "cholesky" (Cholesky-QR2 with that fallback), or "auto": "qr" on the CPU, "cholesky" elsewhere.

    Returns:
        Q, in the dtype of the matrix. Dependent columns are completed to an orthonormal set.

    Raises:
        Refused: more columns than rows.

    Example:
        >>> q = orth(torch.tensor([[3.0, 1.0], [4.0, 2.0], [0.0, 2.0]]))
        >>> bool(torch.allclose(q.T @ q, torch.eye(2), atol=1e-6))
        True
    """
    if matrix.ndim != 2 or matrix.shape[0] < matrix.shape[1]:
        raise Refused(f"orth: expected a matrix with at least as many rows as columns, found shape {tuple(matrix.shape)}.")
    if method not in ("auto", "qr", "cholesky"):
        raise UsageError(f'orth: expected "auto", "qr" or "cholesky", found {method!r}.')
    if method == "cholesky" or (method == "auto" and matrix.device.type != "cpu"):
        basis = cholesky_qr2(matrix)
        if basis is not None:
            return basis
    return torch.linalg.qr(matrix)[0]


def cholesky_qr2(matrix: Tensor) -> Tensor | None:
    """Two rounds of Q = A chol(A^T A)^-T; None when the Cholesky breaks down or the result is not orthonormal.

    Example:
        >>> cholesky_qr2(torch.ones(3, 2)) is None
        True
    """
    basis = matrix
    for _ in range(2):
        wide = basis.to(torch.float64)
        lower, info = torch.linalg.cholesky_ex(wide.T @ wide)
        if int(info) != 0:
            return None
        basis = torch.linalg.solve_triangular(lower, wide.T, upper=False).T.to(matrix.dtype)
    wide = basis.to(torch.float64)
    off = wide.T @ wide - torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)
    return basis if float(off.abs().max()) < (1e-12 if matrix.dtype == torch.float64 else 1e-5) else None


def whiten(rows: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that span the rows given, and how the given rows are made of them.

    Dependent rows are dropped instead of failing. Float32 rows go through their float64 Gram, which resolves 1e-8 of the longest; float64 rows
    need QR for theirs.

    Args:
        rows: (b, n).
        floor: directions with a norm at or below it are dropped.

    Returns:
        (Q (c, n), B (b, c)) with rows = B Q up to what was dropped, c <= b.

    Example:
        >>> q, b = whiten(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), 1e-6)
        >>> q.shape, bool(torch.allclose(b.float() @ q, torch.tensor([[2.0, 0.0], [2.0, 0.0]])))
        (torch.Size([1, 2]), True)
    """
    if rows.dtype == torch.float64 and rows.shape[0] <= rows.shape[1]:
        basis, upper = torch.linalg.qr(rows.T)
        left, lengths, right = torch.linalg.svd(upper.T)
        kept = lengths > floor
        return right[kept] @ basis.T, left[:, kept] * lengths[kept]
    wide = rows.to(torch.float64)
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    kept = values > max(floor, 0.0) ** 2
    scale = values[kept].sqrt()
    vectors = vectors[:, kept]
    return ((vectors / scale).T @ wide).to(rows.dtype), vectors * scale


def complete(rows: Tensor, weak: Tensor, generator: torch.Generator) -> Tensor:
    """Replace the weak rows by directions orthogonal to all others.

    Args:
        rows: (k, n), k <= n; those not weak are orthonormal.
        weak: (k,) bool.
        generator: of the directions, on the CPU.

    Returns:
        (k, n) with orthonormal rows, float64.

    Example:
        >>> x = complete(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([False, True]), torch.Generator().manual_seed(0))
        >>> bool(x[1].abs().allclose(torch.tensor([0.0, 1.0], dtype=torch.float64)))
        True
    """
    out = rows.to(torch.float64)
    count = int(weak.sum())
    if count == 0:
        return out
    good = out[~weak]
    fresh = torch.randn(count, rows.shape[1], generator=generator, dtype=torch.float64).to(out.device)
    for _ in range(3):
        fresh = fresh - (fresh @ good.T) @ good
        fresh = torch.linalg.qr(fresh.T)[0].T
    out = out.clone()
    out[weak] = fresh
    return out
