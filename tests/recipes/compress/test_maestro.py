"""Maestro: its penalty by hand, and what the paper proves of linear maps: training finds the best rank-b map of the data for every b."""

import numpy as np
import pytest
import torch
from torch import nn

import eckart as ek
from eckart.nn.ordered import OrderedLinear

G = torch.Generator().manual_seed(0)


def test_the_penalty_is_the_norm_of_every_tail_of_both_factors() -> None:
    up, down = torch.randn(6, 4, generator=G), torch.randn(4, 5, generator=G)
    a, b = up.double().numpy(), down.double().numpy()
    want = sum(np.linalg.norm(a[:, i:]) + np.linalg.norm(b[i:]) for i in range(4))
    assert OrderedLinear(up, down, None).lasso().item() == pytest.approx(want, rel=1e-5)


def test_dead_triples_have_no_gradient_and_no_nan() -> None:
    up, down = torch.randn(6, 4, generator=G), torch.randn(4, 5, generator=G)
    up[:, 2:], down[2:] = 0, 0
    layer = OrderedLinear(up, down, None)
    layer.lasso().backward()
    assert torch.isfinite(layer.up.grad).all()
    assert (layer.up.grad[:, 2:] == 0).all()
    assert (layer.down.grad[:2] != 0).all()


def test_training_goes_from_the_svd_of_the_matrix_to_the_best_maps_of_the_data() -> None:
    """On inputs of unequal size the truncated SVD is not the best map of rank b; the best one is known in closed form."""
    net = nn.Sequential(nn.Linear(10, 8, bias=False))
    weight = net[0].weight.detach().clone()
    spread = torch.linspace(0.2, 2.0, 10)
    calib = [torch.randn(64, 10, generator=G) * spread for _ in range(8)]

    def squares(output, batch):
        return (output - batch @ weight.T).square().sum(1)

    data, w = torch.cat(calib).double().numpy(), weight.double().numpy()
    s = np.linalg.svd(data @ w.T, compute_uv=False)
    plain = np.linalg.svd(w)
    how = ["factor.steps=400", "factor.lr=0.01", "factor.lasso=0", "allocate.kind=uniform", "score.kind=predicted_loss"]
    for rank in (2, 4):
        made = ek.compress(net, "maestro", calib=calib, loss=squares, settings=[*how, f"budget.rank={rank}"])
        found = np.linalg.norm(data @ (w - made.model[0].dense_weight().detach().double().numpy()).T)
        best = np.sqrt((s[rank:] ** 2).sum())
        svd = np.linalg.norm(data @ (w - (plain[0][:, :rank] * plain[1][:rank]) @ plain[2][:rank]).T)
        assert svd > 1.1 * best  # there is something to learn
        assert best * (1 - 1e-6) <= found < best + 0.35 * (svd - best)


def test_a_matrix_of_rank_three_keeps_three_triples() -> None:
    net = nn.Sequential(nn.Linear(16, 14, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(14, 3, generator=G) @ torch.randn(3, 16, generator=G))
    calib = [torch.randn(16, 16, generator=G) for _ in range(2)]
    made = ek.compress(net, "maestro", calib=calib, settings=["factor.steps=2", "factor.lr=1e-5", "budget.threshold=1e-3"])
    assert [j.rank for j in made.plan.jobs] == [3]
    assert torch.dist(made.model[0].dense_weight(), net[0].weight) < 1e-2 * net[0].weight.norm()
