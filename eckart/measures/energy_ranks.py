"""Energy ranks: how many singular values hold 50%, 90% and 99% of the squared Frobenius norm."""

from ..spectra.numbers import energy_rank
from .base import OfSpectrum

SHARES = (0.5, 0.9, 0.99)

MEASURE = OfSpectrum(
    name="energy_ranks",
    title="Energy ranks at 50%, 90% and 99%",
    paper="doi:10.1007/BF02288367",
    estimator="smallest r with sum of the r largest s^2 at least the share of all",
    compute=lambda s, shape: [energy_rank(s, share) for share in SHARES],
    settings={"shares": SHARES},
    note="of the weight, not of its effect on data: a model may survive a cut far below, or break far above",
)
