"""Principal angles between the leading singular subspaces of a weight before and after."""

from __future__ import annotations

import math

from .base import Found, OfPair, PairView

ENERGY = 0.9  # share of the base weight's squared norm that its leading subspace holds
MOST = 64  # largest subspace


def compute(view: PairView) -> Found:
    """Angles on both sides, of the subspace that holds `ENERGY` of the base weight."""
    from ..spectra.numbers import energy_rank
    from ..spectra.subspaces import overlap, principal_angles

    zero = [name for name, one in (("base", view.base), ("other", view.other)) if not bool(one.weight.any())]
    if zero:
        return Found(None, valid=False, note=f"the {zero[0]} weight is zero: it has no singular vectors")
    base, other = view.base.factors, view.other.factors
    rank = min(energy_rank(base.S, ENERGY), MOST)
    value: dict[str, float | list[float]] = {}
    angles: dict[str, list[float]] = {}
    for side, U, V in (("out", base.U, other.U), ("in", base.Vh.T, other.Vh.T)):
        found = principal_angles(U[:, :rank], V[:, :rank]) * (180 / math.pi)
        value |= {
            f"{side}_largest": float(found[-1]),
            f"{side}_mean": float(found.mean()),
            f"{side}_overlap": overlap(U[:, :rank], V[:, :rank]),
        }
        angles[f"{side}_angles"] = found.tolist()
    clear = [not_clear for f in (base, other) if (not_clear := _gap(f.S.tolist(), rank)) < 0.01]
    note = f"singular value {rank + 1} is within 1% of singular value {rank}: the subspace itself is hardly defined" if clear else ""
    m, n = view.site.shape
    random = {"overlap_of_random_subspaces": [rank / m, rank / n]}
    return Found({**value, **angles}, note=note, settings={"rank": rank, **random})


def _gap(s: list[float], rank: int) -> float:
    """Relative distance of the first singular value that is left out; 1 when none is."""
    return 1.0 if rank >= len(s) or s[rank - 1] == 0 else 1 - s[rank] / s[rank - 1]


MEASURE = OfPair(
    name="principal_angles",
    title="Principal angles between leading singular subspaces",
    paper="doi:10.1090/S0025-5718-1973-0348991-3",
    estimator="angles between the spans of the leading singular vectors, small ones from their sines",
    compute=compute,
    settings={"energy": ENERGY, "most": MOST},
    unit="degrees",
    note="of the subspaces as wholes; the overlap is the mean squared cosine",
)
