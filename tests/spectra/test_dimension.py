"""Intrinsic dimension: scipy's trees, numpy's brute force, scikit-dimension's recorded figures, and clouds of known dimension."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist

from bench.text_measures import clouds
from eckart.errors import Refused, UsageError
from eckart.spectra.dimension import distances, distinct, likelihood_dimension, spanning_lengths, tree_growth, two_nn

RECORDED = json.loads((Path(__file__).parents[2] / "bench" / "results" / "text_measures.json").read_text())["dimension"]
CLOUDS = clouds()


def cloud(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_distances_equal_scipy_and_keep_small_differences() -> None:
    x = cloud(50, 7)
    x[3] = x[2] + 1e-9
    found = distances(torch.from_numpy(x))
    assert np.allclose(found, cdist(x, x), rtol=1e-12, atol=0)
    assert float(found[2, 3]) == pytest.approx(math.sqrt(7) * 1e-9, rel=1e-5)
    assert distances(torch.zeros(3, 2, dtype=torch.bfloat16)).dtype == torch.float64


@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 2), (40, 3), (120, 30)])
def test_trees_equal_scipy(n, d) -> None:
    x = cloud(n, d)
    subsets = np.stack([np.random.default_rng(i).permutation(n)[: max(2, n - 5)] for i in range(4)])
    found = spanning_lengths(distances(torch.from_numpy(x)), torch.from_numpy(subsets))
    for row, edges in zip(subsets, found, strict=True):
        expected = np.sort(minimum_spanning_tree(cdist(x[row], x[row])).data)
        assert np.allclose(np.sort(edges.numpy()), expected, rtol=1e-12)


def test_likelihood_and_two_nn_equal_loops() -> None:
    x = cloud(60, 4)
    d = cdist(x, x)
    near = np.sort(d + np.diag([np.inf] * 60), 1)
    inverse = [sum(math.log(near[i, 9] / near[i, j]) for j in range(9)) / 9 for i in range(60)]
    assert likelihood_dimension(torch.from_numpy(d), 10) == pytest.approx(60 / sum(inverse), rel=1e-12)
    x_axis = sorted(math.log(near[i, 1] / near[i, 0]) for i in range(60))[:48]
    y_axis = [-math.log(1 - (i + 1) / 60) for i in range(48)]
    slope = sum(a * b for a, b in zip(x_axis, y_axis, strict=True)) / sum(a * a for a in x_axis)
    assert two_nn(torch.from_numpy(d), 0.2) == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("name", CLOUDS)
def test_the_peer_s_recorded_figures(name) -> None:
    row = RECORDED["clouds"][name]
    assert RECORDED["peer"] == "scikit-dimension 0.5.0"
    d = distances(torch.from_numpy(CLOUDS[name][1]))
    assert likelihood_dimension(d) == pytest.approx(row["peer"]["mle"], rel=1e-9)
    assert two_nn(d) == pytest.approx(row["peer"]["twonn"], rel=1e-9)
    assert float(spanning_lengths(d, torch.arange(len(d))[None]).sum()) == pytest.approx(row["peer"]["tree"], rel=1e-12)
    assert tree_growth(d).dimension == pytest.approx(row["peer"]["phd"], rel=0.08)  # other subsamples, a median instead of all


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_of_known_dimension(name) -> None:
    truth, x = CLOUDS[name]
    d = distances(torch.from_numpy(x))
    for found in (tree_growth(d).dimension, likelihood_dimension(d), two_nn(d)):
        assert truth * 0.8 - 0.1 < found < truth * 1.2 + 0.1


def test_other_powers_give_the_same_dimension() -> None:
    x = np.random.default_rng(1).random((500, 5))
    d = distances(torch.from_numpy(x))
    found = [tree_growth(d, power=a).dimension for a in (0.5, 1.0, 2.0)]
    assert all(abs(f - 5) < 1.2 for f in found)
    assert tree_growth(d, power=2.0).dimension == pytest.approx(2 / (1 - tree_growth(d, power=2.0).slope))


def test_rotation_scale_and_shift_change_nothing() -> None:
    x = cloud(200, 3) @ cloud(3, 12, 1)
    turn = np.linalg.qr(cloud(12, 12, 2))[0]
    one, two = distances(torch.from_numpy(x)), distances(torch.from_numpy(100 * x @ turn + 5))
    for estimate in (lambda d: tree_growth(d).dimension, likelihood_dimension, two_nn):
        assert estimate(two) == pytest.approx(estimate(one), rel=1e-6)


def test_the_seed_alone_decides() -> None:
    d = distances(torch.from_numpy(cloud(150, 3)))
    state = torch.random.get_rng_state()
    assert tree_growth(d, seed=1) == tree_growth(d, seed=1)
    assert tree_growth(d, seed=1) != tree_growth(d, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_repeated_points_count_once() -> None:
    x = torch.from_numpy(cloud(100, 3))
    d = distances(torch.cat([x, x[:30], x[:1] + 1e-9]))
    assert len(distinct(d)) == 101
    assert torch.equal(distinct(d, 1e-6), distances(x))
    assert len(distinct(distances(torch.zeros(5, 2)))) == 1
    assert len(distinct(distances(torch.zeros(1, 2)))) == 1
    assert distinct(torch.zeros(0, 0)).shape == (0, 0)


def test_a_lattice_has_equal_distances_and_no_finite_dimension() -> None:
    d = distances(torch.eye(30))
    assert math.isinf(likelihood_dimension(d, 5))
    assert math.isinf(two_nn(d))


def test_clouds_that_are_too_small_are_refused() -> None:
    d = distances(torch.from_numpy(cloud(79, 2)))
    with pytest.raises(Refused, match="at least 80 distinct points, found 79"):
        tree_growth(d)
    with pytest.raises(Refused, match="at least 80 distinct points, found 79"):
        likelihood_dimension(d, 79)
    with pytest.raises(Refused, match="at least 3 distinct points, found 2"):
        two_nn(d[:2, :2])
    with pytest.raises(Refused, match="at least 2 ratios"):
        two_nn(d[:3, :3], 0.5)
    with pytest.raises(Refused, match="NaN or Inf"):
        distances(torch.tensor([[float("nan")], [1.0]]))
    with pytest.raises(Refused, match="real points"):
        distances(torch.zeros(3, dtype=torch.long))
    with pytest.raises(UsageError, match="power > 0"):
        tree_growth(d, power=0)
    with pytest.raises(UsageError, match="at least 2 neighbours"):
        likelihood_dimension(d, 1)
    with pytest.raises(UsageError, match=r"in \[0, 1\)"):
        two_nn(d, 1.0)
