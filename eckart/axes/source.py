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


@dataclass(frozen=True)
class Gradient(Choice):
    """A step of full fine-tuning from where the model stands: minus the loss's gradient by the weight, or minus its sign, which is Adam's first step.

    The gradient is the mean over calibration samples, of next-token cross-entropy or of the loss that is given; m x n float64 numbers per layer.

    Args:
        step: what it is multiplied by, a learning rate.
        sign: the sign instead of the gradient.
    """

    kind: ClassVar[str] = "gradient"
    axis: ClassVar[str] = "source"

    step: float = 1e-4
    sign: bool = True

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({Stat("gradient", at="weight", via="backward", probe="task_loss")})

    def operator(self, bundle: Bundle, read: Read, stats: StatsView) -> Tensor:
        (need,) = self.needs
        found: Tensor = stats.get(need, bundle.site).reshape(bundle.site.shape)
        return -self.step * (found.sign() if self.sign else found).float()


@dataclass(frozen=True)
class Encoded(Choice):
    """What a model makes of calibration phrases: its last hidden states, as rows of the width of its embeddings; see `verbs.encoded`."""

    kind: ClassVar[str] = "encoded"
    axis: ClassVar[str] = "source"
    gives: ClassVar[frozenset[str]] = frozenset({"rows"})

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({Stat("encoded", at="out", via="prompt")})

    def operator(self, bundle: Bundle, read: Read, stats: StatsView) -> Tensor:
        (need,) = self.needs
        return stats.get(need, bundle.site).float()
