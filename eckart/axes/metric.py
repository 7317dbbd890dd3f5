"""Best in what sense: side of W, statistic, power, damping.

Sites that are solved together have one common side (`Bundle.shares`): there the metric comes from the mean of their statistics, so that its
unit stays that of one layer. On the other side they are stacked, and the metric is block diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from .base import NOTHING, Choice
from .protocols import Bundle, Side, Site, Stat, StatsView

if TYPE_CHECKING:
    from torch import Tensor

    from ..linalg.psd import Weight

Inputs = Literal["original", "propagated"]


def joined(bundle: Bundle, side: Side, each: Callable[[Site], Tensor]) -> Tensor | tuple[Tensor, ...]:
    """A statistic of the sites on one side: their mean where that side is common, else one block for each."""
    found = [each(s) for s in bundle.sites]
    if len(found) == 1:
        return found[0]
    if bundle.shares != side:
        return tuple(found)
    if all(f is found[0] for f in found) or (side == "in" and len({s.reads for s in bundle.sites}) == 1):
        return found[0]  # one input, measured once
    return sum(found[1:], found[0]) / len(found)


class _Metric(Choice):
    """Defaults of a metric: it repairs nothing."""

    axis: ClassVar[str] = "metric"

    def repair(self, bundle: Bundle, stats: StatsView) -> tuple[Tensor, ...] | None:
        return None


@dataclass(frozen=True)
class Identity(_Metric):
    """Frobenius norm of the weight. Needs no data."""

    kind: ClassVar[str] = "identity"

    def sides(self, bundle: Bundle, stats: StatsView) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True)
class InputGram(_Metric):
    """Error of the layer's output on the calibration inputs: S = G^power, G the second moment of the input.

    The input of an embedding is a one-hot vector: its moments are the frequencies of the rows, and nothing of size (rows, rows) is formed.

    Args:
        power: 1/2 is the squared error of the output.
        centred: the covariance of the input instead of its second moment.
        keep_mean: correct the bias so that the mean output stays exact; adds a bias where the layer has none.
        clamp: eigenvalues below this share of the largest are raised to it. 0 is right as long as this side is not inverted.
        inputs: of the original model, or "propagated" through what was already compressed.
        ridge: this multiple of the mean diagonal entry is added to the diagonal, so that directions without data still count (not for embeddings).
    """

    kind: ClassVar[str] = "input_gram"

    power: float = 0.5
    centred: bool = False
    keep_mean: bool = False
    clamp: float = 0.0
    inputs: Inputs = "original"
    ridge: float = 0.0

    @property
    def takes(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"bias"}) if self.keep_mean else NOTHING

    @property
    def stat(self) -> Stat:
        return Stat("moments", at="in", inputs=self.inputs)

    @property
    def frequency(self) -> Stat:
        return Stat("frequency", at="in")

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({self.stat, self.frequency})

    def sides(self, bundle: Bundle, stats: StatsView) -> tuple[None, Weight]:
        from ..linalg.psd import Weight

        if bundle.sites[0].kind == "embedding":
            return None, self._one_hot(bundle, stats)

        def moments(site: Site) -> Tensor:
            found = stats.get(self.stat, site)
            matrix = found.covariance() if self.centred else found.second()
            if self.ridge:
                matrix = matrix.clone()
                matrix.diagonal().add_(self.ridge * matrix.diagonal().mean())
            return matrix

        return None, Weight(joined(bundle, "in", moments), self.power, self.clamp, f"{bundle.name}: input moments")

    def _one_hot(self, bundle: Bundle, stats: StatsView) -> Weight:
        from ..errors import UsageError
        from ..linalg.psd import Weight

        if self.centred and self.power != 0.5:
            raise UsageError(f"metric.power: the covariance of an embedding's rows is known at 1/2 only, found {self.power:g}.")
        frequency = stats.get(self.frequency, bundle.site)
        return Weight(frequency, self.power, self.clamp, f"{bundle.name}: row frequencies", one_hot=self.centred)

    def repair(self, bundle: Bundle, stats: StatsView) -> tuple[Tensor, ...] | None:
        if not self.keep_mean:
            return None
        if bundle.sites[0].kind == "embedding":
            return tuple(stats.get(self.frequency, s) for s in bundle.sites)
        return tuple(stats.get(self.stat, s).mean for s in bundle.sites)


@dataclass(frozen=True)
class InputScale(_Metric):
    """A weight per input channel: S = diag(statistic^power + offset).

    Args:
        of: "absmean" (mean |x|), "rms" (root mean square of x), or "fisher" (squared weight gradients summed over outputs).
        power: 1/2 for Fisher (FWSVD), 1/2 of the mean for ASVD.
        floor: share of the largest entry of the statistic below which entries are raised to it, so that a dead channel does not vanish.
        offset: added to the statistic's power (ASVD adds 1e-6).
        per: "sample" squares each sample's gradient, "batch" the gradient of a whole batch (Fisher only).
        inputs: of the original model, or "propagated" through what was already compressed (not Fisher).
    """

    kind: ClassVar[str] = "input_scale"

    of: Literal["absmean", "rms", "fisher"] = "absmean"
    power: float = 0.5
    floor: float = 0.0
    offset: float = 0.0
    per: Literal["sample", "batch"] = "sample"
    inputs: Inputs = "original"

    @property
    def stat(self) -> Stat:
        if self.of == "fisher":
            return Stat("fisher", at="weight", via="backward", opts=(f"per_{self.per}",))
        return Stat("absmean" if self.of == "absmean" else "moments", at="in", inputs=self.inputs)

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({self.stat})

    def sides(self, bundle: Bundle, stats: StatsView) -> tuple[None, Weight]:
        from ..linalg.psd import Weight

        def scale(site: Site) -> Tensor:
            found = stats.get(self.stat, site)
            return found.second().diagonal().sqrt() if self.of == "rms" else found

        return None, Weight(_entries(joined(bundle, "in", scale), self), 1.0, 0.0, f"{bundle.name}: {self.of} of the input channels")


def _entries(found: Tensor | tuple[Tensor, ...], how: InputScale) -> Tensor | tuple[Tensor, ...]:
    if isinstance(found, tuple):
        return tuple(f.clamp_min(how.floor * float(f.max())) ** how.power + how.offset for f in found)
    return found.clamp_min(how.floor * float(found.max())) ** how.power + how.offset


@dataclass(frozen=True)
class GradGram(_Metric):
    """Second moment of the gradient at the layer's output: how much the model's loss minds an error in each output direction.

    Args:
        power: 1/2 makes errors count by their first-order effect on the loss, squared.
        probe: what is differentiated: "task_loss", "random_projection" of the embedding, or "auto" (by the kind of model).
        clamp: eigenvalues below this share of the largest are raised to it; needed, because a two-sided metric inverts one side.
        diagonal: each output channel by itself: no products between channels.
    """

    kind: ClassVar[str] = "grad_gram"

    power: float = 0.5
    probe: Literal["auto", "task_loss", "random_projection"] = "auto"
    clamp: float = 1e-4
    diagonal: bool = False

    @property
    def stat(self) -> Stat:
        return Stat("moments", at="out", via="backward", probe=self.probe)

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({self.stat})

    def sides(self, bundle: Bundle, stats: StatsView) -> tuple[Weight, None]:
        from ..linalg.psd import Weight

        def moments(site: Site) -> Tensor:
            found = stats.get(self.stat, site).second()
            return found.diagonal() if self.diagonal else found

        return Weight(joined(bundle, "out", moments), self.power, self.clamp, f"{bundle.name}: output gradients"), None


@dataclass(frozen=True)
class Both(_Metric):
    """A metric on the input side and one on the output side: ‖So (W - W') Si‖.

    Args:
        into: metric of the in side.
        out: metric of the out side.
    """

    kind: ClassVar[str] = "both"

    into: InputGram | InputScale | Identity = field(default_factory=InputGram)
    out: GradGram | Identity = field(default_factory=GradGram)

    @property
    def takes(self) -> frozenset[str]:  # type: ignore[override]
        return self.into.takes | self.out.takes

    @property
    def needs(self) -> frozenset[Stat]:
        return self.into.needs | self.out.needs

    def sides(self, bundle: Bundle, stats: StatsView) -> tuple[Weight | None, Weight | None]:
        out = self.out.sides(bundle, stats)[0]
        return None if out is None else replace(out, option="metric.out.clamp"), self.into.sides(bundle, stats)[1]

    def repair(self, bundle: Bundle, stats: StatsView) -> tuple[Tensor, ...] | None:
        return self.into.repair(bundle, stats)


@dataclass(frozen=True)
class WeightGrads(_Metric):
    """Both sides from the gradient G of the weight, a sample at a time: So^2 = E[G G^T], Si^2 = E[G^T G] / tr E[G^T G] at power 1/2.

    The product of the two is the Kronecker approximation of the Fisher matrix that Shampoo uses. Unlike the input's and the output gradient's
    own moments (`Both`) it weighs inputs by the gradients that they meet, and counts the tokens of a sample together, as they meet in its loss.

    Args:
        power: 1/2 makes errors count by their first-order effect on the loss, squared.
        probe: what is differentiated: "task_loss", "random_projection" of the embedding, or "auto" (by the kind of model).
        clamp: eigenvalues below this share of the largest are raised to it, on either side.
    """

    kind: ClassVar[str] = "weight_grads"

    power: float = 0.5
    probe: Literal["auto", "task_loss", "random_projection"] = "auto"
    clamp: float = 1e-4

    def stat(self, side: Side) -> Stat:
        return Stat("gradient_gram", at="weight", via="backward", probe=self.probe, opts=(side,))

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({self.stat("in"), self.stat("out")})

    def sides(self, bundle: Bundle, stats: StatsView) -> tuple[Weight, Weight]:
        from ..linalg.psd import Weight

        shared = bundle.shares or "in"
        found = {side: [_square(stats.get(self.stat(side), s)) for s in bundle.sites] for side in ("in", "out")}
        common = sum(found[shared][1:], found[shared][0]) / len(bundle.sites)
        unit = float(common.trace()) or 1.0  # either side alone is in the unit of the loss; the product of both is to be in it once
        sides: dict[str, Tensor | tuple[Tensor, ...]] = {k: tuple(v) if len(v) > 1 else v[0] for k, v in found.items()}
        sides[shared] = common / unit
        return (
            Weight(sides["out"], self.power, self.clamp, f"{bundle.name}: rows of the gradient"),
            Weight(sides["in"], self.power, self.clamp, f"{bundle.name}: columns of the gradient"),
        )


def _square(entries: Tensor) -> Tensor:
    """The matrix of which these are the entries, row by row."""
    size = math.isqrt(len(entries))
    return entries.reshape(size, size)
