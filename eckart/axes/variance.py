"""Ranks by explained variance: every layer's triples in one list, the best of them kept (EVA)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import UsageError
from .base import AllocateChoice, ScoreChoice
from .protocols import Budget, Bundle, Cost, Decides, Stat, StatsView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ratio(ScoreChoice):
    """Share of the variance of the layer's input that each principal component explains.

    Args:
        centred: the variance is about the mean.
    """

    kind: ClassVar[str] = "variance_ratio"
    gives: ClassVar[frozenset[str]] = frozenset({"share"})

    centred: bool = True

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({Stat("moments", at="in")})

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        found = stats.get(Stat("moments", at="in"), bundle.sites[0])
        total = float((found.covariance() if self.centred else found.second()).diagonal().sum())
        return (spectrum / total).tolist() if total > 0 else [0.0] * len(spectrum)


@dataclass(frozen=True)
class GlobalTop(AllocateChoice):
    """The budget's best values over all matrices; a matrix gets as many triples as it has values among them, none at all if it has none.

    Args:
        cap: no matrix gets more than this multiple of the mean rank.
    """

    kind: ClassVar[str] = "global_top"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"share"})

    cap: float = 2.0

    def most(self, budget: Budget, count: int, full: int) -> int:
        """Largest rank that a matrix can get: how many values its curve must have."""
        return min(full, max(1, round(self.cap * self._total(budget, count) / count)))

    def _total(self, budget: Budget, count: int) -> int:
        if budget.kind not in ("rank", "total_rank") or (budget.kind == "rank" and budget.value < 1):
            raise UsageError(
                f"allocate.global_top takes budget.total_rank (a float is the mean per matrix), found {budget.kind}={budget.value}."
            )
        if budget.kind == "rank" or isinstance(budget.value, float):
            return math.floor(budget.value * count + 1e-9)
        return int(budget.value)

    def __call__(self, curves: Mapping[str, Sequence[float]], costs: Mapping[str, Cost], budget: Budget) -> dict[str, int | None]:
        total = self._total(budget, len(costs))
        places = {name: i for i, name in enumerate(costs)}
        ranked = sorted(
            ((v, name, i) for name in costs for i, v in enumerate(curves[name][: self.most(budget, len(costs), costs[name].full)])),
            key=lambda t: (-t[0], t[2], places[t[1]]),
        )
        out: dict[str, int | None] = dict.fromkeys(costs, 0)
        for _, name, _ in ranked[:total]:
            out[name] = (out[name] or 0) + 1
        return out
