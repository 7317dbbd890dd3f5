"""FARMS: the tail exponent of square windows, which the aspect of the matrix cannot bias."""

from ..spectra.tails import FAR
from ..spectra.windows import POSITIONS, SIDE, farms
from ._tails import found
from .base import Found, OfWeight, WeightView


def _compute(view: WeightView) -> Found:
    result = farms(view.weight)
    base = found(result.tail if result else None, FAR)
    if result is None:
        return base
    shape = f"{result.side} x {result.across}"
    small = "" if result.side == SIDE else f"windows of {shape}: not comparable with those of {SIDE}"
    note = "; ".join(n for n in (small, base.note) if n)
    return Found(base.value, base.uncertainty, note, base.valid, {**base.settings, "window": shape, "windows": result.windows})


MEASURE = OfWeight(
    name="farms",
    title="Tail exponent alpha of fixed windows (FARMS)",
    paper="arXiv:2506.06280",
    estimator="as alpha_hill, on the pooled squared singular values of windows on a grid; error (alpha - 1) / sqrt(k)",
    compute=_compute,
    settings={"side": SIDE, "aspect": 1.0, "positions": POSITIONS},
    note="about 2.1 for pure noise of any shape; values of one matrix repel each other, so that the error is an upper figure",
    fidelity="variant",
    differs=f"Windows of {SIDE} and {POSITIONS} positions a side (the paper's pruning: 2000 and 10 to 15), which already take the bias away and cost less than the spectrum. "
    "Windows shrink with their aspect kept; the released program cuts one side.",
)
