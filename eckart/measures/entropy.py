"""Spectral entropy: how evenly the energy spreads over the singular values, 0 for rank one, 1 for all equal."""

import math

from torch import Tensor

from ..spectra.numbers import entropy
from .base import Found, OfSpectrum


def _compute(s: Tensor, shape: tuple[int, int]) -> Found:
    if len(s) == 1:
        return Found(None, note="one singular value has no entropy", valid=False)
    nats = entropy(s)
    return Found(nats / math.log(len(s)), settings={"nats": nats})


MEASURE = OfSpectrum(
    name="entropy",
    title="Spectral entropy",
    paper="doi:10.1073/pnas.97.18.10101",
    estimator="-sum p log p / log min(m, n), p = s^2 / sum(s^2)",
    compute=_compute,
    settings={"of": "squared singular values", "base": "e, divided by log min(m, n)"},
    note="effective rank takes the entropy of the singular values themselves; WeightWatcher divides by the log of the numerical rank",
)
