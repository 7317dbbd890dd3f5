"""Power-law exponent of the tail, by Clauset's scan: the tail starts where its distribution is nearest to a power law."""

from ..spectra.tails import tail_of
from ._tails import ERROR, found
from .base import OfSpectrum

MEASURE = OfSpectrum(
    name="alpha",
    title="Tail exponent alpha (Clauset)",
    paper="arXiv:0706.1062",
    estimator="maximum likelihood on squared singular values from the xmin with the smallest Kolmogorov-Smirnov distance; error (alpha - 1) / sqrt(tail)",
    compute=lambda s, shape: found(tail_of(s)),
    note=f"{ERROR}: two errors cover the true exponent in 91% of samples, not 95%",
    differs="As in the authors' program plfit, and as WeightWatcher 0.7.7 by default, to which it is equal on spectra of 20 values and more above 1e-5. "
    '`eckart.spectra.tails.clauset(..., convention="weightwatcher")` reproduces its absolute threshold of 1e-5 and its small-sample branch.',
)
