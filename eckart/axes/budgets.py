"""What every allocation is made of: budgets in parameters, ranks that save some, rounding to multiples, and two searches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ..errors import UsageError
from .base import AllocateChoice
from .protocols import Budget, Cost

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


def tails_of(curve: Sequence[float]) -> list[float]:
    """tails[r] = what is lost at rank r."""
    return [*list(accumulate(reversed(curve)))[::-1], 0.0]


@dataclass(frozen=True)
class Allocation(AllocateChoice):
    """Base of allocations: a rule in `ranks`, and ranks as multiples of a number on request.

    Under a budget of parameters whole steps of `multiple` ranks are given out, so the total stays within the budget; under a budget of ranks the
    result is rounded down, under one of energy or error up. A matrix too small for one step keeps steps of one.

    Args:
        multiple: 8 or 16 suit matrix units of GPUs; 1 is any rank.
    """

    multiple: int = 1

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise UsageError(f"allocate.multiple: expected at least 1, found {self.multiple}.")

    @property
    def step(self) -> int:
        return self.multiple

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        """The rule itself."""
        raise NotImplementedError

    def __call__(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        """A rank for every bundle, None where it stays dense."""
        if self.multiple == 1:
            return self.ranks(curves, costs, budget)
        steps = {n: self.multiple if _fits(c, self.multiple, budget) else 1 for n, c in costs.items()}
        if budget.kind not in ("keep", "total_rank"):
            up = budget.kind in ("energy", "error", "threshold")
            found = self.ranks(curves, costs, budget)
            return {n: None if r is None else _rounded(r, steps[n], costs[n], up) for n, r in found.items()}
        limit = total_budget(costs, budget, f"allocate.{self.kind}") / sum(c.dense for c in costs.values())
        coarse = {n: replace(c, per_rank=c.per_rank * steps[n], full=c.full // steps[n]) for n, c in costs.items()}
        merged = {n: self._merged(curve, costs[n], steps[n]) for n, curve in curves.items()}
        found = self.ranks(merged, coarse, Budget(keep=min(1.0, limit)))
        return {n: None if r is None else r * steps[n] for n, r in found.items()}

    def _merged(self, curve: Sequence[float], cost: Cost, step: int) -> Sequence[float]:
        """The value of each step: that of its ranks together, or where values are compared with a level that of its last."""
        if step == 1 or len(curve) < cost.full:
            return curve
        if "level" in self.takes:
            return curve[step - 1 :: step]
        return [sum(curve[i : i + step]) for i in range(0, len(curve), step)]


def _fits(cost: Cost, step: int, budget: Budget) -> bool:
    """Whether one step of ranks saves parameters, and is no more than the matrix's own share of the budget."""
    share = budget.value if budget.kind == "keep" else 1.0
    return cost.full >= step and cost.at(step) < cost.dense and cost.at(step) <= share * cost.dense


def _rounded(rank: int, step: int, cost: Cost, up: bool) -> int | None:
    whole = -(-rank // step) * step if up else rank // step * step
    return bounded(whole, cost) if whole >= step else rank
