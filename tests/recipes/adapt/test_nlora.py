"""NLoRA and IntTune: rows and columns that are reproduced, numpy's pseudoinverse, and the released form by its slices."""

import numpy as np
import pytest
import torch

from eckart.errors import UsageError

BOTH = pytest.mark.parametrize("name", ["nlora", "inttune"])


@BOTH
def test_without_a_ridge_leading_rows_and_columns_are_exact(world, adapted, name) -> None:
    model, b = adapted(world.make(), name, 5, settings=["factor.ridge=0"])
    got = b.gain_matrix().detach().double()
    scale = float(got.abs().max())
    assert torch.allclose(got[:5], world.W[:5], atol=1e-4 * scale)
    assert torch.allclose(got[:, :5], world.W[:, :5], atol=1e-4 * scale)
    want = torch.tensor(np.linalg.pinv(world.W[:5, :5].numpy()))
    assert torch.allclose(b.core.detach().double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    assert torch.equal(model(world.x), world.make()(world.x))


@BOTH
def test_the_ridge_bounds_the_middle(adapted, name) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(16, 16))
    with torch.no_grad():
        layer[0].weight[0, :5] = layer[0].weight[1, :5] + 1e-5  # two rows of the block are all but equal
    block = layer[0].weight[:5, :5].detach().double()
    u, s, vh = np.linalg.svd(block.numpy())
    _, b = adapted(layer, name, 5)
    want = vh.T @ np.diag(s / (s**2 + (0.05 * s[0]) ** 2)) @ u.T
    assert torch.allclose(b.core.detach().double(), torch.tensor(want), rtol=1e-3, atol=1e-4)
    assert float(torch.linalg.matrix_norm(b.core.detach(), 2)) <= 1 / (2 * 0.05 * s[0]) * (1 + 1e-5)
    assert np.linalg.norm(np.linalg.pinv(block.numpy()), 2) > 100 / s[0]


@BOTH
def test_released_form_is_slices_on_an_untouched_base(world, adapted, name) -> None:
    model, b = adapted(world.make(), name, 4, variant="released", alpha=2)
    w = world.W.float()
    assert torch.equal(b.right.detach(), w[:4])
    assert torch.equal(b.left.detach(), w[:, :4])
    assert torch.equal(b.core.detach(), w[:4, :4])
    merged = model.merge_and_unload()[0].weight.detach().double()
    want = world.W + 0.5 * world.W[:, :4] @ world.W[:4, :4] @ world.W[:4]
    assert torch.allclose(merged, want, atol=1e-4)


def test_settings_that_will_not_do(world, adapted) -> None:
    for setting, message in (
        ("factor.ridge=-1", "expected a ridge"),
        ("form.balance=even", "a matrix between its factors"),
        ("form.core.kind=diag", "expected shape"),
    ):
        with pytest.raises(UsageError, match=message):
            adapted(world.make(), "nlora", 4, settings=[setting])


def test_what_trains(world, adapted) -> None:
    _, a = adapted(world.make(), "nlora", 4)
    _, b = adapted(world.make(), "inttune", 4)
    assert {k for k, _ in a.named_parameters()} == {"left", "core", "right"}
    assert {k for k, _ in b.named_parameters()} == {"core"}
    assert sum(p.numel() for p in a.parameters()) == 4 * sum(world.shape) + 16


def test_gradient_of_inttune(world, adapted) -> None:
    model, b = adapted(world.make(), "inttune", 4, alpha=8)
    y = model(world.x)
    y.square().sum().backward()
    g = (2 * y.detach()).double().T @ world.x.double()
    want = 2.0 * world.W[:, :4].T @ g @ world.W[:4].T
    assert torch.allclose(b.core.grad.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_a_budget_of_energy_does_not_cut_a_larger_inverse(world, adapted) -> None:
    """The inverse at rank r is no corner of the inverse at full rank."""
    _, b = adapted(world.make(), "nlora", settings=["budget.energy=0.2", "factor.ridge=0"])
    r = b.rank
    assert 1 < r < world.k
    want = torch.tensor(np.linalg.pinv(world.W[:r, :r].numpy()))
    assert torch.allclose(b.core.detach().double(), want, rtol=1e-2, atol=1e-3 * float(want.abs().max()))
