"""Ramer-Douglas-Peucker against the textbook recursion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eckart.errors import Refused
from eckart.spectra.trajectory import split_order


def recursion(p: np.ndarray, eps: float) -> set[int]:
    """Points kept at a tolerance."""

    def walk(i: int, j: int) -> set[int]:
        far, at = 0.0, -1
        for k in range(i + 1, j):
            chord = p[j] - p[i]
            t = min(1.0, max(0.0, float((p[k] - p[i]) @ chord) / float(chord @ chord))) if chord.any() else 0.0
            distance = float(np.linalg.norm(p[k] - p[i] - t * chord))
            if distance > far:
                far, at = distance, k
        return {at} | walk(i, at) | walk(at, j) if far > eps else set()

    return {0, len(p) - 1} | walk(0, len(p) - 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("d", [1, 2, 40])
def test_points_kept_at_every_tolerance_equal_the_recursion(seed, d) -> None:
    p = np.random.default_rng(seed).standard_normal((14, d)).cumsum(0)
    order, tolerance = split_order(torch.from_numpy(p))
    assert sorted(order) == list(range(1, 13))
    for eps in [0.0, *sorted(set(tolerance[1:-1].tolist())), 1e9]:
        for near in (eps * (1 - 1e-9), eps * (1 + 1e-9)):
            assert {k for k in range(14) if tolerance[k] > near} == recursion(p, near)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_goes_by_tolerance_so_budgets_are_nested(seed) -> None:
    p = np.random.default_rng(seed).standard_normal((20, 3)).cumsum(0)
    order, tolerance = split_order(torch.from_numpy(p))
    found = tolerance[order]
    assert bool((found[:-1] >= found[1:]).all())
    for count in range(1, 18):
        eps = float(tolerance[order[count]]) * (1 + 1e-9)
        if eps < float(tolerance[order[count - 1]]):
            assert set(order[:count]) | {0, 19} == recursion(p, eps)


def test_a_straight_path_keeps_its_ends_only() -> None:
    line = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None] * torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    _, tolerance = split_order(line)
    assert tolerance.isinf().tolist() == [True, False, False, False, False, True]
    assert float(tolerance[1:-1].max()) < 1e-15


def test_rotation_and_shift_change_nothing() -> None:
    p = np.random.default_rng(0).standard_normal((12, 5)).cumsum(0)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]
    one, two = split_order(torch.from_numpy(p)), split_order(torch.from_numpy(p @ turn + 7))
    assert one[0] == two[0]
    assert torch.allclose(one[1][1:-1], two[1][1:-1])


def test_a_path_that_returns_two_points_and_paths_that_are_none() -> None:
    order, tolerance = split_order(torch.tensor([[0.0], [3.0], [0.0]]))  # the chord has no length
    assert (order, tolerance.tolist()) == ([1], [math.inf, 3.0, math.inf])
    assert split_order(torch.zeros(2, 3))[0] == []
    assert split_order(torch.zeros(4, 3))[1][1:-1].tolist() == [0.0, 0.0]
    with pytest.raises(Refused, match="at least 2 points"):
        split_order(torch.zeros(1, 3))
    with pytest.raises(Refused, match="NaN or Inf"):
        split_order(torch.tensor([[0.0], [float("inf")], [1.0]]))
