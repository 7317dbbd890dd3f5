"""SETOL's trace-log (ERG) condition: how far the start of the power-law tail is from where the leading eigenvalues have product one."""

from torch import Tensor

from ..spectra.tails import tail_of
from ..spectra.volume import trace_log
from ._tails import NO_TAIL, fitted
from .base import Found, OfSpectrum


def _compute(s: Tensor, shape: tuple[int, int]) -> Found:
    tail, volume = tail_of(s), trace_log(s.square())
    if tail is None or volume is None:
        return Found(None, note=NO_TAIL if tail is None else "all singular values are equal: every product is one", valid=False)
    doubt = tail.doubt()
    value = {
        "gap": volume.count - tail.count,
        "count": volume.count,
        "lambda_erg": volume.smallest,
        "delta": tail.xmin - volume.smallest,
    }
    return Found(value, note=f"of the tail: {doubt}" if doubt else "", valid=not doubt, settings={"alpha": tail.alpha, **fitted(tail)})


MEASURE = OfSpectrum(
    name="setol",
    title="SETOL trace-log condition",
    paper="arXiv:2507.17912",
    estimator="count: largest squared singular values, scaled to mean 1, until their product falls below 1; lambda_erg the smallest of them; "
    "gap = count - values in the tail of alpha; delta = its xmin - lambda_erg",
    compute=_compute,
    note="ideal learning is claimed at alpha near 2 with gap and delta near 0; the theory is empirical, the claim not checked here",
    differs="The estimators of WeightWatcher 0.7.7, with sums of logarithms for its products, which overflow. Of the theory nothing else.",
)
