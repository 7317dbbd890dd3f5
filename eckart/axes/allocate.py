"""How much of each matrix: a rank for every bundle from value curves, costs and one budget. Pure arithmetic, no tensors.

A curve holds the value of each rank, descending; what is lost at rank r is the sum of the values behind it. None as a rank leaves
the matrix dense: it loses nothing and costs what it did. No matrix gets a rank at which the pair would store more than the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

from ..errors import UsageError
from .base import Choice
from .protocols import Budget, Cost, Decides

Curves = Mapping[str, Sequence[float]]
Costs = Mapping[str, Cost]
Ranks = dict[str, int | None]


def total_budget(costs: Costs, budget: Budget, who: str) -> int:
    """Parameters that may be stored, from keep or total_rank."""
    if budget.kind == "keep":
        return math.floor(budget.value * sum(c.dense for c in costs.values()) + 1e-9)
    if budget.kind == "total_rank":
        wanted = budget.value if isinstance(budget.value, int) else round(budget.value * len(costs))
        mean = sum(c.per_rank for c in costs.values()) / len(costs)
        return round(wanted * mean)
    raise UsageError(
        f"{who} takes budget.keep or budget.total_rank, found {budget.kind}. Set --keep, or choose another allocation (--set allocate.kind=uniform)."
    )


def bounded(rank: int, cost: Cost) -> int | None:
    """At least 1; None (dense) above break-even."""
    rank = max(rank, 1)
    return None if rank > cost.break_even else rank


def one_rank(cost: Cost, budget: Budget, curve: Sequence[float] | None = None) -> int | None:
    """The rank of one matrix from a budget that looks at nothing else."""
    if budget.kind == "keep":
        if budget.value == 1:
            return None
        return bounded(math.floor((budget.value * cost.dense - cost.fixed) / cost.per_rank + 1e-9), cost)
    if budget.kind in ("rank", "total_rank"):
        value = budget.value
        return bounded(value if isinstance(value, int) else math.floor(value * cost.full if value < 1 else value), cost)
    if budget.kind in ("energy", "error") and curve is not None:
        share = budget.value if budget.kind == "energy" else 1 - budget.value**2
        total = sum(curve)
        running = accumulate(curve)
        rank = next((r for r, s in enumerate(running, 1) if s >= share * total * (1 - 1e-12)), cost.full)
        return bounded(rank, cost)
    raise UsageError(f"uniform allocation has no rule for budget.{budget.kind}.")


@dataclass(frozen=True)
class Uniform(Choice):
    """The same budget for every matrix: its share of parameters, its rank, its energy or its error."""

    kind: ClassVar[str] = "uniform"
    axis: ClassVar[str] = "allocate"
    decides: ClassVar[Decides] = "shape"

    def __call__(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        return {name: one_rank(cost, budget, curves.get(name)) for name, cost in costs.items()}


def bisect_level(ranks_at: Callable[[float], Ranks], costs: Costs, limit: int) -> Ranks:
    """The ranks of the lowest level in (0, 1) whose cost stays within the limit; cost must fall as the level rises."""
    low, high = 0.0, 1.0
    best = ranks_at(high)
    for _ in range(60):
        middle = (low + high) / 2
        found = ranks_at(middle)
        if sum(costs[n].at(r) for n, r in found.items()) <= limit:
            best, high = found, middle
        else:
            low = middle
    return best


@dataclass(frozen=True)
class SameEnergy(Choice):
    """One share of the squared spectrum for all matrices, found by bisection so that the parameters meet the budget."""

    kind: ClassVar[str] = "energy"
    axis: ClassVar[str] = "allocate"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"additive"})

    def __call__(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        if budget.kind in ("energy", "error"):
            return {n: one_rank(c, budget, curves[n]) for n, c in costs.items()}

        def at(level: float) -> Ranks:
            return {n: one_rank(c, Budget(energy=max(1 - level, 1e-15)), curves[n]) for n, c in costs.items()}

        return bisect_level(at, costs, total_budget(costs, budget, "allocate.energy"))


@dataclass(frozen=True)
class Level(Choice):
    """One threshold on the score for all matrices; what lies above it is kept. WeLore's rule with score `min_max`.

    Args:
        min_drop: a matrix of which a smaller share of ranks falls below the threshold stays dense (WeLore: 0.4999).
    """

    kind: ClassVar[str] = "level"
    axis: ClassVar[str] = "allocate"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"level"})

    min_drop: float = 0.4999

    def __call__(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        def at(level: float) -> Ranks:
            out: Ranks = {}
            for name, cost in costs.items():
                kept = sum(v >= level for v in curves[name])
                dropped = 1 - kept / len(curves[name])
                out[name] = None if dropped <= self.min_drop else bounded(kept, cost)
            return out

        if budget.kind == "threshold":
            return at(budget.value)
        return bisect_level(at, costs, total_budget(costs, budget, "allocate.level"))


def hull(points: Sequence[tuple[int, float]]) -> list[int]:
    """Indices of the lower convex hull of (cost, loss) points with rising cost, from the first point down to the lowest."""
    out: list[int] = []
    for i, (x, y) in enumerate(points):
        if out and y >= points[out[-1]][1]:
            continue
        while len(out) >= 2:
            (x0, y0), (x1, y1) = points[out[-2]], points[out[-1]]
            if (y1 - y0) * (x - x0) >= (y - y0) * (x1 - x0):
                out.pop()
            else:
                break
        out.append(i)
    return out


@dataclass(frozen=True)
class WaterFill(Choice):
    """Spend parameters where they take away most loss: greedy over the lower convex hull of each matrix's (cost, loss) points.

    The dense matrix is one of the points, so a matrix is left alone when that is the better use of its parameters. Optimal for the
    budget that it ends on; what is left over is spent rank by rank.
    """

    kind: ClassVar[str] = "water_fill"
    axis: ClassVar[str] = "allocate"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"additive"})

    def __call__(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        limit = total_budget(costs, budget, "allocate.water_fill")
        names = sorted(costs)
        tails = {n: _tails(curves[n]) for n in names}
        points: dict[str, list[tuple[int, float]]] = {}
        steps: list[tuple[float, str, int]] = []
        for n in names:
            cost = costs[n]
            ranks: list[int | None] = [*range(1, cost.break_even + 1), None]
            points[n] = [(cost.at(r), tails[n][r] if r is not None else 0.0) for r in ranks]
            corners = hull(points[n])
            for a, b in pairwise(corners):
                (x0, y0), (x1, y1) = points[n][a], points[n][b]
                steps.append(((y0 - y1) / (x1 - x0), n, b))
        at = dict.fromkeys(names, 0)
        spent = sum(points[n][0][0] for n in names)
        full: set[str] = set()
        for _, n, b in sorted(steps, key=lambda s: (-s[0], s[1], s[2])):
            more = points[n][b][0] - points[n][at[n]][0]
            if n in full or spent + more > limit:
                full.add(n)
                continue
            at[n], spent = b, spent + more
        for n in sorted(names, key=lambda n: (-curves[n][min(at[n] + 1, len(curves[n]) - 1)] / costs[n].per_rank, n)):
            while at[n] + 1 < len(points[n]) and spent + points[n][at[n] + 1][0] - points[n][at[n]][0] <= limit:
                spent += points[n][at[n] + 1][0] - points[n][at[n]][0]
                at[n] += 1
        return {n: None if at[n] == len(points[n]) - 1 else at[n] + 1 for n in names}


def _tails(curve: Sequence[float]) -> list[float]:
    """tails[r] = what is lost at rank r."""
    return [*list(accumulate(reversed(curve)))[::-1], 0.0]
