"""Power-law exponent from the median on (Hill), as AlphaPruning and FARMS score layers."""

from ..spectra.numbers import squares
from ..spectra.tails import FAR, hill
from ._tails import ERROR, found
from .base import OfSpectrum

MEASURE = OfSpectrum(
    name="alpha_hill",
    title="Tail exponent alpha (Hill, from the median)",
    paper="doi:10.1214/aos/1176343247",
    estimator="1 + k / sum(ln(x / xmin)) over the upper half of the squared singular values; error (alpha - 1) / sqrt(k)",
    compute=lambda s, shape: found(hill(squares(s)), FAR),
    note=f"follows the aspect of the matrix (farms does not); {ERROR}",
    differs="The count k of AlphaPruning (arXiv:2410.10912), which includes xmin itself; Hill's is k - 1. Values that are rounding are left out first.",
)
