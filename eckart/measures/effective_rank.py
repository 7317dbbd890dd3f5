"""Effective rank: the exponential of the entropy of the normalised singular values."""

from ..spectra.numbers import effective_rank
from .base import OfSpectrum

MEASURE = OfSpectrum(
    name="effective_rank",
    title="Effective rank",
    paper="https://ieeexplore.ieee.org/document/7098875",
    estimator="exp(-sum p log p), p = s / sum(s)",
    compute=lambda s, shape: effective_rank(s),
    note="on singular values, as Roy and Vetterli define it; other tools use their squares and get smaller numbers",
)
