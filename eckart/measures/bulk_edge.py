"""Random-matrix bulk: the noise that explains the middle of the spectrum, its edge, and the singular values beyond it."""

from torch import Tensor

from ..spectra.bulk import LEAST, TRACY_WIDOM, fit
from .base import Found, OfSpectrum


def _compute(s: Tensor, shape: tuple[int, int]) -> Found:
    bulk = fit(s, shape)
    if bulk is None:
        return Found(None, note=f"fewer than {LEAST} values that could be noise, or half of them zero", valid=False)
    doubt = bulk.doubt()
    value = {
        "outliers": bulk.outliers,
        "detached": bulk.detached,
        "edge": bulk.edge,
        "noise": bulk.noise,
        "soft_rank": min(1.0, bulk.edge / float(s[0])) ** 2,
    }
    return Found(
        value, note=doubt, valid=not doubt, settings={"threshold": bulk.threshold, "lower_edge": bulk.lower, "misfit": bulk.misfit}
    )


MEASURE = OfSpectrum(
    name="bulk_edge",
    title="Marchenko-Pastur bulk edge and outliers",
    paper="arXiv:1305.5870",
    estimator="noise from the middle half of the values that are no outliers; outliers above the 99% point of the largest noise value (Tracy-Widom); "
    "detached: above the first gap wider than that margin; soft_rank = edge^2 / max(s)^2",
    compute=_compute,
    settings={"tracy_widom": TRACY_WIDOM},
    note="one or two of a hundred matrices of pure noise show an outlier; a value below the edge may still be signal",
    differs="The paper matches the median of all values, outliers included.",
)
