"""Column selection and its refit against least squares in numpy, and against every subset where there are few."""

from itertools import combinations

import numpy as np
import pytest
import torch

from eckart.errors import Refused
from eckart.linalg.columns import order_columns, refit, solve_psd, subspace

G = torch.Generator().manual_seed(0)
Z = torch.randn(200, 10, generator=G, dtype=torch.float64) @ torch.randn(10, 10, generator=G, dtype=torch.float64)
W = torch.randn(6, 10, generator=G, dtype=torch.float64)
C = Z.T @ Z / len(Z)


def lost(kept) -> float:
    """Mean squared error of the best map from the kept inputs, by least squares on the rows themselves."""
    y = (Z @ W.T).numpy()
    x = Z[:, list(kept)].numpy()
    fit = np.linalg.lstsq(x, y, rcond=None)[0] if len(kept) else np.zeros((0, y.shape[1]))
    return float(((y - x @ fit) ** 2).sum() / len(Z))


@pytest.mark.parametrize("by", ["leverage", "greedy", "energy"])
def test_gains_are_the_losses_of_every_prefix(by) -> None:
    order = order_columns(C, W, by)
    assert sorted(order.columns.tolist()) == list(range(10))
    left = order.total
    assert left == pytest.approx(lost([]))
    for k in range(1, 11):
        left -= float(order.gains[k - 1])
        assert left == pytest.approx(lost(order.columns[:k].tolist()), rel=1e-6, abs=1e-7)


def test_refit_is_least_squares() -> None:
    kept = torch.tensor([7, 2, 5])
    fit = np.linalg.lstsq(Z[:, kept].numpy(), (Z @ W.T).numpy(), rcond=None)[0].T
    assert np.allclose(refit(C, W, kept).numpy(), fit, atol=1e-8)
    mixing = torch.randn(4, 10, generator=G, dtype=torch.float64)
    fit = np.linalg.lstsq((Z @ mixing.T).numpy(), (Z @ W.T).numpy(), rcond=None)[0].T
    assert np.allclose(refit(C, W, mixing).numpy(), fit, atol=1e-8)


def test_refit_halves_what_dropping_loses() -> None:
    kept = order_columns(C, W).columns[:6]
    dropped = [i for i in range(10) if i not in kept.tolist()]
    bare = float((Z[:, dropped] @ W[:, dropped].T).square().sum() / len(Z))
    assert lost(kept.tolist()) < 0.5 * bare


def test_greedy_is_near_the_best_of_all_subsets() -> None:
    kept = order_columns(C, W, "greedy").columns[:4].tolist()
    best = min(lost(s) for s in combinations(range(10), 4))
    worst = max(lost(s) for s in combinations(range(10), 4))
    assert best - 1e-9 <= lost(kept) < best + 0.2 * (worst - best)


def test_pairs_go_together() -> None:
    order = order_columns(C, W, pairs=2)
    assert order.group == 2
    for a, b in order.columns.reshape(-1, 2).tolist():
        assert b == a + 5
    assert float(order.gains.sum()) == pytest.approx(order.total, rel=1e-6)


def test_leverage_scores_by_their_definition() -> None:
    n = len(C)
    ridge = float(torch.trace(C)) / n
    scores = (C @ torch.linalg.inv(C + ridge * torch.eye(n, dtype=torch.float64))).diagonal()
    assert order_columns(C, W).columns.tolist() == scores.argsort(descending=True).tolist()


@pytest.mark.parametrize("rows", [1, 4])
def test_fewer_tokens_than_inputs(rows) -> None:
    z = Z[:rows]
    c = z.T @ z / rows
    order = order_columns(c, W)
    kept = order.columns[:rows]
    y = z @ W.T
    assert torch.allclose(z[:, kept] @ refit(c, W, kept).T, y, atol=1e-6)
    assert order.total - float(order.gains[:rows].sum()) == pytest.approx(0, abs=1e-6 * order.total)


def test_zero_and_constant_moments_are_defined() -> None:
    assert float(order_columns(torch.zeros(4, 4), torch.ones(2, 4)).gains.sum()) == 0
    assert refit(torch.zeros(4, 4), torch.ones(2, 4), torch.tensor([0, 1])).abs().sum() == 0
    flat = torch.ones(4, 4)
    assert float(order_columns(flat, torch.ones(1, 4)).gains[0]) == pytest.approx(16.0)


def test_wrong_shapes_and_values_are_named() -> None:
    with pytest.raises(Refused, match=r"mlp: expected C \(n, n\)"):
        order_columns(C, W[:, :9], name="mlp")
    with pytest.raises(Refused, match="multiple of 4"):
        order_columns(C, W, pairs=4)
    bad = C.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(Refused, match="NaN or Inf"):
        order_columns(bad, W)


def test_subspace_loses_the_tail_of_the_joint_spectrum() -> None:
    maps = [torch.randn(5, 10, generator=G, dtype=torch.float64) for _ in range(3)]
    directions, gains = subspace(C, sum(m.T @ m for m in maps))
    stacked = Z @ torch.cat(maps).T / len(Z) ** 0.5
    squares = torch.linalg.svdvals(stacked).square()
    assert torch.allclose(gains[: len(squares)], squares[:10], rtol=1e-8)
    for k in (1, 3, 6):
        rows = directions[:k]
        fitted = sum(float((Z @ (m - refit(C, m, rows) @ rows).T).square().sum()) for m in maps) / len(Z)
        assert fitted == pytest.approx(float(squares[k:].sum()), rel=1e-7)
    assert torch.allclose(directions.norm(dim=1), torch.ones(10, dtype=torch.float64))


def test_solve_psd_drops_null_directions() -> None:
    a = torch.diag(torch.tensor([2.0, 1e-20]))
    assert solve_psd(a, torch.tensor([[2.0], [1.0]])).flatten().tolist() == [1.0, 0.0]
