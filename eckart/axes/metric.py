"""Best in what sense: side of W, statistic, power, damping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from .base import NOTHING, Choice
from .protocols import Bundle, Stat, StatsView

if TYPE_CHECKING:
    from torch import Tensor

    from ..linalg.psd import Weight


class _Metric(Choice):
    """Defaults of a metric: it repairs nothing."""

    axis: ClassVar[str] = "metric"

    def repair(self, bundle: Bundle, stats: StatsView) -> Tensor | None:
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

    Args:
        power: 1/2 is the squared error of the output.
        centred: the covariance of the input instead of its second moment.
        keep_mean: correct the bias so that the mean output stays exact; adds a bias where the layer has none.
        clamp: eigenvalues below this share of the largest are raised to it. 0 is right as long as this side is not inverted.
    """

    kind: ClassVar[str] = "input_gram"

    power: float = 0.5
    centred: bool = False
    keep_mean: bool = False
    clamp: float = 0.0

    @property
    def takes(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"bias"}) if self.keep_mean else NOTHING

    @property
    def stat(self) -> Stat:
        return Stat("moments", at="in")

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({self.stat})

    def sides(self, bundle: Bundle, stats: StatsView) -> tuple[None, Weight]:
        from ..linalg.psd import Weight

        moments = stats.get(self.stat, bundle.site)
        matrix = moments.covariance() if self.centred else moments.second()
        return None, Weight(matrix, self.power, self.clamp, f"{bundle.name}: input moments")

    def repair(self, bundle: Bundle, stats: StatsView) -> Tensor | None:
        return stats.get(self.stat, bundle.site).mean if self.keep_mean else None


@dataclass(frozen=True)
class InputScale(_Metric):
    """A weight per input channel: S = diag(statistic^power + floor).

    Args:
        of: "absmean" (mean |x|), "rms" (root mean square of x), or "fisher" (squared weight gradients summed over outputs).
        power: 1/2 for Fisher (FWSVD), 1/2 of the mean for ASVD.
        floor: share of the largest entry of the statistic below which entries are raised to it, so that a dead channel does not vanish.
        offset: added to the statistic's power (ASVD adds 1e-6).
        per: "sample" squares each sample's gradient, "batch" the gradient of a whole batch (Fisher only).
    """

    kind: ClassVar[str] = "input_scale"

    of: Literal["absmean", "rms", "fisher"] = "absmean"
    power: float = 0.5
    floor: float = 0.0
    offset: float = 0.0
    per: Literal["sample", "batch"] = "sample"

    @property
    def stat(self) -> Stat:
        if self.of == "fisher":
            return Stat("fisher", at="weight", via="backward", opts=(f"per_{self.per}",))
        return Stat("absmean", at="in") if self.of == "absmean" else Stat("moments", at="in")

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({self.stat})

    def sides(self, bundle: Bundle, stats: StatsView) -> tuple[None, Weight]:
        from ..linalg.psd import Weight

        found = stats.get(self.stat, bundle.site)
        scale = found.second().diagonal().sqrt() if self.of == "rms" else found
        scale = scale.clamp_min(self.floor * float(scale.max())) ** self.power + self.offset
        return None, Weight(scale, 1.0, 0.0, f"{bundle.name}: {self.of} of the input channels")


@dataclass(frozen=True)
class GradGram(_Metric):
    """Second moment of the gradient at the layer's output: how much the model's loss minds an error in each output direction.

    Args:
        power: 1/2 makes errors count by their first-order effect on the loss, squared.
        probe: what is differentiated: "task_loss", "random_projection" of the embedding, or "auto" (by the kind of model).
        clamp: eigenvalues below this share of the largest are raised to it; needed, because a two-sided metric inverts one side.
    """

    kind: ClassVar[str] = "grad_gram"

    power: float = 0.5
    probe: Literal["auto", "task_loss", "random_projection"] = "auto"
    clamp: float = 1e-4

    @property
    def stat(self) -> Stat:
        return Stat("moments", at="out", via="backward", probe=self.probe)

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({self.stat})

    def sides(self, bundle: Bundle, stats: StatsView) -> tuple[Weight, None]:
        from ..linalg.psd import Weight

        return Weight(stats.get(self.stat, bundle.site).second(), self.power, self.clamp, f"{bundle.name}: output gradients"), None


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
        return self.out.sides(bundle, stats)[0], self.into.sides(bundle, stats)[1]

    def repair(self, bundle: Bundle, stats: StatsView) -> Tensor | None:
        return self.into.repair(bundle, stats)
