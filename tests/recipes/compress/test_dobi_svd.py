"""Dobi-SVD: the soft cut by hand, its gradient, ranks that go where the loss is, and the cut that is then made."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eckart as ek
from eckart.nn.ordered import SoftCutLinear

G = torch.Generator().manual_seed(0)


class Two(nn.Module):
    """The sum of two linear maps of which the second hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.faint = nn.Linear(24, 20, bias=False), nn.Linear(24, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(x) + 1e-3 * self.faint(x)


@pytest.mark.parametrize("position", [-0.5, 1.3, 2.0, 5.0])
def test_the_soft_cut_is_the_papers(position) -> None:
    up, down = torch.randn(5, 4, generator=G), torch.randn(4, 6, generator=G)
    x = torch.randn(3, 6, generator=G)
    mask = 0.5 * np.tanh(10 * (position - np.arange(4))) + 0.5
    want = (x.double().numpy() @ down.double().numpy().T * mask) @ up.double().numpy().T
    assert np.allclose(SoftCutLinear(up, down, None, position)(x).detach().double().numpy(), want, atol=1e-5)


def test_its_gradient_is_that_of_finite_differences() -> None:
    up, down, x = (torch.randn(s, generator=G, dtype=torch.float64) for s in ((5, 4), (4, 6), (7, 6)))

    def loss(position: float) -> Tensor:
        layer = SoftCutLinear(up, down, None, 0.0)
        layer.places = layer.places.double()
        layer.position = nn.Parameter(torch.tensor(position, dtype=torch.float64))
        out = layer(x).square().sum()
        out.backward()
        return torch.stack([out.detach(), layer.position.grad])

    h = 1e-6
    slope = (loss(1.9 + h)[0] - loss(1.9 - h)[0]) / (2 * h)
    assert loss(1.9)[1] == pytest.approx(slope.item(), rel=1e-5)


def test_ranks_go_where_the_loss_is_and_fit_the_budget() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Two()
    calib = [torch.randn(32, 24, generator=G) for _ in range(4)]
    # at the published weight of 10 the distance to the budget outweighs the loss of so small a net
    made = ek.compress(net, "dobi_svd", 0.5, calib=calib, settings=["allocate.weight=0.1"])
    ranks = {j.name: j.rank for j in made.plan.jobs}
    even = int(0.5 * 24 * 20 / 44)
    assert ranks["loud"] is None or ranks["loud"] > even
    assert ranks["faint"] < even
    assert made.plan.after <= 0.5 * made.plan.before


def test_the_cut_is_the_best_one_for_the_layers_output() -> None:
    net = nn.Sequential(nn.Linear(16, 12, bias=False))
    x = torch.randn(300, 16, generator=G) @ torch.randn(16, 16, generator=G)
    made = ek.compress(net, "dobi_svd", 0.4, calib=[x], settings=["allocate.steps=3"])
    (job,) = made.plan.jobs
    w, data = net[0].weight.detach().double().numpy(), x.double().numpy()
    s = np.linalg.svd(data @ w.T, compute_uv=False)
    gap = data @ (w - made.model[0].dense_weight().detach().double().numpy()).T
    assert np.linalg.norm(gap) == pytest.approx(np.sqrt((s[job.rank :] ** 2).sum()), rel=1e-4)
