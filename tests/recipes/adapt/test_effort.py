"""Effort: the last triple of numpy's SVD trains, its gradients by the chain rule, and the frozen part keeps its bits."""

import torch


def test_the_last_triple(world, adapted) -> None:
    _, b = adapted(world.make(), "effort")
    tail = world.S[-1] * torch.outer(world.U[:, -1], world.Vh[-1])
    assert torch.allclose(b.gain_matrix().detach().double(), tail, atol=1e-5)
    assert torch.allclose(b.core.detach().double(), world.S[-1:], rtol=1e-3)
    assert sum(p.numel() for p in b.parameters()) == sum(world.shape) + 1


def test_gradients_of_value_and_vectors(world, adapted) -> None:
    model, b = adapted(world.make(), "effort", 2)
    y = model(world.x)
    y.square().sum().backward()
    g = (2 * y.detach()).double().T @ world.x.double()
    u, s, v = b.left.detach().double(), b.core.detach().double(), b.right.detach().double()
    for found, want in ((b.left.grad, g @ v.T * s), (b.core.grad, (u.T @ g @ v.T).diagonal()), (b.right.grad, (u.T @ g) * s[:, None])):
        assert torch.allclose(found.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_what_was_learnt_before_stays_in_the_weight(world, adapted) -> None:
    model, b = adapted(world.make(), "effort")
    with torch.no_grad():
        b.left.mul_(0)
    want = (world.U[:, :-1] * world.S[:-1]) @ world.Vh[:-1]
    assert torch.allclose(model.merge_and_unload()[0].weight.detach().double(), want, atol=1e-5)
