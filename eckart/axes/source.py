"""Which matrix is factorised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Choice
from .protocols import Bundle, Read, Stat, StatsView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Weights(Choice):
    """The weight itself, (out, in); those of a bundle stacked along the side that is not common."""

    kind: ClassVar[str] = "weights"
    axis: ClassVar[str] = "source"

    def operator(self, bundle: Bundle, read: Read, stats: StatsView) -> Tensor:
        import torch

        if bundle.shares is None:
            return read(bundle.site)
        return torch.cat([read(s) for s in bundle.sites], dim=0 if bundle.shares == "in" else 1)


@dataclass(frozen=True)
class Zero(Choice):
    """Nothing: the branch is drawn, not made of a matrix."""

    kind: ClassVar[str] = "zero"
    axis: ClassVar[str] = "source"

    def operator(self, bundle: Bundle, read: Read, stats: StatsView) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Moments(Choice):
    """The covariance of the layer's input, whose singular vectors are the principal components; the weight is not looked at.

    Args:
        centred: about the mean; else the second moment.
    """

    kind: ClassVar[str] = "moments"
    axis: ClassVar[str] = "source"

    centred: bool = True

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({Stat("moments", at="in")})

    def operator(self, bundle: Bundle, read: Read, stats: StatsView) -> Tensor:
        found = stats.get(Stat("moments", at="in"), bundle.sites[0])
        # leading components only, of sums that were exact: float32 halves the time and keeps six digits of them
        return (found.covariance() if self.centred else found.second()).float()
