"""Allocations against brute force over every combination of ranks."""

from itertools import pairwise, product

import pytest
import torch

from eckart.axes.allocate import Level, SameEnergy, Uniform, WaterFill, hull
from eckart.axes.protocols import Budget, Cost
from eckart.errors import UsageError


def cost_of(m: int, n: int) -> Cost:
    return Cost(dense=m * n, per_rank=m + n, full=min(m, n))


def random_problem(seed: int, shapes=((6, 6), (9, 5), (4, 12))):
    g = torch.Generator().manual_seed(seed)
    costs = {f"w{i}": cost_of(m, n) for i, (m, n) in enumerate(shapes)}
    curves = {k: sorted((torch.rand(c.full, generator=g) ** 3).tolist(), reverse=True) for k, c in costs.items()}
    return curves, costs


def loss_of(curves, ranks) -> float:
    return sum(0.0 if r is None else sum(curves[n][r:]) for n, r in ranks.items())


def cost_at(costs, ranks) -> int:
    return sum(costs[n].at(r) for n, r in ranks.items())


def brute(curves, costs, limit: int) -> float:
    names = sorted(costs)
    choices = [[*range(1, costs[n].break_even + 1), None] for n in names]
    found = (dict(zip(names, pick, strict=True)) for pick in product(*choices))
    return min((loss_of(curves, r) for r in found if cost_at(costs, r) <= limit), default=float("inf"))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("keep", [0.5, 0.7, 0.9])
def test_water_filling_is_near_the_brute_force_optimum(seed: int, keep: float) -> None:
    curves, costs = random_problem(seed)
    ranks = WaterFill()(curves, costs, Budget(keep=keep))
    limit = int(keep * sum(c.dense for c in costs.values()))
    assert cost_at(costs, ranks) <= limit
    # greedy on the hull is optimal for the budget it spends; the step that did not fit is all it can miss
    widest = 0
    for n, c in costs.items():
        options = [*range(1, c.break_even + 1), None]
        points = [(c.at(r), 0.0 if r is None else sum(curves[n][r:])) for r in options]
        corners = hull(points)
        widest = max(widest, *(points[b][0] - points[a][0] for a, b in pairwise(corners)))
    assert brute(curves, costs, limit) - 1e-12 <= loss_of(curves, ranks) <= brute(curves, costs, limit - widest) + 1e-12


def test_water_filling_prefers_the_matrix_whose_ranks_matter() -> None:
    costs = {"a": cost_of(10, 10), "b": cost_of(10, 10)}
    curves = {"a": [100.0 - i for i in range(10)], "b": [1e-6] * 10}
    ranks = WaterFill()(curves, costs, Budget(keep=0.6))
    assert ranks["a"] is None
    assert ranks["b"] == 1


def test_hull_is_the_lower_envelope() -> None:
    points = [(1, 10.0), (2, 9.0), (3, 4.0), (4, 3.9), (5, 0.0)]
    assert hull(points) == [0, 2, 4]  # slopes -3, -2; the points between lie above


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.8])
def test_uniform_stores_at_most_the_share_of_every_matrix(keep: float) -> None:
    costs = {"a": cost_of(64, 64), "b": cost_of(96, 32)}
    for name, rank in Uniform()({}, costs, Budget(keep=keep)).items():
        assert costs[name].at(rank) <= keep * costs[name].dense < costs[name].at(rank + 1)


def test_above_break_even_a_matrix_stays_dense() -> None:
    costs = {"square": cost_of(64, 64), "long": cost_of(64, 640)}
    assert Uniform()({}, costs, Budget(rank=40)) == {"square": None, "long": 40}
    assert Uniform()({}, costs, Budget(keep=1.0)) == {"square": None, "long": None}
    assert costs["square"].break_even == 31  # 32 * 128 = 64 * 64 would save nothing


def test_same_energy_meets_the_budget_and_levels_the_shares() -> None:
    curves, costs = random_problem(3)
    limit = 0.7 * sum(c.dense for c in costs.values())
    ranks = SameEnergy()(curves, costs, Budget(keep=0.7))
    assert 0.5 * limit < cost_at(costs, ranks) <= limit
    exact = SameEnergy()(curves, costs, Budget(energy=0.5))
    for n, r in exact.items():
        total = sum(curves[n])
        assert sum(curves[n][:r]) >= 0.5 * total > sum(curves[n][: r - 1])


def test_energy_and_error_budgets_agree() -> None:
    curves, costs = random_problem(5)
    assert SameEnergy()(curves, costs, Budget(error=0.6)) == SameEnergy()(curves, costs, Budget(energy=1 - 0.36))


def test_level_keeps_what_lies_above_the_threshold() -> None:
    costs = {"a": cost_of(10, 10), "b": cost_of(10, 10)}
    curves = {"a": [1.0, 0.9, 0.05, 0.04, 0.03, 0.02, 0.01, 0.01, 0.01, 0.0], "b": [1.0] * 9 + [0.0]}
    assert Level()(curves, costs, Budget(threshold=0.1)) == {"a": 2, "b": None}
    assert Level()(curves, costs, Budget(threshold=0.0)) == {"a": None, "b": None}


def test_level_search_is_monotone_in_the_budget() -> None:
    curves, costs = random_problem(8, shapes=((20, 20), (24, 16)))
    curves = {n: [(v - c[-1]) / (c[0] - c[-1]) for v in c] for n, c in curves.items()}
    spent = [cost_at(costs, Level()(curves, costs, Budget(keep=k))) for k in (0.3, 0.5, 0.7, 0.9)]
    assert spent == sorted(spent)


def test_a_budget_an_allocation_cannot_use_is_named() -> None:
    curves, costs = random_problem(1)
    with pytest.raises(UsageError, match=r"allocate\.water_fill takes budget\.keep"):
        WaterFill()(curves, costs, Budget(rank=4))
