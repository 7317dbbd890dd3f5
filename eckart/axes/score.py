"""The value of each rank, read off a spectrum: what an allocation compares across matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Choice
from .protocols import Bundle, StatsView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PredictedLoss(Choice):
    """Squared singular values of the weighted matrix: how much loss each rank takes away, in the metric's own unit.

    Comparable across matrices when the metric measures the model's loss on both sides; with an input metric alone the unit
    is that of the layer's output, and matrices with large outputs are favoured.
    """

    kind: ClassVar[str] = "predicted_loss"
    axis: ClassVar[str] = "score"
    gives: ClassVar[frozenset[str]] = frozenset({"additive"})

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        return spectrum.square().tolist()


@dataclass(frozen=True)
class Energy(Choice):
    """Share of the matrix's own squared spectrum. Scale-free, hence blind to which matrix matters more."""

    kind: ClassVar[str] = "energy"
    axis: ClassVar[str] = "score"
    gives: ClassVar[frozenset[str]] = frozenset({"additive", "share"})

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        square = spectrum.square()
        total = float(square.sum())
        return (square / total).tolist() if total > 0 else square.tolist()


@dataclass(frozen=True)
class MinMax(Choice):
    """(s - min s) / (max s - min s): WeLore's normalised spectrum. One outlier at either end moves every value."""

    kind: ClassVar[str] = "min_max"
    axis: ClassVar[str] = "score"
    gives: ClassVar[frozenset[str]] = frozenset({"level"})

    def curve(self, bundle: Bundle, spectrum: Tensor, stats: StatsView) -> Sequence[float]:
        low, high = float(spectrum.min()), float(spectrum.max())
        # a flat spectrum has no direction to drop: every value counts as the largest
        return ((spectrum - low) / (high - low)).tolist() if high > low else [1.0] * len(spectrum)
