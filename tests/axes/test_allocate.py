"""Allocations against brute force over every combination of ranks."""

import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from eckart.axes.allocate import IntegerProgram, InverseLog, Level, Linear, Pool, SameEnergy, Softmax, Uniform, WaterFill, hull
from eckart.axes.protocols import Budget, Cost
from eckart.errors import Refused, UsageError


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


def spectra(seed: int, shapes=((20, 20), (24, 16), (12, 40), (20, 20), (24, 16), (12, 40)), roles="abcabc"):
    g = torch.Generator().manual_seed(seed)
    costs = {f"w{i}": Cost(dense=m * n, per_rank=m + n, full=min(m, n), role=roles[i], block=i // 3) for i, (m, n) in enumerate(shapes)}
    curves = {k: sorted((torch.rand(c.full, generator=g) ** 3 * 10**i).tolist(), reverse=True) for i, (k, c) in enumerate(costs.items())}
    return curves, costs


ADDITIVE = [Uniform(), WaterFill(), SameEnergy(), InverseLog(), IntegerProgram()]
RATIOS = (0.3, 0.5, 0.8, 0.95)


@pytest.mark.parametrize("how", ADDITIVE, ids=lambda a: a.kind)
@pytest.mark.parametrize("keep", RATIOS)
@pytest.mark.parametrize("multiple", [1, 2, 4, 16])
def test_every_allocation_stays_within_the_budget_in_multiples(how, keep, multiple) -> None:
    curves, costs = spectra(1)
    ranks = replace(how, multiple=multiple)(curves, costs, Budget(keep=keep))
    assert ranks.keys() == costs.keys()
    assert cost_at(costs, ranks) <= keep * sum(c.dense for c in costs.values())
    for n, r in ranks.items():
        fits = costs[n].full >= multiple and costs[n].at(multiple) <= keep * costs[n].dense
        assert r is None or (1 <= r <= costs[n].break_even and (r % multiple == 0 or not fits))


def test_multiples_of_other_budgets_round_down_for_ranks_and_up_for_energy() -> None:
    costs = {"a": cost_of(64, 640)}
    curves = {"a": [1.0] * 64}
    assert Uniform(multiple=8)(curves, costs, Budget(rank=21)) == {"a": 16}
    assert Uniform(multiple=8)(curves, costs, Budget(rank=5)) == {"a": 5}
    assert Uniform(multiple=8)(curves, costs, Budget(energy=0.3)) == {"a": 24}
    assert Level(multiple=8)({"a": [1.0] * 10 + [0.0] * 54}, costs, Budget(threshold=0.5)) == {"a": 16}
    with pytest.raises(UsageError, match="multiple: expected at least 1"):
        Uniform(multiple=0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [0.5, 0.7, 0.9])
def test_the_integer_program_is_the_brute_force_optimum(seed, keep) -> None:
    curves, costs = random_problem(seed)
    ranks = IntegerProgram()(curves, costs, Budget(keep=keep))
    limit = int(keep * sum(c.dense for c in costs.values()))
    assert cost_at(costs, ranks) <= limit
    assert loss_of(curves, ranks) == pytest.approx(brute(curves, costs, limit), abs=1e-9)
    assert loss_of(curves, ranks) <= loss_of(curves, WaterFill()(curves, costs, Budget(keep=keep))) + 1e-9


def test_a_coarse_grid_stays_within_the_budget_and_near() -> None:
    curves, costs = spectra(2)
    fine, coarse = (IntegerProgram(grid=g)(curves, costs, Budget(keep=0.6)) for g in (64, 5))
    assert cost_at(costs, coarse) <= 0.6 * sum(c.dense for c in costs.values())
    assert loss_of(curves, fine) <= loss_of(curves, coarse) + 1e-9


def test_an_integer_program_without_room_is_refused() -> None:
    with pytest.raises(Refused, match="smallest ranks already store"):
        IntegerProgram()({"a": [1.0] * 4}, {"a": cost_of(4, 4)}, Budget(keep=0.1))


def share_of(costs, ranks, names=None) -> float:
    names = names or list(costs)
    return sum(costs[n].at(ranks[n]) for n in names) / sum(costs[n].dense for n in names)


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_softmax_is_modegpts_formula(keep) -> None:
    influence = [0.1, 0.3, 0.8]
    costs = {f"b{i}.{r}": Cost(dense=10**6, per_rank=2000, full=1000, role=r, block=i) for i in range(3) for r in "uv"}
    curves = {n: [influence[c.block]] for n, c in costs.items()}
    ranks = Softmax(temperature=2.0)(curves, costs, Budget(keep=keep))
    weight = [math.exp(-s / (2.0 * 0.4)) for s in influence]
    for i in range(3):
        removed = 3 * (1 - keep) * weight[i] / sum(weight)
        if max(weight) * 3 * (1 - keep) > 0.95 * sum(weight):  # what the cap cuts off goes to the other blocks
            removed = 0.95 if weight[i] == max(weight) else (3 * (1 - keep) - 0.95) * weight[i] / (sum(weight) - max(weight))
        assert 1 - share_of(costs, ranks, [f"b{i}.u", f"b{i}.v"]) == pytest.approx(removed, abs=5e-3)
    assert share_of(costs, ranks) <= keep
    flat = Softmax()({n: [0.5] for n in costs}, costs, Budget(keep=keep))
    assert len(set(flat.values())) == 1


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_linear_is_alphaprunings_map(spread) -> None:
    alpha = {"b0.u": [2.0], "b0.v": [4.0], "b1.u": [5.0], "b1.v": [7.0], "b2.u": [4.0], "b2.v": [5.0]}
    costs = {n: Cost(dense=10**6, per_rank=2000, full=1000, block=int(n[1])) for n in alpha}
    ranks = Linear(spread=spread)(alpha, costs, Budget(keep=0.6))
    means = [3.0, 6.0, 4.5]
    raw = [(m - 3) / 3 * 2 * spread + 1 - spread for m in means]
    for i in range(3):
        removed = 0.4 * raw[i] * 3 / sum(raw)
        assert 1 - share_of(costs, ranks, [f"b{i}.u", f"b{i}.v"]) == pytest.approx(removed, abs=5e-3)
    each = Linear(spread=0.3, per="matrix")(alpha, costs, Budget(keep=0.6))
    assert each["b1.v"] < each["b1.u"] < each["b0.u"]


def test_inverse_log_compares_matrices_of_one_role_whatever_the_unit() -> None:
    curves, costs = spectra(3)
    budget = Budget(keep=0.6)
    ranks = InverseLog()(curves, costs, budget)
    for role in "abc":
        names = [n for n, c in costs.items() if c.role == role]
        assert share_of(costs, ranks, names) == pytest.approx(0.6, abs=0.05)  # a role keeps its own share of the budget
        low, high = names  # the second has far larger losses
        assert ranks[high] > ranks[low]
    scaled = {n: [v * 1e6 for v in c] for n, c in curves.items()}
    assert InverseLog()(scaled, costs, budget) == ranks
    assert InverseLog()({n: [0.0] * c.full for n, c in costs.items()}, costs, budget).keys() == costs.keys()


def test_pool_keeps_the_floor_and_gives_the_rest_by_influence_and_size() -> None:
    curves, costs = spectra(4)
    seen = {n: [0.1 + 0.2 * costs[n].block, *c] for n, c in curves.items()}
    ranks = Pool()(seen, costs, Budget(keep=0.5))
    for role in "abc":
        first, second = (n for n, c in costs.items() if c.role == role)
        assert ranks[second] > ranks[first]  # more influence and larger outputs
        assert costs[first].at(ranks[first]) >= 0.2 * costs[first].dense
    even = Uniform()(curves, costs, Budget(keep=0.5))
    assert all(0 <= r - even[n] <= 1 for n, r in Pool(floor=1.0)(seen, costs, Budget(keep=0.5)).items())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Softmax(temperature=0.0), "temperature"),
        (lambda: Linear(spread=1.5), "spread"),
        (lambda: Pool(alpha=2.0), "alpha"),
    ],
)
def test_settings_out_of_range(make, words) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_tail_exponents_come_from_the_named_estimator() -> None:
    from eckart.axes import Bundle, Site
    from eckart.axes.score import TailExponent

    bundle = Bundle("a", (Site("a", (400, 400), ("a.weight",)),))
    s = torch.arange(1, 401, dtype=torch.float64) ** -0.5  # squares are i^-1: a density with exponent 2
    logs = s.square().sort().values[200:].log()
    hill = 1 + len(logs) / float((logs - logs[0]).sum())
    assert TailExponent(fit="hill").curve(bundle, s, None)[0] == pytest.approx(hill)
    assert TailExponent().curve(bundle, s, None)[0] == pytest.approx(2, abs=0.3)
    assert TailExponent().curve(bundle, torch.ones(3), None) == [2.0]
