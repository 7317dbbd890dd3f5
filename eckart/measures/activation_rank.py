"""Effective rank of activations: how many directions the hidden states of each layer use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..spectra.numbers import effective_rank, energy_rank, participation_rank
from ._watch import Side, Watch, layers_of
from .base import Found, OfText, Record

if TYPE_CHECKING:
    from torch import Tensor

    from ..stats.moments import Centred

ROUNDING = 1e-12  # share of the squared length that is left of a constant after its mean is taken off


@dataclass
class Covariances(Watch):
    """Keeps the covariance of every layer: 8 n^2 bytes each, for a transformer about a sixth of its weights in float32."""

    sums: dict[str, Centred] = field(default_factory=dict)

    def wants(self) -> list[tuple[str, Side]]:
        return [(name, "out") for name in (*layers_of(self.view), "")]

    def see(self, module: str, side: Side, x: Tensor, text: Tensor) -> None:
        from ..stats.moments import centred, combine

        part = centred(x)
        if part is not None:
            self.sums[module] = combine(self.sums[module], part) if module in self.sums else part

    def records(self) -> Iterable[Record]:
        from ..progress import track

        for module, _ in track(self.wants(), "ranks of activations"):
            if module in self.lost or module not in self.sums:
                yield MEASURE.missing(module, self.lost.get(module, "no row of text passed it"))
            else:
                yield MEASURE.record(module, _found(self.sums[module]))


def _found(s: Centred) -> Found:
    from ..linalg.product import eigvals_psd

    settings = {"rows": int(s.count), "channels": len(s.mean)}
    spread, size = float(s.scatter.diagonal().sum()), s.count * float(s.mean.square().sum())
    if s.count < 2 or spread <= ROUNDING * size:
        return Found(None, note="a single row" if s.count < 2 else "every row is the same", valid=False, settings=settings)
    values = eigvals_psd(s.scatter).sqrt()
    value = {
        "effective_rank": effective_rank(values),
        "participation_rank": participation_rank(values),
        "rank90": energy_rank(values, 0.9),
        "mean_share": size / (size + spread),
    }
    few = s.count <= len(s.mean)
    return Found(value, note=f"{s.count:.0f} rows span at most {s.count - 1:.0f} directions" if few else "", settings=settings)


MEASURE = OfText(
    name="activation_rank",
    title="Effective rank of activations",
    paper="https://ieeexplore.ieee.org/document/7098875",
    estimator="of the singular values s of the centred rows: exp(-sum p log p) with p = s / sum(s), and (sum s^2)^2 / sum s^4; "
    "rank90 holds 90% of sum s^2; mean_share is the share of the mean in the squared length",
    observer=Covariances,
    note="of the centred activations: the mean, which mean_share measures, is taken off first; grows with the number of rows",
)
