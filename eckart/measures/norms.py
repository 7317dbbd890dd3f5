"""Spectral, Frobenius and nuclear norm, and the logarithms that layer-quality papers average."""

import math

from torch import Tensor

from .base import OfSpectrum


def _compute(s: Tensor, shape: tuple[int, int]) -> dict[str, float]:
    spectral, frobenius, nuclear = float(s[0]), math.sqrt(float(s.square().sum())), float(s.sum())
    return {
        "spectral": spectral,
        "frobenius": frobenius,
        "nuclear": nuclear,
        "log_spectral": 2 * math.log10(spectral),
        "log_norm": 2 * math.log10(frobenius),
    }


MEASURE = OfSpectrum(
    name="norms",
    title="Norms",
    paper="doi:10.1007/BF02288367",
    estimator="max(s), sqrt(sum(s^2)), sum(s); log_spectral and log_norm are log10 of max(s)^2 and sum(s^2), WeightWatcher's log_spectral_norm and log_norm",
    compute=_compute,
)
