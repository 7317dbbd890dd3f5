"""Compressibility: Frobenius error of the best low-rank weight with 80, 60 and 40 percent of the parameters."""

import math

from torch import Tensor

from ..spectra.numbers import relative_error
from .base import Found, OfSpectrum

KEEP = (0.8, 0.6, 0.4)


def _compute(s: Tensor, shape: tuple[int, int]) -> Found:
    m, n = shape
    ranks = [math.floor(keep * m * n / (m + n) + 1e-9) for keep in KEEP]
    if ranks[0] == 0:
        return Found(None, note=f"no pair of factors of a {m} x {n} matrix is smaller than the matrix", valid=False)
    return Found([relative_error(s, r) if r else None for r in ranks], settings={"ranks": ranks})


MEASURE = OfSpectrum(
    name="compressibility",
    title="Compressibility",
    paper="doi:10.1007/BF02288367",
    estimator="sqrt(sum of s^2 beyond rank r / sum of s^2), r = floor(keep m n / (m + n)): two factors that store that share",
    compute=_compute,
    settings={"keep": KEEP},
    note="error of the weight, not of the model: inputs decide what a cut costs",
)
