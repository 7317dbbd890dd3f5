"""The exact allocation: one rank for each matrix so that the sum of losses is least, as an integer program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import Refused, UsageError
from .budgets import Allocation, Costs, Curves, Ranks, hull, tails_of, total_budget
from .protocols import Budget, Cost, Decides


@dataclass(frozen=True)
class IntegerProgram(Allocation):
    """Least total loss within the budget, exactly, over a grid of ranks for each matrix: a multiple-choice knapsack, solved by scipy's HiGHS.

    On additive losses water-filling is within one step of this; the program matters where few ranks are allowed (`multiple`) or few matrices exist.

    Args:
        grid: ranks tried per matrix: the corners of its loss curve's convex hull, and evenly spaced ones, dense among them.
    """

    kind: ClassVar[str] = "integer_program"
    decides: ClassVar[Decides] = "spectra"
    takes: ClassVar[frozenset[str]] = frozenset({"additive"})

    grid: int = 64

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        limit = total_budget(costs, budget, "allocate.integer_program")
        options = {n: _options(curves[n], c, self.grid) for n, c in sorted(costs.items())}
        return _solve(options, costs, limit)


Option = tuple[int | None, int, float]  # rank, cost, loss


def _options(curve: Sequence[float], cost: Cost, grid: int) -> list[Option]:
    tails = tails_of(curve)
    every: list[Option] = [(r, cost.at(r), tails[r]) for r in range(1, cost.break_even + 1)]
    every.append((None, cost.dense, 0.0))
    if len(every) <= grid:
        return every
    corners = hull([(c, loss) for _, c, loss in every])
    if len(corners) > grid // 2:
        corners = [corners[i * (len(corners) - 1) // (grid // 2 - 1)] for i in range(grid // 2)] if grid >= 4 else corners[:1]
    even = [i * (len(every) - 1) // (grid - 1) for i in range(grid)] if grid > 1 else [0]
    return [every[i] for i in sorted({0, len(every) - 1, *corners, *even})]


def _solve(options: dict[str, list[Option]], costs: Costs, limit: int) -> Ranks:
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise UsageError("allocate.integer_program needs scipy: pip install 'eckart[match]'. Or choose allocate.water_fill.") from error
    flat = [(n, option) for n, found in options.items() for option in found]
    largest = max((o[2] for _, o in flat), default=0.0) or 1.0
    loss = np.array([o[2] / largest for _, o in flat])
    size = np.array([float(o[1]) for _, o in flat])
    names = list(options)
    one = np.array([[float(n == name) for n, _ in flat] for name in names])
    rules = [LinearConstraint(one, 1, 1), LinearConstraint(size[None] / limit, -np.inf, 1)]
    # a speck of cost breaks ties between equal losses, so that the answer does not depend on the solver's path
    found = milp(
        loss + 1e-12 * size / size.sum(),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=rules,
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        least = sum(min(o[1] for o in found) for found in options.values())
        raise Refused(f"allocate.integer_program: the smallest ranks already store {least} parameters, and the budget is {limit}.")
    chosen = {n: option[0] for (n, option), x in zip(flat, found.x, strict=True) if x > 0.5}
    assert sum(costs[n].at(r) for n, r in chosen.items()) <= limit
    return chosen
