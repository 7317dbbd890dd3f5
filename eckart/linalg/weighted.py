"""The best low-rank approximation in a metric on the rows, the columns, or both, in projector form.

min over rank-r W' of ‖So (W - W') Si‖_F, with So (m, m) and Si (n, n) symmetric positive semidefinite. With M = So W Si = U Σ V^T:

- only Si: W' = U_r (U_r^T W). Si is never inverted, so it may be singular (fewer tokens than features).
- only So: W' = (W V_r) V_r^T, likewise.
- both: So^-1 U_r (U_r^T So W), or (W Si V_r) V_r^T Si^-1: the better conditioned side is inverted, once, and the clamp is reported.

The loss that remains is the tail of Σ, in every case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import Refused
from .factors import Factors
from .operator import sum_of_squares
from .psd import Root, Weight, half, root
from .svd import svd, svdvals

TOL = 1e-6  # excess over the optimum that `solve` allows: far below what storing W' in its own precision costs


@dataclass(frozen=True)
class Weighted:
    """W' = left (m, r) @ right (r, n), float64. Not balanced: `left` has orthonormal columns in one-sided input metrics.

    Args:
        left: (m, r).
        right: (r, n).
        spectrum: singular values of So W Si, those that were computed, descending: all of them, or the leading r.
        total: squared Frobenius norm of So W Si.
        factors: the factorisation of So W Si, with its certificate.
        record: which side was inverted, conditions, and raised eigenvalues.
    """

    left: Tensor
    right: Tensor
    spectrum: Tensor
    total: float
    factors: Factors
    record: Mapping[str, Any] = field(default_factory=dict)

    def truncate(self, rank: int) -> Weighted:
        """The leading `rank` triples; equal to solving again at that rank."""
        cut = self.factors.truncate(rank)
        return Weighted(self.left[:, :rank], self.right[:rank], self.spectrum, self.total, cut, self.record)


def weigh(matrix: Tensor, out: Root | None, into: Root | None) -> Tensor:
    """So W Si in float64; an absent side is the identity."""
    work = matrix.to(torch.float64)
    if into is not None:
        work = into.apply(work.T).T
    return work if out is None else out.apply(work)


def roots(matrix: Tensor, out: Weight | None, into: Weight | None, *, symmetric: bool = False) -> tuple[Root | None, Root | None]:
    """The roots of both sides on the device of the matrix, checked against its shape; for a side alone any root unless it is to be symmetric."""
    for side, size in ((out, matrix.shape[0]), (into, matrix.shape[1])):
        if side is not None and side.size != size:
            raise Refused(f"{side.name}: the metric has size {side.size}, the matrix {tuple(matrix.shape)} wants {size} on that side.")
    place, make = matrix.device, root if symmetric or (out is not None and into is not None) else half
    return (make(out.to(place)) if out is not None else None, make(into.to(place)) if into is not None else None)


def solve(
    matrix: Tensor, out: Weight | None = None, into: Weight | None = None, *, rank: int, method: str = "auto", certify: str = "free", seed: int = 0, name: str = "matrix"
) -> Weighted:  # fmt: skip
    """The rank-r W' that is nearest to W in the metric of both sides.

    Not iterative and not regularised: a closed form of one factorisation, valid for singular metrics as long as only one side has one.

    Args:
        matrix: W (m, n).
        out: metric on the rows (size m), or None.
        into: metric on the columns (size n), or None.
        rank: r, at least 1 and at most min(m, n).
        method: as in `svd`.
        certify: as in `svd`; the certificate speaks of So W Si.
        seed: of the algorithms that draw numbers.
        name: used in messages.

    Returns:
        `Weighted`; `left @ right` is W' in the precision of float64.

    Raises:
        Refused: not finite, a metric of the wrong size, or a two-sided metric whose sides are both singular.

    Example:
        >>> import torch
        >>> w, x = torch.randn(4, 6), torch.randn(50, 6)
        >>> best = solve(w, into=Weight(x.T @ x), rank=2)
        >>> tail = (x @ (w - (best.left @ best.right).float()).T).norm()
        >>> bool((tail - (best.total - best.spectrum[:2].square().sum()) ** 0.5).abs() < 1e-3)
        True
    """
    if out is None and into is None:
        return _plain(matrix, rank, method, certify, seed, name)
    so, si = roots(matrix, out, into)
    weighed = weigh(matrix, so, si)
    factors = svd(weighed, rank, method=method, certify=certify, seed=seed, tol=TOL, name=name)  # type: ignore[arg-type]
    work = matrix.to(torch.float64)
    record: dict[str, Any] = {"inverted": None, "raised": {k: r.raised for k, r in (("out", so), ("in", si)) if r is not None and r.raised}}
    u, v = factors.U.to(torch.float64), factors.Vh.T.to(torch.float64)
    if so is None:
        left, right = u, u.T @ work
    elif si is None:
        left, right = work @ v, v.T
    elif min(so.condition, si.condition) == float("inf"):
        raise _no_answer([(w, s) for w, s in ((out, so), (into, si)) if w is not None])
    elif so.condition <= si.condition:
        left, right = so.solve(u), u.T @ so.apply(work)
        record |= {"inverted": "out", "condition": so.condition}
    else:
        left, right = work @ si.apply(v), si.solve(v).T
        record |= {"inverted": "in", "condition": si.condition}
    total = float(weighed.square().sum())
    return Weighted(left, right, factors.S.to(torch.float64), total, factors, record)


def _no_answer(sides: Sequence[tuple[Weight, Root]]) -> Refused:
    """Why two singular sides are refused, and what helps: a clamp, unless one of them has nothing to be clamped to."""
    for weight, side in sides:
        if side.zero:
            some = " for one of its matrices" if isinstance(weight.matrix, tuple) else ""
            return Refused(
                f"{weight.name}: zero on all calibration texts{some}, so the two-sided problem has no unique answer. Give other or more texts (--calib), "
                "or leave the layer out (--set 'target.skip=[...]' with its name beside what `eckart show RECIPE` lists there)."
            )
    names = " and ".join(weight.name for weight, _ in sides)
    return Refused(
        f"{names}: both metrics are singular, so the two-sided problem has no unique answer. "
        f"Set a positive clamp on one of them (--set {sides[0][0].option}=1e-4)."
    )


def _plain(matrix: Tensor, rank: int, method: str, certify: str, seed: int, name: str) -> Weighted:
    """Without a metric the core's own precision is enough, and half the memory of float64 products."""
    factors = svd(matrix, rank, method=method, certify=certify, seed=seed, tol=TOL, name=name)  # type: ignore[arg-type]
    values = factors.S.to(torch.float64)
    right = values[:, None] * factors.Vh.to(torch.float64)
    return Weighted(factors.U.to(torch.float64), right, values, sum_of_squares(matrix), factors, {"inverted": None, "raised": {}})


def spectrum(matrix: Tensor, out: Weight | None = None, into: Weight | None = None) -> Tensor:
    """All singular values of So W Si (min(m, n),), float64, descending.

    Example:
        >>> import torch
        >>> spectrum(torch.diag(torch.tensor([3.0, 4.0])))
        tensor([4., 3.], dtype=torch.float64)
    """
    return svdvals(weigh(matrix, *roots(matrix, out, into))).to(torch.float64)


def svd_in_metric(matrix: Tensor, metric: tuple[Weight | None, Weight | None], **options: Any) -> Factors:
    """`svd` of So W Si for a metric (out, in): the factorisation itself, in the metric's coordinates."""
    return svd(weigh(matrix, *roots(matrix, *metric, symmetric=True)), **options)
