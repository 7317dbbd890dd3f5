"""Keep some of the inputs of a linear map and let them stand in for the rest: column selection with the Nyström refit.

y = W z with C = E[z z^T]. With the inputs S kept, the best map from z_S to y is W C_{:,S} C_SS^-1, and what is lost is
tr(W (C - C_{:,S} C_SS^-1 C_{S,:}) W^T). For a fixed order of the inputs one Cholesky factor of the permuted C gives the loss of every prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import Refused
from .psd import eigh_psd

By = Literal["leverage", "greedy", "energy"]
ROUNDS = 64  # of the greedy rule: it looks again after every n / 64 columns
JITTER = 1e-10  # share of the mean diagonal that makes a singular C factorisable; the refit itself uses none


@dataclass(frozen=True)
class Order:
    """Columns by merit, best first, in units of `group` columns that go together.

    Args:
        columns: (n,) indices; its first k * group entries are what rank k keeps.
        gains: (n / group,) loss that each unit takes away when it joins those before it.
        group: columns per unit.
        total: loss when nothing is kept, tr(W C W^T).
    """

    columns: Tensor
    gains: Tensor
    group: int
    total: float


def order_columns(
    second: Tensor, weight: Tensor, by: By = "leverage", *, ridge: float = 1.0, pairs: int = 1, name: str = "columns"
) -> Order:  # fmt: skip
    """The inputs of y = W z in the order in which they are worth keeping, with the exact loss of every prefix.

    Not the optimal subset, which is NP-hard: "leverage" ranks by ridge leverage scores, "energy" by each input's own share in the output,
    "greedy" by the loss that it takes away given what is kept, looking again after every n / 64 columns.

    Args:
        second: C (n, n), second moment of z.
        weight: W (m, n).
        by: the rule.
        ridge: of the leverage scores diag(C (C + ridge * mean eigenvalue * I)^-1).
        pairs: units of this many columns go together: unit i holds i, i + n / pairs, ...; rotary position codes pair the two halves of a head.
        name: used in messages.

    Raises:
        Refused: shapes that do not fit, or values that are not finite.

    Example:
        >>> c = torch.diag(torch.tensor([1.0, 9.0, 4.0]))
        >>> order_columns(c, torch.eye(3)).columns.tolist()
        [1, 2, 0]
    """
    n = second.shape[0]
    if second.ndim != 2 or second.shape != (n, n) or weight.ndim != 2 or weight.shape[1] != n or n % pairs:
        raise Refused(
            f"{name}: expected C (n, n) and W (m, n) with n a multiple of {pairs}, found {tuple(second.shape)}, {tuple(weight.shape)}."
        )
    c, w = second.to(torch.float64), weight.to(torch.float64)
    if not bool(torch.isfinite(c).all() and torch.isfinite(w).all()):
        raise Refused(f"{name}: the weight or the second moment holds NaN or Inf.")
    units = torch.arange(n, device=c.device).reshape(pairs, n // pairs).T  # (units, pairs)
    if by == "greedy":
        order = _greedy(c, w, units)
    else:
        merit = _leverage(c, ridge) if by == "leverage" else w.square().sum(0) * c.diagonal()
        order = units[torch.argsort(merit[units].sum(1), descending=True, stable=True)]
    flat = order.reshape(-1)
    gains = (w[:, flat] @ _cholesky(c[flat][:, flat])).square().sum(0).reshape(-1, pairs).sum(1)
    return Order(flat, gains, pairs, float((w @ c).mul(w).sum()))


def refit(second: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """W C P^T (P C P^T)^+ (m, k), float64: the map that reads z' = P z and is nearest to y = W z.

    Args:
        second: C (n, n), second moment of z, or its covariance.
        weight: W (m, n).
        kept: (k,) indices of the inputs that make up z', or P (k, n).

    Example:
        >>> refit(torch.ones(2, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
        tensor([[3.]], dtype=torch.float64)
    """
    c, w = second.to(torch.float64), weight.to(torch.float64)
    if kept.ndim == 1:
        beside, inner = c[:, kept], c[kept][:, kept]
    else:
        p = kept.to(torch.float64)
        beside = c @ p.T
        inner = p @ beside
    return solve_psd(inner, (w @ beside).T, "kept inputs").T


def subspace(second: Tensor, reads: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of z in the order in which the maps that read it want them, and the loss each takes away.

    For maps O_1, ..., O_g with M = sum O_h^T O_h and C = E[z z^T], keeping the first k rows of R and refitting the maps loses
    sum_h E‖O_h z‖² minus the first k gains: the best for any k directions.

    Args:
        second: C (n, n).
        reads: M (n, n).

    Returns:
        (R (n, n) with rows of length 1, or 0 where nothing is left to see; gains (n,) descending), float64.

    Example:
        >>> r, gains = subspace(torch.diag(torch.tensor([1.0, 4.0])), torch.eye(2))
        >>> gains.tolist(), r.abs().tolist()
        ([4.0, 1.0], [[0.0, 1.0], [1.0, 0.0]])
    """
    values, vectors = eigh_psd(second, "subspace")
    root = (vectors * values.sqrt()) @ vectors.T
    wide = reads.to(torch.float64)
    gains, inner = eigh_psd(root @ wide @ root, "subspace")
    rows = inner.T @ root @ wide
    length = rows.norm(dim=1)
    seen = length > 1e-12 * length.max().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(seen[:, None], rows / length.masked_fill(~seen, 1)[:, None], 0), gains


def solve_psd(matrix: Tensor, right: Tensor, name: str = "matrix", clamp: float = 1e-12) -> Tensor:
    """matrix^+ right for a symmetric positive semidefinite matrix, in float64; eigenvalues below `clamp` of the largest count as zero.

    Example:
        >>> solve_psd(torch.diag(torch.tensor([2.0, 0.0])), torch.tensor([[4.0], [1.0]])).T
        tensor([[2., 0.]], dtype=torch.float64)
    """
    values, vectors = eigh_psd(matrix, name)
    good = values > clamp * values[0].clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.where(good, 1 / values.masked_fill(~good, 1), 0)
    return vectors @ (inverse[:, None] * (vectors.T @ right.to(torch.float64)))


def _leverage(c: Tensor, ridge: float) -> Tensor:
    values, vectors = eigh_psd(c, "columns")
    mean = float(values.mean())
    return vectors.square() @ (values / (values + ridge * mean)) if mean > 0 else torch.zeros_like(values)


def _cholesky(c: Tensor) -> Tensor:
    """L with L L^T = C up to a jitter that grows until the factorisation exists."""
    scale = float(c.diagonal().mean())
    if scale == 0:
        return torch.zeros_like(c)
    for power in range(8):
        shifted = c + torch.eye(len(c), dtype=c.dtype, device=c.device) * (scale * JITTER * 10**power)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            return lower
    raise Refused("columns: the second moment is not positive semidefinite. Collect the statistics again.")


def _greedy(c: Tensor, w: Tensor, units: Tensor) -> Tensor:
    """Units by the loss they take away from the current residual, R = C minus what the kept ones explain."""
    rest, left, out = c.clone(), torch.arange(len(units), device=c.device), []
    step = -(-len(units) // ROUNDS)
    floor = 1e-12 * float(c.diagonal().max())
    while len(left):
        diagonal = rest.diagonal()
        gain = torch.where(diagonal > floor, (w @ rest).square().sum(0) / diagonal.clamp_min(floor or 1.0), 0)
        best = torch.argsort(gain[units[left]].sum(1), descending=True, stable=True)[:step]
        chosen = left[best]
        out.append(chosen)
        left = left[torch.isin(left, chosen, invert=True)]
        flat = units[chosen].reshape(-1)
        rest = rest - rest[:, flat] @ solve_psd(rest[flat][:, flat], rest[flat], "columns")
        rest = (rest + rest.T) / 2
    return units[torch.cat(out)]
