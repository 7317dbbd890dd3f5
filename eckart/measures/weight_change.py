"""The spectrum of the change of a weight: how many directions fine-tuning moved, and how far."""

from __future__ import annotations

from .base import Found, OfPair, PairView

SHARE = 0.9
MARGIN = 2.0  # times the edge of one rounding: an update is often rounded before it is added, and again when it is stored


def compute(view: PairView) -> Found:
    """Ranks and norms of W' - W; none when nothing changed."""
    from ..linalg import svdvals
    from ..spectra.numbers import effective_rank, energy_rank, numerical_rank, stable_rank, thin
    from ..spectra.rounding import rounding_edge

    before, after = view.base.weight, view.other.weight
    change = after.double() - before.double()
    if not bool(change.any()):
        return Found(None, valid=False, note="the weight did not change")
    s = svdvals(change).double()
    edge = rounding_edge(after)
    above = min(int((s > MARGIN * edge).sum()), numerical_rank(s, view.site.shape, 2.0**-52))
    value = {
        "effective_rank": effective_rank(s),
        "stable_rank": stable_rank(s),
        "energy_rank": energy_rank(s, SHARE),
        "above_rounding": above,
        "spectral_norm": float(s[0]),
        "frobenius_norm": float(s.square().sum().sqrt()),
        **thin(s),
    }
    note = "" if above else "the whole change is as small as the rounding of its storage type: the ranks are those of noise"
    return Found(value, note=note, settings={"rounding_edge": edge, "stored_as": str(after.dtype).removeprefix("torch.")})


MEASURE = OfPair(
    name="weight_change",
    title="Spectrum of the weight change",
    paper="arXiv:2410.21228",
    estimator="all singular values of W' - W in float64; above_rounding counts those beyond twice the edge that rounding alone would make",
    compute=compute,
    settings={"share": SHARE, "margin": MARGIN},
    note="a low-rank update that was merged into half precision has full rank by its rounding: read above_rounding, not the numerical rank",
    fidelity="idea",
    differs="the paper compares singular vectors; ranks of the difference are the usual companion, and the rounding edge is ours",
)
