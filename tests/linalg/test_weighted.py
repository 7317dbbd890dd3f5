"""The weighted closed forms against float64 brute force: gradient-free optima, normal equations, and inverse-form textbook formulas."""

import pytest
import torch

from eckart.errors import Refused
from eckart.linalg import weighted
from eckart.linalg.psd import Lower, Weight, eigh_psd, half, root


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(rows, size, seed, condition=1.0):
    x = rand(rows, size, seed=seed) * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    return x.T @ x / rows


def textbook(w, so, si, rank):
    """So^-1 [So W Si]_r Si^-1 with explicit roots and inverses: valid when both are well conditioned."""
    u, s, vh = torch.linalg.svd(so @ w @ si)
    cut = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return torch.linalg.inv(so) @ cut @ torch.linalg.inv(si), s


def sqrtm(g):
    values, vectors = torch.linalg.eigh(g)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12), (15, 15)])
@pytest.mark.parametrize("sides", ["in", "out", "both"])
def test_equals_the_textbook_formula(m, n, sides) -> None:
    w = rand(m, n, seed=1)
    go = gram(200, m, 2) if sides != "in" else torch.eye(m, dtype=torch.float64)
    gi = gram(200, n, 3) if sides != "out" else torch.eye(n, dtype=torch.float64)
    expected, s = textbook(w, sqrtm(go), sqrtm(gi), 5)
    found = weighted.solve(w, Weight(go) if sides != "in" else None, Weight(gi) if sides != "out" else None, rank=5)
    assert torch.allclose(found.left @ found.right, expected, atol=1e-9)
    assert torch.allclose(found.spectrum[:5], s[:5], rtol=1e-9)


@pytest.mark.parametrize("sides", ["in", "out", "both"])
def test_loss_equals_the_tail_and_no_perturbation_is_better(sides) -> None:
    w = rand(10, 14, seed=4)
    go, gi = gram(300, 10, 5), gram(300, 14, 6)
    so = sqrtm(go) if sides != "in" else torch.eye(10, dtype=torch.float64)
    si = sqrtm(gi) if sides != "out" else torch.eye(14, dtype=torch.float64)
    best = weighted.solve(w, Weight(go) if sides != "in" else None, Weight(gi) if sides != "out" else None, rank=4)

    def loss(left, right):
        return float((so @ (w - left @ right) @ si).square().sum())

    tail = float(weighted.spectrum(w, Weight(go) if sides != "in" else None, Weight(gi) if sides != "out" else None)[4:].square().sum())
    reached = loss(best.left, best.right)
    assert reached == pytest.approx(tail, rel=1e-9)
    for seed in range(20):
        step = 1e-3 * rand(10, 4, seed=seed), 1e-3 * rand(4, 14, seed=seed + 50)
        assert loss(best.left + step[0], best.right + step[1]) >= reached


def test_alternating_least_squares_finds_nothing_better() -> None:
    w, g = rand(8, 12, seed=7), gram(100, 12, 8)
    best = weighted.solve(w, into=Weight(g), rank=3)
    si = sqrtm(g)
    reached = float(((w - best.left @ best.right) @ si).square().sum())
    for seed in range(5):
        left = rand(8, 3, seed=seed)
        for _ in range(300):  # each half is an exact least-squares solution
            right = torch.linalg.lstsq(left, w).solution
            left = torch.linalg.lstsq((right @ g @ right.T).T, (w @ g @ right.T).T).solution.T
        assert float(((w - left @ right) @ si).square().sum()) >= reached * (1 - 1e-9)


def test_fewer_tokens_than_features_needs_no_jitter() -> None:
    w, x = rand(30, 40, seed=9), rand(15, 40, seed=10)
    found = weighted.solve(w, into=Weight(x.T @ x), rank=15)
    assert float((x @ (w - found.left @ found.right).T).norm()) < 1e-9 * float((x @ w.T).norm())
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(x.T @ x)  # what a Cholesky-based method would meet


def test_extreme_condition_keeps_the_optimum() -> None:
    w = rand(64, 96, seed=11)
    x = rand(500, 96, seed=12) * torch.logspace(0, -6, 96, dtype=torch.float64)
    s = torch.linalg.svdvals(w @ sqrtm(x.T @ x))
    found = weighted.solve(w, into=Weight(x.T @ x), rank=8)
    loss = float((x @ (w - found.left @ found.right).T).square().sum())
    assert loss == pytest.approx(float(s[8:].square().sum()), rel=1e-6)


@pytest.mark.parametrize("rows", [15, 200])
def test_a_side_alone_takes_any_root(rows) -> None:
    """Its square is the moment, whether or not there is a Cholesky factor, and the cut is that of the symmetric root."""
    x, w = rand(rows, 40, seed=30) * torch.logspace(0, -5, 40, dtype=torch.float64), rand(30, 40, seed=31)
    g = x.T @ x
    s = half(Weight(g)).apply(torch.eye(40, dtype=torch.float64))
    assert isinstance(half(Weight(g)), Lower) == (rows == 200)
    assert torch.allclose(s.T @ s, g, atol=1e-12 * float(g.diagonal().max()))
    assert torch.allclose(half(Weight((g, g))).apply(torch.eye(80, dtype=torch.float64))[40:, 40:], s)
    u, sigma, _ = torch.linalg.svd(w @ sqrtm(g), full_matrices=False)
    found = weighted.solve(w, into=Weight(g), rank=6)
    assert torch.allclose(found.spectrum[:6], sigma[:6], rtol=1e-9)
    assert torch.allclose(found.left @ found.right @ x.T, u[:, :6] @ (u[:, :6].T @ w) @ x.T, atol=1e-8 * float(sigma[0]))
    for other in (Weight(g, power=1.0), Weight(g, clamp=1e-4), Weight(g.diagonal())):
        assert not isinstance(half(other), Lower)


def test_identity_metrics_are_plain_svd() -> None:
    w = rand(9, 13, seed=13)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    found = weighted.solve(w, Weight(torch.ones(9, dtype=torch.float64)), Weight(torch.eye(13, dtype=torch.float64)), rank=4)
    assert torch.allclose(found.left @ found.right, (u[:, :4] * s[:4]) @ vh[:4], atol=1e-12)


def test_power_one_is_the_corda_metric() -> None:
    w, g = rand(7, 11, seed=14), gram(100, 11, 15)
    u, s, vh = torch.linalg.svd(w @ g, full_matrices=False)
    expected = (u[:, :3] * s[:3]) @ vh[:3] @ torch.linalg.inv(g)
    found = weighted.solve(w, into=Weight(g, power=1.0), rank=3)
    assert torch.allclose(found.left @ found.right, expected, atol=1e-8)


def test_the_better_conditioned_side_is_inverted_and_the_clamp_reported() -> None:
    w = rand(8, 8, seed=16)
    good, bad = gram(100, 8, 17), gram(100, 8, 18, condition=1e5)
    assert weighted.solve(w, Weight(good), Weight(bad), rank=2).record["inverted"] == "out"
    assert weighted.solve(w, Weight(bad), Weight(good), rank=2).record["inverted"] == "in"
    clamped = weighted.solve(w, Weight(bad, clamp=1e-2), Weight(good), rank=2).record
    values = torch.linalg.eigvalsh(bad)
    assert clamped["raised"]["out"] == int((values < 1e-2 * values.max()).sum()) > 0


def test_two_singular_sides_are_refused() -> None:
    x = rand(3, 8, seed=19)
    with pytest.raises(Refused, match="both metrics are singular"):
        weighted.solve(
            rand(8, 8, seed=20),
            Weight(torch.diag(torch.tensor([1.0] * 7 + [0.0]))),
            Weight(torch.diag(torch.tensor([1.0] * 7 + [0.0]))),
            rank=2,
        )
    assert eigh_psd(x.T @ x)[0].min() >= 0


@pytest.mark.parametrize("zero", [torch.zeros(8), torch.zeros(8, 8), (torch.eye(3), torch.zeros(5))])
@pytest.mark.parametrize("side", ["out", "into"])
def test_a_zero_metric_beside_a_singular_one_is_not_sent_to_a_clamp(zero, side) -> None:
    sides = {"out": Weight(torch.tensor([1.0] * 7 + [0.0])), "into": Weight(torch.tensor([1.0] * 7 + [0.0]))}
    sides[side] = Weight(zero, clamp=1e-4, name="layer: gradients")
    with pytest.raises(Refused, match=r"^layer: gradients: zero on all calibration texts") as caught:
        weighted.solve(rand(8, 8, seed=20), **sides, rank=2)
    assert "clamp" not in str(caught.value)


@pytest.mark.parametrize("bad", [torch.full((4,), float("nan")), -torch.ones(4), torch.full((4, 4), float("inf"))])
def test_metrics_that_are_not_metrics_are_refused(bad) -> None:
    with pytest.raises(Refused, match="w: input"):
        root(Weight(bad, name="w: input"))


def test_a_metric_of_the_wrong_size_is_named() -> None:
    with pytest.raises(Refused, match=r"metric: the metric has size 5, the matrix \(4, 6\) wants 6"):
        weighted.solve(rand(4, 6), into=Weight(torch.ones(5)), rank=2)


def test_truncating_equals_solving_again() -> None:
    w, g = rand(20, 24, seed=21), gram(100, 24, 22)
    wide = weighted.solve(w, into=Weight(g), rank=12, method="gram")
    narrow = weighted.solve(w, into=Weight(g), rank=5, method="gram")
    cut = wide.truncate(5)
    assert torch.allclose(cut.left @ cut.right, narrow.left @ narrow.right, atol=1e-10)
