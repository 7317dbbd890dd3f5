"""From the factors of a matrix that has changed a little to those of the new one: one pass, then a look whether that was enough."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import Refused
from ..seeds import generator
from .choose import PROBES
from .factors import Factors
from .finish import Draft
from .operator import Operator, sum_of_squares
from .orth import orth
from .subspace import iterate

MOST = 3  # passes after which a cold start is the better use of the flops


def basis_of(warm: Factors | Tensor, shape: tuple[int, int], name: str = "matrix") -> Tensor:
    """The old right basis (n, k), checked.

    Args:
        warm: Factors of the old matrix, or its right basis (n, k).
        shape: (m, n) of the new matrix.

    Raises:
        Refused: a basis of another size, or one that is not finite.
    """
    if isinstance(warm, Factors):
        if warm.shape != shape:
            raise Refused(f"{name}: warm holds factors of a matrix of shape {warm.shape}, this one is {shape}.")
        basis = warm.Vh.T
    else:
        if warm.ndim != 2 or warm.shape[0] != shape[1] or not 1 <= warm.shape[1] <= shape[1]:
            raise Refused(f"{name}: warm is a right basis of shape ({shape[1]}, k), found {tuple(warm.shape)}.")
        basis = warm
    if not math.isfinite(sum_of_squares(basis)):
        raise Refused(f"{name}: the basis given as warm holds NaN or Inf.")
    return basis.detach()


def warm_start(op: Operator, basis: Tensor, rank: int, total: float, *, tol: float, seed: int) -> Draft | None:
    """Leading triples of A by one pass from an old basis (n, k), more when the energy still moves; None when it does not settle.

    A few random columns go along: an old basis can be invariant and yet wrong, and only something outside it can tell.

    Args:
        op: the new matrix.
        basis: the old right basis (n, k); made orthonormal where it is not.
        rank: r.
        total: ‖A‖².
        tol: allowed relative excess of the Frobenius error, judged by an estimate.
        seed: of the random columns.
    """
    old = basis[:, :rank].to(op.device, op.dtype)
    if not _orthonormal(old):
        old = orth(old)
    width = min(*op.shape, rank + PROBES)
    fresh = torch.randn(op.shape[1], width - old.shape[1], generator=generator(seed, "warm"), dtype=op.dtype).to(op.device)
    start = torch.cat([old, fresh], dim=1)
    return iterate(op, start, old.shape[1] == rank, rank, total, tol=tol, passes=1, most=MOST, method="warm")


def _orthonormal(basis: Tensor) -> bool:
    gram = (basis.T @ basis).to(torch.float64)
    return float((gram - torch.eye(len(gram), dtype=torch.float64, device=gram.device)).abs().max()) < 1e-4
