"""Stable rank: squared Frobenius norm over squared spectral norm."""

from ..spectra.numbers import stable_rank
from .base import OfSpectrum

MEASURE = OfSpectrum(
    name="stable_rank",
    title="Stable rank",
    paper="doi:10.1145/1255443.1255449",
    estimator="sum(s^2) / max(s)^2",
    compute=lambda s, shape: stable_rank(s),
    note="follows the largest value alone: one outlier makes it small whatever the rest does",
)
