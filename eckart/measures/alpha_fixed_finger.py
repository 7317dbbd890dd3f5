"""Power-law exponent from the peak of the histogram on: isolated large values cannot steer it. AlphaPruning's default."""

from ..spectra.numbers import squares
from ..spectra.tails import FAR, fixed_finger
from ._tails import ERROR, found
from .base import OfSpectrum

BINS = 100

MEASURE = OfSpectrum(
    name="alpha_fixed_finger",
    title="Tail exponent alpha (fixed finger)",
    paper="arXiv:2410.10912",
    estimator="as alpha, with xmin between 0.95 and 1.5 times the peak of the histogram of log10 of the squared singular values",
    compute=lambda s, shape: found(fixed_finger(squares(s), bins=BINS), FAR),
    settings={"bins": BINS},
    note=f"moves with the bins of the histogram; {ERROR}",
    fidelity="variant",
    differs="The lower bound is a value, as intended. WeightWatcher and AlphaPruning compare its log10 with the values, so that it hardly binds: "
    '`eckart.spectra.tails.fixed_finger(..., bound="log10")` reproduces that.',
)
