"""Log alpha-norm: log10 of the sum of all squared singular values, each raised to the tail exponent."""

import math

import torch
from torch import Tensor

from ..spectra.numbers import squares
from ..spectra.tails import tail_of
from ._tails import NO_TAIL, fitted
from .base import Found, OfSpectrum


def _compute(s: Tensor, shape: tuple[int, int]) -> Found:
    tail = tail_of(s)
    if tail is None:
        return Found(None, note=NO_TAIL, valid=False)
    doubt = tail.doubt()
    value = float(torch.logsumexp(tail.alpha * squares(s).log(), 0)) / math.log(10)
    return Found(value, note=doubt, valid=not doubt, settings={"alpha": tail.alpha, **fitted(tail)})


MEASURE = OfSpectrum(
    name="alpha_norm",
    title="Log alpha-norm",
    paper="arXiv:2002.06716",
    estimator="log10 sum(s^(2 alpha)), alpha by Clauset's scan",
    compute=_compute,
    note="mostly the largest value: near alpha-hat",
)
