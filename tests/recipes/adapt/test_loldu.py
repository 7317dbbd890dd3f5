"""LoLDU beside scipy's LU."""

import numpy as np
import scipy.linalg
import torch


def test_factors_are_scipys(world, adapted) -> None:
    _, b = adapted(world.make(), "loldu", world.k)
    p, lower, upper = scipy.linalg.lu(world.W.numpy())
    d = np.diag(upper)
    assert np.allclose(b.core.detach().numpy(), d, rtol=1e-4)
    assert np.allclose(b.left.numpy(), p @ lower, atol=1e-5)
    assert np.allclose(b.right.numpy(), upper / d[:, None], rtol=1e-3, atol=1e-4)
    assert np.allclose((b.left * b.core.detach() @ b.right).numpy(), world.W.numpy(), atol=1e-4)


def test_leading_pivots_train_over_an_unchanged_base(world, adapted) -> None:
    model, b = adapted(world.make(), "loldu", 4, alpha=2)
    assert torch.equal(model(world.x), world.make()(world.x))
    assert {k for k, _ in b.named_parameters()} == {"core"}
    y = model(world.x)
    y.square().sum().backward()
    g = (2 * y.detach()).double().T @ world.x.double()
    p, lower, upper = scipy.linalg.lu(world.W.numpy())
    left, right = torch.tensor((p @ lower)[:, :4]), torch.tensor((upper / np.diag(upper)[:, None])[:4])
    want = 0.5 * (left.T @ g @ right.T).diagonal()
    assert torch.allclose(b.core.grad.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    with torch.no_grad():
        b.core.add_(1.0)
    merged = model.merge_and_unload()[0].weight.detach().double()
    assert torch.allclose(merged, world.W + 0.5 * left @ right, atol=1e-4)


def test_cut_pivots_are_no_approximation_and_none_is_taken_away(adapted) -> None:
    """On a matrix without structure the first pivots leave more than there was: the reason why the base is left alone."""
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(96, 64))
    with torch.no_grad():
        layer[0].weight.copy_(torch.randn(64, 96, generator=g))
    before = layer[0].weight.detach().clone()
    model, b = adapted(layer, "loldu", 16, alpha="r")
    assert float((before - b.gain_matrix().detach()).norm() / before.norm()) > 1
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)
