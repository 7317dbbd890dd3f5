"""Spectra of matrices that are not formed: a product of two thin ones, and a Gram of which only the eigenvalues are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Refused
from .svd import svdvals


@torch.no_grad()
def product_svdvals(left: Tensor, right: Tensor, name: str = "product") -> Tensor:
    """Singular values of left^T right. Not of left right^T: the common side is the rows, as in a weight gradient, the sum of outer products.

    With few rows the product is not formed: thin QR of both sides leaves a (t, t) matrix with the same singular values.

    Args:
        left: (t, m).
        right: (t, n).
        name: what messages call the product.

    Returns:
        (min(t, m, n),) float64, descending; the others of the min(m, n) are zero.

    Raises:
        Refused: different numbers of rows, no rows or columns, or not finite.

    Example:
        >>> product_svdvals(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0, 0.0]]))
        tensor([10.], dtype=torch.float64)
    """
    if left.ndim != 2 or right.ndim != 2 or len(left) != len(right) or 0 in (*left.shape, *right.shape):
        found = f"{tuple(left.shape)} and {tuple(right.shape)}"
        raise Refused(f"{name}: expected two matrices with equally many rows, none empty, found shapes {found}.")
    a, b = left.to(torch.float64), right.to(torch.float64)
    if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        raise Refused(f"{name}: holds NaN or Inf. A factorisation needs finite numbers.")
    rows = len(a)
    if rows < min(a.shape[1], b.shape[1]):
        core = torch.linalg.qr(a.T, mode="r")[1] @ torch.linalg.qr(b.T, mode="r")[1].T
        return svdvals(core, name=name)
    return svdvals(a.T @ b, tol=1e-7, name=name)


@torch.no_grad()
def eigvals_psd(matrix: Tensor, name: str = "matrix") -> Tensor:
    """Eigenvalues of a symmetric positive semidefinite matrix, float64, descending, negatives from rounding set to 0. Not the vectors, which
    `psd.eigh_psd` gives.

    Args:
        matrix: (k, k), symmetric up to rounding; the mean with its transpose is taken.
        name: used in messages.

    Raises:
        Refused: not square, empty, or not finite.

    Example:
        >>> eigvals_psd(torch.diag(torch.tensor([1.0, 4.0])))
        tensor([4., 1.], dtype=torch.float64)
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise Refused(f"{name}: expected a square matrix, not empty, found shape {tuple(matrix.shape)}.")
    work = matrix.to(torch.float64)
    work = (work + work.T) / 2
    if not bool(torch.isfinite(work).all()):
        raise Refused(f"{name}: holds NaN or Inf; a Gram matrix must be finite. Check the calibration data and the model's dtype.")
    return torch.linalg.eigvalsh(work).flip(0).clamp_min(0)
