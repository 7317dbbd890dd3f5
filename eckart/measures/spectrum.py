"""The singular values themselves, on at most 64 logarithmically spaced ranks."""

from ..spectra.numbers import POINTS, thin
from .base import OfSpectrum

MEASURE = OfSpectrum(
    name="spectrum",
    title="Singular values",
    paper="doi:10.1007/BF02288367",
    estimator="all singular values in float64 or float32 by the cost model; thinned for storage",
    compute=lambda s, shape: thin(s),
    settings={"points": POINTS},
)
