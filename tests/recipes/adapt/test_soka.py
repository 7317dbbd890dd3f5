"""SoKA: numpy's Kronecker products, Van Loan's optimum by tensor entries, and the knee by hand."""

import numpy as np
import pytest
import torch
from torch import nn

import eckart as ek
from eckart.axes import allocate
from eckart.axes.kron import elbow
from eckart.axes.protocols import Budget, Cost
from eckart.errors import UsageError
from eckart.registry import get_recipe


def kron_svd(w: np.ndarray, m1: int, n1: int):
    """W's entries by the four indices, entry by entry, and numpy's SVD of that table."""
    m2, n2 = w.shape[0] // m1, w.shape[1] // n1
    table = np.zeros((m1 * n1, m2 * n2))
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            table[(i // m2) * n1 + j // n2, (i % m2) * n2 + j % n2] = w[i, j]
    return np.linalg.svd(table, full_matrices=False)


def test_start_is_the_best_sum_and_the_rest_is_its_tail(world, adapted) -> None:
    model, b = adapted(world.make(), "soka", 3)
    (m1, n1), (m2, n2) = b.outer.shape[1:], b.inner.shape[1:]
    u, s, vh = kron_svd(world.W.numpy(), m1, n1)
    want = sum(s[k] * np.kron(u[:, k].reshape(m1, n1), vh[k].reshape(m2, n2)) for k in range(3))
    gain = b.gain_matrix().detach().double().numpy()
    assert np.allclose(gain, want, atol=1e-5)
    assert np.linalg.norm(world.W.numpy() - gain) == pytest.approx(np.sqrt((s[3:] ** 2).sum()), rel=1e-5)
    assert torch.allclose(b.outer.detach().flatten(1).norm(dim=1), b.inner.detach().flatten(1).norm(dim=1), rtol=1e-4)
    assert torch.equal(model(world.x), world.make()(world.x))
    assert sum(p.numel() for p in b.parameters()) == 3 * (m1 * n1 + m2 * n2)


def test_products_are_applied_without_being_formed(world, adapted) -> None:
    model, b = adapted(world.make(), "soka", 3)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    now = sum(np.kron(x, y) for x, y in zip(b.outer.detach().double().numpy(), b.inner.detach().double().numpy(), strict=True))
    then = sum(np.kron(x, y) for x, y in zip(b.initial_outer.double().numpy(), b.initial_inner.double().numpy(), strict=True))
    want = world.W.numpy() + now - then
    y = model(world.x).detach().double().numpy()
    assert np.allclose(y, world.x.double().numpy() @ want.T + world.bias.numpy(), atol=1e-4)
    update = np.linalg.svd(now - then, compute_uv=False)
    assert (update > 1e-6 * update[0]).sum() > 2 * 3  # few numbers, high rank


def test_more_products_than_there_are_is_all_of_them() -> None:
    net = nn.Sequential(nn.Linear(16, 4))  # ((2, 4), (2, 4)): 8 at most, of rank 4
    wide = ek.adapt(net, "soka", rank=4)
    assert wide.base_model.model[0].branch("default").rank == 4
    prime = nn.Sequential(nn.Linear(23, 29))
    weight = prime[0].weight.detach().clone()
    b = ek.adapt(prime, "soka", rank=5).base_model.model[0].branch("default")
    u, s, vh = torch.linalg.svd(weight)
    assert torch.allclose(b.gain_matrix(), (u[:, :5] * s[:5]) @ vh[:5], atol=1e-5)  # of primes it is PiSSA


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2), nn.Embedding(12, 6)])
def test_convolutions_and_embeddings(layer) -> None:
    net = nn.Sequential(layer)
    x = (
        torch.tensor([[1, 5], [11, 0]])
        if isinstance(layer, nn.Embedding)
        else torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    )
    with torch.no_grad():
        before = net(x)
        model = ek.adapt(net, "soka", rank=2, target=["0"])
        assert torch.allclose(model(x), before, atol=1e-6)
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
        want = model(x)
        assert not torch.allclose(want, before, atol=1e-3)
        assert torch.allclose(model.merge_and_unload()(x), want, atol=1e-5)


def test_the_knee_or_the_energy() -> None:
    steep = [100.0, 81.0, 1.0, 0.81, 0.64, 0.49]  # squares of 10, 9, 1, .9, .8, .7
    line = [36.0, 25.0, 16.0, 9.0, 4.0, 1.0]
    costs = {n: Cost(dense=100, per_rank=10, full=6) for n in ("steep", "line")}
    found = allocate.Elbow()({"steep": steep, "line": line}, costs, Budget(energy=0.9))
    assert found == {"steep": 2, "line": 4}  # 36 + 25 + 16 is .846 of 91, with 9 it is .945
    assert allocate.Elbow()({"steep": steep, "line": line}, costs, Budget(energy=0.5)) == {"steep": 1, "line": 2}
    assert allocate.Elbow()({}, costs, Budget(rank=3)) == {"steep": 3, "line": 3}
    assert elbow([1.0, 1.0, 1.0]) is elbow([]) is elbow([2.0, 1.0]) is None
    assert elbow([5.0, 0.0, 0.0, 0.0]) == 1


def test_axes_that_do_not_fit_are_told_apart() -> None:
    from eckart.axes import form, metric

    with pytest.raises(UsageError, match="form=kron needs 'kronecker'.*factor=kronecker"):
        get_recipe("pissa").with_(form=form.Kron(), roles={})
    with pytest.raises(UsageError, match="needs 'kron'.*form=kron"):
        get_recipe("soka").with_(form=form.Branch(), roles={})
    recipe = get_recipe("soka").with_(metric=metric.InputGram())
    with pytest.raises(UsageError, match="takes the matrix as it is"):
        ek.adapt(nn.Sequential(nn.Linear(6, 6)), recipe, rank=2, calib=[torch.randn(8, 6)])
