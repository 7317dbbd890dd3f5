"""Sums of singular values that can be differentiated, through the Gram matrix of the smaller side."""

from __future__ import annotations

import torch
from torch import Tensor

from .psd import eigh_psd


def leading_share(matrix: Tensor, k: int, floor: float = 1e-12) -> Tensor:
    """(s_1 + ... + s_k) / (s_1 + ... ) of the singular values, with its gradient. Of a zero matrix it is 1, without one.

    The gradient is U diag(d share / d s) V^T, which needs no gap between singular values; where s_k = s_{k+1} it is one of the subgradients,
    and values below the floor give none.

    Args:
        matrix: (m, n) floating point.
        k: how many lead; with k at or above the rank the share is 1.
        floor: squared singular values below this share of the largest squared one count as zero.

    Returns:
        A scalar of the matrix's type.

    Raises:
        Refused: not finite.

    Example:
        >>> import torch
        >>> leading_share(torch.diag(torch.tensor([3.0, 1.0])), 1)
        tensor(0.7500)
    """
    with torch.no_grad():
        work = matrix.detach().to(torch.float64)
        tall = work.shape[0] > work.shape[1]
        squares, vectors = eigh_psd(work.T @ work if tall else work @ work.T, "logits")
        keep = squares > floor * squares[:1]
        values = squares.sqrt().masked_fill(~keep, 0)
        total, top = values.sum(), values[:k].sum()
        if float(total) == 0:
            return matrix.new_ones(())
        slope = -top / total**2 + (torch.arange(len(values), device=values.device) < k) / total
        inner = (vectors * (slope / values.masked_fill(~keep, 1)).masked_fill(~keep, 0)) @ vectors.T
        gradient = (work @ inner if tall else inner @ work).to(matrix.dtype)
        share = (top / total).to(matrix.dtype)
    return share + ((matrix - matrix.detach()) * gradient).sum()
