"""Singular values of many small matrices of one shape."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Refused


@torch.no_grad()
def stack_squares(A: Tensor) -> Tensor:
    """Squared singular values of each matrix of a stack, by float64 Grams of the smaller side. No vectors, no certificate.

    Args:
        A: (b, m, n), floating point.

    Returns:
        (b, min(m, n)), float64, descending, not negative; below 1e-13 of the largest they are rounding.

    Raises:
        Refused: not a stack of matrices, empty, not real, or not finite.

    Example:
        >>> stack_squares(torch.diag(torch.tensor([3.0, -4.0])).expand(2, 2, 2))
        tensor([[16.,  9.],
                [16.,  9.]], dtype=torch.float64)
    """
    if A.ndim != 3 or A.numel() == 0 or not A.dtype.is_floating_point:
        raise Refused(f"stack_squares: expected real matrices of shape (b, m, n), none empty, found {A.dtype} of shape {tuple(A.shape)}.")
    wide = A.to(torch.float64)
    if not bool(torch.isfinite(wide).all()):
        raise Refused("stack_squares: holds NaN or Inf. A factorisation needs finite numbers.")
    gram = wide @ wide.mT if A.shape[1] <= A.shape[2] else wide.mT @ wide
    return torch.linalg.eigvalsh(gram).flip(1).clamp_min(0)
