"""The value of each rank, read off a spectrum: what an allocation compares across matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from ..errors import UsageError
from .base import ScoreChoice
from .budgets import tails_of
from .protocols import Bundle, Stat, StatsView

if TYPE_CHECKING:
    from torch import Tensor

INFLUENCE = Stat("influence", at="block")


@dataclass(frozen=True)
class PredictedLoss(ScoreChoice):
    """Squared singular values of the weighted matrix: how much loss each rank takes away, in the metric's own unit.

    Comparable across matrices when the metric measures the model's loss on both sides; with an input metric alone the unit
    is that of the layer's output, and matrices with large outputs are favoured.
    """

    kind: ClassVar[str] = "predicted_loss"
    gives: ClassVar[frozenset[str]] = frozenset({"additive"})

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        return spectrum.square().tolist()


@dataclass(frozen=True)
class Energy(ScoreChoice):
    """Share of the matrix's own squared spectrum. Scale-free, hence blind to which matrix matters more."""

    kind: ClassVar[str] = "energy"
    gives: ClassVar[frozenset[str]] = frozenset({"additive", "share"})

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        square = spectrum.square()
        total = float(square.sum())
        return (square / total).tolist() if total > 0 else square.tolist()


@dataclass(frozen=True)
class MinMax(ScoreChoice):
    """(s - min s) / (max s - min s): WeLore's normalised spectrum. One outlier at either end moves every value."""

    kind: ClassVar[str] = "min_max"
    gives: ClassVar[frozenset[str]] = frozenset({"level"})

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        low, high = float(spectrum.min()), float(spectrum.max())
        # a flat spectrum has no direction to drop: every value counts as the largest
        return ((spectrum - low) / (high - low)).tolist() if high > low else [1.0] * len(spectrum)


@dataclass(frozen=True)
class Value(ScoreChoice):
    """The values of the factorisation themselves, on one scale for all matrices: for `factor.ordered` the norm of each triple."""

    kind: ClassVar[str] = "value"
    gives: ClassVar[frozenset[str]] = frozenset({"level"})

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        return spectrum.tolist()


@dataclass(frozen=True)
class MeasuredLoss(ScoreChoice):
    """How much the model's loss rises when one matrix alone is cut, measured at a few sizes; between them by the predicted loss.

    Costs an evaluation per matrix and size. The loss is next-token cross-entropy, or without a next token the distance from the original's
    embedding or output; rises are taken to add up over matrices.

    Args:
        grid: shares of a matrix's parameters at which it is measured.
        batches: calibration batches used, the first ones.
    """

    kind: ClassVar[str] = "measured_loss"
    measures: ClassVar[bool] = True
    takes: ClassVar[frozenset[str]] = frozenset({"pair"})
    gives: ClassVar[frozenset[str]] = frozenset({"additive"})

    grid: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    batches: int = 4

    def __post_init__(self) -> None:
        if not self.grid or not all(0 < g < 1 for g in self.grid) or self.batches < 1:
            raise UsageError(f"score.grid: expected shares in (0, 1) and at least one batch, found {self.grid} and {self.batches}.")

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        """The predicted loss, which `measured` turns into the measured one."""
        return spectrum.square().tolist()

    def measured(self, curve: Sequence[float], found: Sequence[tuple[int, float]]) -> list[float]:
        """The value of each rank, so that what is lost is what was measured at the ranks where it was.

        Between two of them the loss goes linearly with the predicted loss; it is nothing at full rank, and never falls as the rank does.

        Args:
            curve: predicted values.
            found: (rank, rise of the loss), rising ranks.
        """
        tails = tails_of(curve)
        points = [(0.0, 0.0)]
        for rank, rise in sorted(found, reverse=True):
            points.append((tails[rank], max(rise, points[-1][1], 0.0)))
        lost = [_between(points, t) for t in tails]
        return [max(0.0, a - b) for a, b in pairwise(lost)]


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between points with rising x, in proportion beyond the last."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y1 if x1 <= x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    last, value = points[-1]
    return value * x / last if last > 0 else value


def influence_of(bundle: Bundle, stats: StatsView) -> float:
    """Mean influence of the blocks that the sites are in; 1, the most there is, outside of all blocks."""
    blocks = {s.block: s for s in bundle.sites if s.block >= 0}
    found = [float(stats.get(INFLUENCE, s)[0]) for s in blocks.values()]
    return sum(found) / len(found) if found else 1.0


@dataclass(frozen=True)
class BlockInfluence(ScoreChoice):
    """One number per matrix: how far its block turns the tokens, 1 - cos(input, output). Blocks of no influence can lose most."""

    kind: ClassVar[str] = "block_influence"
    gives: ClassVar[frozenset[str]] = frozenset({"scalar"})

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({INFLUENCE})

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        return [influence_of(bundle, stats)]


@dataclass(frozen=True)
class InfluenceAndLoss(ScoreChoice):
    """The influence of the block, then the squared spectrum: what `allocate.pool` weighs one against the other."""

    kind: ClassVar[str] = "influence_and_loss"
    gives: ClassVar[frozenset[str]] = frozenset({"influence"})

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({INFLUENCE})

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        return [influence_of(bundle, stats), *spectrum.square().tolist()]


@dataclass(frozen=True)
class TailExponent(ScoreChoice):
    """One number per matrix: exponent of the power law in the tail of its squared spectrum. High is read as little trained: it can lose most.

    Args:
        fit: "hill" from the median on, or "peak", the best start near the peak of the histogram (AlphaPruning's default).
    """

    kind: ClassVar[str] = "tail_exponent"
    gives: ClassVar[frozenset[str]] = frozenset({"scalar"})

    fit: Literal["hill", "peak"] = "peak"

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        from ..spectra.numbers import squares
        from ..spectra.tails import fixed_finger, hill

        values = squares(spectrum)
        found = (hill(values) if self.fit == "hill" else fixed_finger(values)) or hill(values)
        return [found.alpha if found is not None else 2.0]  # a spectrum without a tail: as if well trained
