"""Intruder dimensions: leading singular vectors of a fine-tuned weight that resemble none of the base weight's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Found, OfPair, PairView

if TYPE_CHECKING:
    from torch import Tensor

TOP = 10  # leading left singular vectors of the fine-tuned weight that are looked at
EPSILON = 0.5  # cosine below which one of them is an intruder


def best_cosines(base: Tensor, tuned: Tensor, top: int = TOP) -> Tensor:
    """For each of the leading left singular vectors of `tuned`, its largest absolute cosine with any left singular vector of `base`.

    Args:
        base: W0 (m, n), not zero.
        tuned: W (m, n), not zero.
        top: number of vectors of W; at most min(m, n).

    Returns:
        (top,) float64, in the order of the singular values of W.

    Example:
        >>> import torch
        >>> W0 = torch.diag(torch.tensor([3.0, 2.0, 0.0]))[:, :2]
        >>> best_cosines(W0, W0 + torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, 0.0]]), top=1).round(decimals=3)
        tensor([0.3160], dtype=torch.float64)
    """
    from ..linalg import svd

    return _cosines(svd(base).U, svd(tuned).U, top)


def _cosines(u0: Tensor, u: Tensor, top: int) -> Tensor:
    return (u[:, :top].double().T @ u0.double()).abs().amax(1).clamp(max=1)


def compute(view: PairView) -> Found:
    """Intruders among the leading `TOP` vectors, and how far their subspace has turned."""
    import math

    from ..spectra.subspaces import principal_angles

    zero = [name for name, one in (("base", view.base), ("fine-tuned", view.other)) if not bool(one.weight.any())]
    if zero:
        return Found(None, valid=False, note=f"the {zero[0]} weight is zero: it has no singular vectors")
    u0, u = view.base.factors.U, view.other.factors.U
    top = min(TOP, u.shape[1])
    cosines = _cosines(u0, u, top)
    turned = float(principal_angles(u0[:, :top], u[:, :top])[-1]) * 180 / math.pi
    m, n = view.site.shape
    value = {
        "count": int((cosines < EPSILON).sum()),
        "lowest_cosine": float(cosines.min()),
        "subspace_angle": turned,
        "cosines": cosines.tolist(),
    }
    note = (
        "the matrix is tall: directions outside the span of the base weight count as intruders, which cannot exist in a wide one"
        if m > n
        else ""
    )
    return Found(value, note=note, settings={"top": top})


MEASURE = OfPair(
    name="intruder",
    title="Intruder dimensions of a fine-tuned weight",
    paper="arXiv:2410.21228",
    estimator="left singular vectors of the fine-tuned weight with max |cosine| to the base weight's below epsilon",
    compute=compute,
    settings={"top": TOP, "epsilon": EPSILON},
    note="counts of matrices of different shape do not compare; where singular values nearly coincide vectors turn freely, so read the angle "
    "between the leading subspaces (degrees) beside it",
    differs="PEFT's repair (`reduce_intruder_dimension`) counts the same; its docstring says that a larger "
    "mitigation_lambda removes more, its code takes away (1 - lambda) of each intruder: 1 removes nothing, 0 all of it.",
)
