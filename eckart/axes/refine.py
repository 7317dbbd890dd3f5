"""After the cut: what is fitted again to data with the rest held fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import UsageError
from .base import RefineChoice
from .metric import Inputs
from .protocols import Bundle, Parts, Site, Stat, StatsView

if TYPE_CHECKING:
    from torch import Tensor

    from ..stats import Moments

STEPS = 200  # of conjugate gradients for a shared `down`; each lowers the loss
ENOUGH = 1e-10  # relative residual at which they stop


@dataclass(frozen=True)
class LeastSquares(RefineChoice):
    """Fit factors again so that E‖(W - up down) x - b‖² is least on the given inputs; exact, and never worse than before.

    The target is what the original matrix makes of these inputs. On the inputs of the metric itself a pair is optimal already; what is left to
    gain is on inputs that passed what was already compressed, on the own inputs of matrices that share a basis, and after a metric with two sides.

    Args:
        update: "up" and "down" in the order in which they are fitted; for a shared basis the common one is fitted to all its matrices together.
        bias: correct the bias along with `up`, so that the mean of the output is exact: "existing" where a layer has one, "add" also where it
            has none, "never".
        inputs: "original", or "propagated" through what was already compressed.
        rounds: how often `update` is gone through.
    """

    kind: ClassVar[str] = "least_squares"
    refits: ClassVar[bool] = True

    update: tuple[Literal["up", "down"], ...] = ("up",)
    bias: Literal["existing", "add", "never"] = "existing"
    inputs: Inputs = "original"
    rounds: int = 1

    def __post_init__(self) -> None:
        if not self.update or self.rounds < 1:
            raise UsageError(f"refine: expected something to update and at least one round, found {self.update!r} and {self.rounds}.")

    @property
    def takes(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"pair", "bias"}) if self.bias == "add" else frozenset({"pair"})

    @property
    def stat(self) -> Stat:
        return Stat("moments", at="in", inputs=self.inputs)

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({self.stat})

    def refit(
        self, kept: Parts, op: Tensor, bundle: Bundle, read_bias: Callable[[str], Tensor], stats: StatsView
    ) -> tuple[Parts, Mapping[str, Any]]:  # fmt: skip
        """The parts fitted again, and the loss before and after.

        Args:
            kept: what the cut left.
            op: the stacked matrix.
            bundle: its sites.
            read_bias: key -> tensor.
            stats: moments of the inputs.
        """
        if bundle.sites[0].kind != "linear":
            return kept, {}
        problem = _Problem.of(self, kept, op, bundle, read_bias, stats)
        before = least = problem.loss()
        for _ in range(self.rounds):
            for factor in self.update:
                better = problem.fit_up() if factor == "up" else problem.fit_down()
                found = better.loss()
                if found <= least:  # rounding must not undo an optimum
                    problem, least = better, found
        return problem.parts(kept), {"loss_before": before, "loss": least, "inputs": self.inputs}


@dataclass(frozen=True)
class _Problem:
    """Sites with their factors, moments and biases, in float64. `up` has one entry when it is shared, and so has `down`.

    Args:
        weights: W of each site.
        up, down: factors.
        moments: of each site's input.
        biases: what is added to up (down x) of each site, None where there is no bias; old ones in `before`.
    """

    weights: tuple[Tensor, ...]
    up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    moments: tuple[Moments, ...]
    before: tuple[Tensor | None, ...]
    biases: tuple[Tensor | None, ...]
    free: tuple[bool, ...]

    @classmethod
    def of(
        cls, how: LeastSquares, kept: Parts, op: Tensor, bundle: Bundle, read_bias: Callable[[str], Tensor], stats: StatsView
    ) -> _Problem:
        import torch

        left, right, work = (t.to(torch.float64) for t in (kept.left, kept.right, op))
        sizes = [s.shape[0 if bundle.shares != "out" else 1] for s in bundle.sites]
        up = (left,) if bundle.shares == "out" else tuple(left.split(sizes))
        down = tuple(right.split(sizes, dim=1)) if bundle.shares == "out" else (right,)
        weights = tuple(work.split(sizes, dim=1 if bundle.shares == "out" else 0))

        def old(site: Site, width: int) -> Tensor | None:
            if site.bias:
                return read_bias(site.bias).to(torch.float64)
            return torch.zeros(width, dtype=torch.float64) if how.bias == "add" else None

        before = tuple(old(s, s.shape[0]) for s in bundle.sites)
        given = kept.bias or (None,) * len(before)
        now = tuple(b if g is None else g.to(torch.float64) for g, b in zip(given, before, strict=True))
        before = tuple(torch.zeros_like(n) if b is None and n is not None else b for b, n in zip(before, now, strict=True))
        moments = tuple(stats.get(how.stat, s) for s in bundle.sites)
        return cls(weights, up, down, moments, before, now, tuple(n is not None and how.bias != "never" for n in now))

    def _at(self, factors: tuple[Tensor, ...], i: int) -> Tensor:
        return factors[i if len(factors) > 1 else 0]

    def _grams(self) -> tuple[Tensor, ...]:
        """What errors count by: the covariance where a free bias takes the mean, else the second moment."""
        return tuple(m.covariance() if f else m.second() for m, f in zip(self.moments, self.free, strict=True))

    def loss(self) -> float:
        """Mean squared error of the outputs, summed over the sites."""
        total = 0.0
        for i, (weight, moments) in enumerate(zip(self.weights, self.moments, strict=True)):
            gap = weight - self._at(self.up, i) @ self._at(self.down, i)
            total += float((gap @ moments.second()).mul(gap).sum())
            old, new = self.before[i], self.biases[i]
            if old is not None and new is not None:
                total += float((old - new).square().sum() + 2 * (old - new) @ (gap @ moments.mean))
        return total

    def _centred(self) -> _Problem:
        """With the biases that are best for these factors."""
        biases = list(self.biases)
        for i, free in enumerate(self.free):
            old = self.before[i]
            if free and old is not None:
                biases[i] = old + (self.weights[i] - self._at(self.up, i) @ self._at(self.down, i)) @ self.moments[i].mean
        return replace(self, biases=tuple(biases))

    def fit_up(self) -> _Problem:
        """W G down^T (down G down^T)^+; a shared one over the sums of both."""
        from ..linalg.columns import solve_psd

        right, inner = [], []
        for i, (weight, gram) in enumerate(zip(self.weights, self._grams(), strict=True)):
            down = self._at(self.down, i)
            beside = gram @ down.T
            lead = weight @ beside
            if not self.free[i] and self.biases[i] is not None:  # a fixed change of the bias is part of what is fitted
                old, new = self.before[i], self.biases[i]
                assert old is not None
                assert new is not None
                lead = lead + (old - new)[:, None] * (down @ self.moments[i].mean)
            right.append(lead)
            inner.append(down @ beside)
        if len(self.up) == 1 and len(self.weights) > 1:
            right, inner = [sum(right[1:], right[0])], [sum(inner[1:], inner[0])]
        up = tuple(solve_psd(a, b.T, "refit").T for a, b in zip(inner, right, strict=True))
        return replace(self, up=up)._centred()

    def fit_down(self) -> _Problem:
        """(up^T up)^+ up^T W for a `down` of its own; a shared one by conjugate gradients on sum up_i^T up_i down G_i."""
        from ..linalg.columns import solve_psd

        grams = self._grams()
        if len(self.down) > 1 or len(self.weights) == 1:
            down = []
            for i, weight in enumerate(self.weights):
                up = self._at(self.up, i)
                down.append(solve_psd(up.T @ up, up.T @ weight, "refit"))
            return replace(self, down=tuple(down))._centred()
        squares = [up.T @ up for up in self.up]
        terms = [up.T @ weight @ gram for up, weight, gram in zip(self.up, self.weights, grams, strict=True)]

        def product(x: Tensor) -> Tensor:
            out = [s @ x @ g for s, g in zip(squares, grams, strict=True)]
            return sum(out[1:], out[0])

        return replace(self, down=tuple(_conjugate(product, sum(terms[1:], terms[0]), d) for d in self.down))._centred()

    def parts(self, kept: Parts) -> Parts:
        """Back in stacked form."""
        import torch

        left, right = torch.cat(self.up), torch.cat(self.down, dim=1)
        return replace(kept, left=left, right=right, bias=self.biases if any(b is not None for b in self.biases) else kept.bias)


def _conjugate(product: Callable[[Tensor], Tensor], right: Tensor, start: Tensor) -> Tensor:
    """A X = B for a positive semidefinite map A by conjugate gradients; the quadratic falls at every step."""
    x, rest = start, right - product(start)
    direction, energy = rest, float(rest.square().sum())
    goal = ENOUGH**2 * float(right.square().sum())
    for _ in range(STEPS):
        if energy <= goal:
            break
        image = product(direction)
        curve = float((direction * image).sum())
        if curve <= 0:
            break
        x = x + direction * (energy / curve)
        rest = rest - image * (energy / curve)
        following = float(rest.square().sum())
        direction, energy = rest + direction * (following / energy), following
    return x
