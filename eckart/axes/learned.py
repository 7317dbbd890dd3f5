"""Ranks that come out of training a truncation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import UsageError
from .budgets import Allocation, Costs, Curves, Ranks, bisect_level, bounded, one_rank, total_budget
from .protocols import Budget, Decides


@dataclass(frozen=True)
class TrainedCut(Allocation):
    """Each matrix is cut at a real-valued position, softly, and positions are trained on the model's loss at the size that is wanted: Dobi-SVD.

    Training minimises loss + weight * |stored share - budget|; then positions are scaled and rounded so that the ranks fit the budget.

    Args:
        steps: optimiser steps, one calibration batch each.
        lr: learning rate of Adam, in ranks.
        weight: of the distance to the budget.
    """

    kind: ClassVar[str] = "trained_cut"
    decides: ClassVar[Decides] = "training"
    takes: ClassVar[frozenset[str]] = frozenset({"pair"})

    steps: int = 100
    lr: float = 1.0
    weight: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.lr <= 0 or self.weight <= 0:
            raise UsageError(f"allocate.trained_cut: expected positive settings, found {self.steps}, {self.lr:g} and {self.weight:g}.")

    def start(self, costs: Costs, budget: Budget) -> dict[str, float]:
        """Positions before training: the uniform ranks of the budget, or the largest that save something."""
        share = Budget(keep=min(1.0, total_budget(costs, budget, "allocate.trained_cut") / sum(c.dense for c in costs.values())))
        return {n: float(one_rank(c, share) or max(1, c.break_even)) for n, c in costs.items()}

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        """From curves that hold one number: the trained position."""
        return self.fitted({n: c[0] for n, c in curves.items()}, costs, budget)

    def fitted(self, positions: Mapping[str, float], costs: Costs, budget: Budget) -> Ranks:
        """Ranks in proportion to positions, as large as the budget allows."""
        limit = total_budget(costs, budget, "allocate.trained_cut")

        def at(level: float) -> Ranks:
            scale = (1 - level) / max(level, 1e-12)
            return {n: bounded(math.floor(min(p * scale, 1e9)), costs[n]) for n, p in positions.items()}

        return bisect_level(at, costs, limit)
