"""Alpha-hat: the tail exponent weighted by the size of the matrix, alpha log10(lambda_max)."""

import math

from torch import Tensor

from ..spectra.tails import tail_of
from ._tails import NO_TAIL, fitted
from .base import Found, OfSpectrum


def _compute(s: Tensor, shape: tuple[int, int]) -> Found:
    tail = tail_of(s)
    if tail is None:
        return Found(None, note=NO_TAIL, valid=False)
    size, doubt = 2 * math.log10(float(s[0])), tail.doubt()
    return Found(tail.alpha * size, tail.error * abs(size), doubt, not doubt, {"alpha": tail.alpha, **fitted(tail)})


MEASURE = OfSpectrum(
    name="alpha_hat",
    title="Alpha-hat (weighted alpha)",
    paper="arXiv:2002.06716",
    estimator="alpha log10(max(s)^2), alpha by Clauset's scan",
    compute=_compute,
    note="changes with the scale of the weights, and its sign where max(s) passes 1: compare within a family of models only",
)
