"""How much of each matrix: a rank for every bundle from value curves, costs and one budget. Pure arithmetic, no tensors.

A curve holds the value of each rank, descending; what is lost at rank r is the sum of the values behind it. None as a rank leaves
the matrix dense: it loses nothing and costs what it did. No matrix gets a rank at which the pair would store more than the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from .budgets import Allocation, Costs, Curves, Ranks, bisect_level, bounded, one_rank, tails_of, total_budget
from .budgets import hull as hull
from .integer import IntegerProgram as IntegerProgram
from .kron import Elbow as Elbow
from .learned import TrainedCut as TrainedCut
from .protocols import Budget, Decides
from .shares import InverseLog as InverseLog
from .shares import Linear as Linear
from .shares import Pool as Pool
from .shares import Softmax as Softmax


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same budget for every matrix: its share of parameters, its rank, its energy or its error."""

    kind: ClassVar[str] = "uniform"
    decides: ClassVar[Decides] = "shape"

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        return {name: one_rank(cost, budget, curves.get(name)) for name, cost in costs.items()}


@dataclass(frozen=True)
class SameEnergy(Allocation):
    """One share of the squared spectrum for all matrices, found by bisection so that the parameters meet the budget."""

    kind: ClassVar[str] = "energy"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"additive"})

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        if budget.kind in ("energy", "error"):
            return {n: one_rank(c, budget, curves[n]) for n, c in costs.items()}

        def at(level: float) -> Ranks:
            return {n: one_rank(c, Budget(energy=max(1 - level, 1e-15)), curves[n]) for n, c in costs.items()}

        return bisect_level(at, costs, total_budget(costs, budget, "allocate.energy"))


@dataclass(frozen=True)
class Level(Allocation):
    """One threshold on the score for all matrices; what lies above it is kept. WeLore's rule with score `min_max`.

    Args:
        min_drop: a matrix of which a smaller share of ranks falls below the threshold stays dense (WeLore: 0.4999).
    """

    kind: ClassVar[str] = "level"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"level"})

    min_drop: float = 0.4999

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        def at(level: float) -> Ranks:
            out: Ranks = {}
            for name, cost in costs.items():
                kept = sum(v >= level for v in curves[name])
                dropped = 1 - kept / len(curves[name])
                out[name] = None if dropped <= self.min_drop else bounded(kept, cost)
            return out

        if budget.kind == "threshold":
            return at(budget.value)
        top = max(max(c) for c in curves.values())
        return bisect_level(lambda level: at(level * top), costs, total_budget(costs, budget, "allocate.level"))


@dataclass(frozen=True)
class WaterFill(Allocation):
    """Spend parameters where they take away most loss: greedy over the lower convex hull of each matrix's (cost, loss) points.

    The dense matrix is one of the points, so a matrix is left alone when that is the better use of its parameters. Optimal for the
    budget that it ends on; what is left over is spent rank by rank.
    """

    kind: ClassVar[str] = "water_fill"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"additive"})

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        limit = total_budget(costs, budget, "allocate.water_fill")
        names = sorted(costs)
        tails = {n: tails_of(curves[n]) for n in names}
        points: dict[str, list[tuple[int, float]]] = {}
        steps: list[tuple[float, str, int]] = []
        for n in names:
            cost = costs[n]
            options: list[int | None] = [*range(1, cost.break_even + 1), None]
            points[n] = [(cost.at(r), tails[n][r] if r is not None else 0.0) for r in options]
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
