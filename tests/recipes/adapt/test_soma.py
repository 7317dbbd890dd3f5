"""SoMA: the tail of numpy's SVD, with the bias; turned round it is PiSSA."""

import pytest
import torch

from eckart.axes import filter as filters
from eckart.registry import get_recipe


def test_branch_is_the_tail(world, adapted) -> None:
    _, b = adapted(world.make(), "soma", 4)
    tail = (world.U[:, -4:] * world.S[-4:]) @ world.Vh[-4:]
    assert torch.allclose(b.gain_matrix().double(), tail, atol=1e-5)
    assert float(b.gain_matrix().detach().norm()) == pytest.approx(float(world.S[-4:].norm()), rel=1e-4)
    assert torch.allclose((b.right @ b.right.T).diagonal().double(), world.S[-4:], rtol=1e-3)


def test_the_other_end_is_pissa(world, adapted) -> None:
    turned = get_recipe("soma").with_(filter=filters.Top())
    _, a = adapted(world.make(), turned, 4)
    _, b = adapted(world.make(), "pissa", 4)
    # both from one decomposition, of which one run needs all triples and the other four
    assert torch.allclose(a.gain_matrix(), b.gain_matrix(), atol=1e-5)
    assert torch.allclose(a.left.abs(), b.left.abs(), atol=1e-4)


def test_bias_trains_from_zero_and_merges(world, adapted) -> None:
    model, b = adapted(world.make(), "soma", 4)
    assert b.bias.shape == (world.shape[0],)
    assert not b.bias.any()
    with torch.no_grad():
        b.bias.fill_(0.5)
    before = world.make()
    assert torch.allclose(model(world.x), before(world.x) + 0.5, atol=1e-5)
    assert torch.allclose(model.merge_and_unload()[0].bias, before[0].bias + 0.5)


def test_rank_deficient_weights_begin_with_a_gradient(adapted) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(12, 10))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer[0].weight.copy_(torch.randn(10, 2, generator=g) @ torch.randn(2, 12, generator=g))
    x = torch.randn(30, 12, generator=g)
    want = layer(x).detach()
    model, b = adapted(layer, "soma", 4)
    assert torch.equal(model(x), want)
    model(x).square().sum().backward()
    assert b.left.grad.norm(dim=0).min() > 0
    assert b.right.grad.norm(dim=1).min() > 0
