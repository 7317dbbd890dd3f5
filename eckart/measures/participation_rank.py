"""Participation rank: the number of equal singular values that would spread the energy as widely."""

from ..spectra.numbers import participation_rank
from .base import OfSpectrum

MEASURE = OfSpectrum(
    name="participation_rank",
    title="Participation rank",
    paper="doi:10.1101/214262",
    estimator="sum(s^2)^2 / sum(s^4)",
    compute=lambda s, shape: participation_rank(s),
    note="between stable rank and effective rank: a few large values still decide",
)
