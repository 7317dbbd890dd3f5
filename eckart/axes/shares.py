"""Allocations that give each matrix, or each block, its share of what is removed, by one number that says how much it matters.

All are scale-free and meet a budget of stored parameters: the mean share removed is searched so that the ranks fit it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import UsageError
from .budgets import Allocation, Costs, Curves, Ranks, bisect_level, bounded, one_rank, tails_of, total_budget
from .protocols import Budget, Cost, Decides

MOST = 0.95  # of a matrix is removed at most: a share of one or more has no rank


def by_removal(removal: Callable[[float], Mapping[str, float]], costs: Costs, budget: Budget, who: str) -> Ranks:
    """Ranks for shares removed, at the smallest mean share that fits the budget.

    Args:
        removal: mean share in (0, 1) -> the share of each bundle; rising with it.
        costs, budget: as for an allocation.
        who: for messages.
    """

    def at(mean: float) -> Ranks:
        return {n: _rank(costs[n], 1 - min(max(r, 0.0), max(MOST, mean))) for n, r in removal(mean).items()}

    return bisect_level(at, costs, total_budget(costs, budget, who))


def _rank(cost: Cost, keep: float) -> int | None:
    return None if keep >= 1 else bounded(math.floor((keep * cost.dense - cost.fixed) / cost.per_rank + 1e-9), cost)


def scalars(curves: Curves, costs: Costs, per: Literal["block", "matrix"]) -> dict[str, float]:
    """The number of each bundle, or the mean over its block, weighted by parameters."""
    values = {n: curves[n][0] for n in costs}
    if per == "matrix":
        return values
    groups: dict[object, list[str]] = {}
    for n, c in costs.items():
        groups.setdefault(c.block if c.block >= 0 else n, []).append(n)
    out: dict[str, float] = {}
    for names in groups.values():
        weight = sum(costs[n].dense for n in names)
        mean = sum(values[n] * costs[n].dense for n in names) / weight
        out |= dict.fromkeys(names, mean)
    return out


@dataclass(frozen=True)
class Softmax(Allocation):
    """Remove from each block the share L * mean * softmax(-score / temperature): little from what matters. MoDeGPT's rule with Block Influence.

    Args:
        temperature: in units of the mean score, so that it means the same for every model; large is uniform.
    """

    kind: ClassVar[str] = "softmax"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"scalar"})

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise UsageError(f"allocate.temperature: expected a positive number, found {self.temperature:g}.")

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        found = scalars(curves, costs, "block")
        mean = sum(abs(v) for v in found.values()) / len(found)
        unit = self.temperature * mean if mean > 0 else 1.0
        least = min(found.values())
        weights = {n: math.exp(-(v - least) / unit) for n, v in found.items()}
        return by_removal(lambda share: _spread(share, weights, costs), costs, budget, "allocate.softmax")


@dataclass(frozen=True)
class Linear(Allocation):
    """Remove shares that span (1 - spread) to (1 + spread) times their mean, linear in the score: AlphaPruning's map, high scores losing most.

    Args:
        spread: half the width, in [0, 1]; 0 is uniform.
        per: average the score over each block first, as published, or take each matrix by itself.
    """

    kind: ClassVar[str] = "linear"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"scalar"})

    spread: float = 0.3
    per: Literal["block", "matrix"] = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.spread <= 1:
            raise UsageError(f"allocate.spread: expected a number in [0, 1], found {self.spread:g}.")

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        found = scalars(curves, costs, self.per)
        low, high = min(found.values()), max(found.values())
        width = high - low
        weights = {n: 1 - self.spread + 2 * self.spread * ((v - low) / width if width > 0 else 0.5) for n, v in found.items()}
        return by_removal(lambda share: _spread(share, weights, costs), costs, budget, "allocate.linear")


@dataclass(frozen=True)
class InverseLog(Allocation):
    """Among matrices of one role, remove shares in proportion to 1 / log(loss) of each at the uniform rank: SVD-LLM V2's rule.

    Losses are taken relative to the smallest of their role times e, so that logarithms are at least 1 whatever the unit.
    """

    kind: ClassVar[str] = "inverse_log"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"additive"})

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        share = Budget(keep=min(1.0, total_budget(costs, budget, "allocate.inverse_log") / sum(c.dense for c in costs.values())))
        groups = _roles(costs)
        losses = {n: loss_at(curves[n], one_rank(c, share)) ** 0.5 for n, c in costs.items()}
        weights: dict[str, float] = {}
        for names in groups:
            least = min((losses[n] for n in names if losses[n] > 0), default=1.0)
            weights |= {n: 1 / (1 + math.log(max(losses[n], least) / least)) for n in names}
        return by_removal(lambda mean: _within(mean, weights, costs, groups), costs, budget, "allocate.inverse_log")


@dataclass(frozen=True)
class Pool(Allocation):
    """Every matrix keeps a part of its uniform share; among matrices of one role the rest goes by influence^alpha * log(e + size)^(1 - alpha).

    Swift-SVD's rule: influence of the block, scaled to [1, 2]; size is the norm of the layer's output, here relative to the mean of its role.

    Args:
        floor: part of the uniform share that every matrix keeps.
        alpha: weight of the influence against the size.
    """

    kind: ClassVar[str] = "pool"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"influence"})

    floor: float = 0.5
    alpha: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1 or not 0 <= self.alpha <= 1:
            raise UsageError(f"allocate: expected floor and alpha in [0, 1], found {self.floor:g} and {self.alpha:g}.")

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        groups = _roles(costs)
        influence = {n: curves[n][0] for n in costs}
        low, high = min(influence.values()), max(influence.values())
        weights: dict[str, float] = {}
        for names in groups:
            sizes = {n: sum(curves[n][1:]) ** 0.5 for n in names}
            mean = sum(sizes.values()) / len(names) or 1.0
            for n in names:
                beta = 1 + ((influence[n] - low) / (high - low) if high > low else 0.0)
                weights[n] = beta**self.alpha * math.log(math.e + sizes[n] / mean) ** (1 - self.alpha)

        def removal(share: float) -> dict[str, float]:
            given = _within(1 - share, weights, costs, groups)
            return {n: 1 - (self.floor * (1 - share) + (1 - self.floor) * given[n]) for n in costs}

        return by_removal(removal, costs, budget, "allocate.pool")


def loss_at(curve: Sequence[float], rank: int | None) -> float:
    """What is lost at a rank; nothing where the matrix stays dense."""
    return 0.0 if rank is None else tails_of(curve)[rank]


def _spread(share: float, weights: Mapping[str, float], costs: Costs) -> dict[str, float]:
    """Shares in proportion to weights, with the mean over parameters that is wanted; what `MOST` cuts off goes to the others."""
    most = max(MOST, share)
    free = dict(weights)
    out: dict[str, float] = {}
    left = share * sum(costs[n].dense for n in weights)
    while free:
        scale = left / sum(w * costs[n].dense for n, w in free.items())
        over = [n for n, w in free.items() if scale * w > most]
        if not over:
            return out | {n: scale * w for n, w in free.items()}
        for n in over:
            out[n] = most
            left -= most * costs[n].dense
            del free[n]
    return out


def _roles(costs: Costs) -> list[list[str]]:
    """Names of the matrices of each role."""
    roles: dict[str, list[str]] = {}
    for n, c in costs.items():
        roles.setdefault(c.role, []).append(n)
    return list(roles.values())


def _within(share: float, weights: Mapping[str, float], costs: Costs, groups: list[list[str]]) -> dict[str, float]:
    out: dict[str, float] = {}
    for names in groups:
        out |= _spread(share, {n: weights[n] for n in names}, {n: costs[n] for n in names})
    return out
