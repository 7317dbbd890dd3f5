"""SORSA: the split of the paper, and its penalty's gradient by hand."""

import math

import numpy as np
import torch

import eckart as ek


def test_begins_with_singular_vectors_and_values(world, adapted) -> None:
    _, b = adapted(world.make(), "sorsa", 5)
    assert torch.allclose(b.core.double(), world.S[:5], atol=1e-5)
    assert torch.allclose(b.left.T @ b.left, torch.eye(5), atol=1e-5)
    assert torch.allclose(b.right @ b.right.T, torch.eye(5), atol=1e-5)
    assert {k for k, _ in b.named_parameters()} == {"left", "core", "right"}
    assert b.scale == 1.0


def test_without_penalty_it_spans_what_pissa_spans(world, adapted, angles) -> None:
    _, sorsa = adapted(world.make(), "sorsa", 5)
    _, pissa = adapted(world.make(), "pissa", 5)
    assert torch.allclose(sorsa.gain_matrix(), pissa.gain_matrix(), atol=1e-5)
    assert angles(sorsa.left, pissa.left).max() < 1e-4


def test_added_gradient_is_gamma_over_peak_rate_times_the_mean(world, adapted) -> None:
    model, b = adapted(world.make(), "sorsa", 3)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        b.left += 0.1 * torch.randn(b.left.shape, generator=g)
        b.right += 0.1 * torch.randn(b.right.shape, generator=g)
    optimizer = torch.optim.SGD(b.parameters(), lr=0.02)
    left, right = b.left.detach().double(), b.right.detach().double()

    def gradient(t: torch.Tensor) -> torch.Tensor:
        """Of the Frobenius norm of t t^T - I, smoothed by 1e-3."""
        off = t @ t.T - torch.eye(len(t), dtype=torch.float64)
        return 2 * off @ t / math.sqrt(float(off.square().sum()) + 1e-6)

    with ek.glue(model).begin(optimizer) as glue:
        model(world.x).sum().backward()
        task = {k: p.grad.clone().double() for k, p in b.named_parameters()}
        glue.before_step()
    factor = 4e-4 / 0.02 / 2  # two factors in all
    assert torch.allclose(b.left.grad.double(), task["left"] + factor * gradient(left.T).T, rtol=1e-4, atol=1e-4)
    assert torch.allclose(b.right.grad.double(), task["right"] + factor * gradient(right), rtol=1e-4, atol=1e-4)
    assert torch.equal(b.core.grad.double(), task["core"])
    assert not torch.allclose(b.left.grad.double(), task["left"], atol=1e-4)


def test_orthonormal_factors_are_not_pushed_along_rounding_noise(world, adapted) -> None:
    model, b = adapted(world.make(), "sorsa", 3)
    optimizer = torch.optim.SGD(b.parameters(), lr=1.0)
    with ek.glue(model).begin(optimizer) as glue:
        glue.before_step()
    # the bare norm has a gradient of norm 2 here, times gamma / 2
    assert b.left.grad.norm() < 0.05 * 4e-4


def test_penalty_alone_draws_factors_towards_orthonormal_ones(world, adapted) -> None:
    model, b = adapted(world.make(), "sorsa", 3)
    with torch.no_grad():
        b.left.mul_(1.2)
    optimizer = torch.optim.SGD(b.parameters(), lr=1e-2)
    with ek.glue(model).begin(optimizer) as glue:
        for _ in range(200):
            optimizer.zero_grad()
            glue.before_step()
            optimizer.step()
            glue.after_step()
    assert (b.left.T @ b.left - torch.eye(3)).norm() < 0.9 * (1.44 - 1) * math.sqrt(3)


def test_in_a_metric_it_trains_the_kept_parts_own_triples_whatever_the_unit_of_the_inputs(world, adapted) -> None:
    """Else the core has the metric's unit, and a step of the optimiser on the right factor moves the weight by that unit."""
    recipe = ek.registry.get_recipe("sorsa").with_(metric=ek.registry.get_recipe("corda").metric)
    w = world.W.numpy()
    x = 300 * world.x.double().numpy() * np.logspace(0, -2, world.shape[1])
    gram = x.T @ x / len(x)
    gram += 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    u = np.linalg.svd(w @ gram)[0][:, :4]
    part = u @ u.T @ w
    values = np.linalg.svd(part, compute_uv=False)[:4]
    model, b = adapted(world.make(), recipe, 4, calib=[torch.tensor(x).float()])
    assert np.allclose(b.core.detach().numpy(), values, rtol=1e-4)
    assert torch.allclose(b.left.T @ b.left, torch.eye(4), atol=1e-5)
    assert torch.allclose(b.right @ b.right.T, torch.eye(4), atol=1e-5)
    assert np.allclose(b.gain_matrix().detach().numpy(), part, atol=1e-4)
    penalty = recipe.penalty[0]
    assert penalty.of("left", b.left) + penalty.of("right", b.right) < 1e-3
    assert torch.equal(model(world.x), world.make()(world.x))


def test_a_metric_on_a_matrix_of_lower_rank_than_asked_for(adapted) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 6))
    with torch.no_grad():
        layer[0].weight.copy_(torch.outer(torch.arange(1.0, 7.0), torch.ones(8)))
    recipe = ek.registry.get_recipe("sorsa").with_(metric=ek.registry.get_recipe("corda").metric)
    _, b = adapted(layer, recipe, 3, calib=[torch.randn(40, 8, generator=torch.Generator().manual_seed(0))])
    assert torch.allclose(b.gain_matrix(), torch.outer(torch.arange(1.0, 7.0), torch.ones(8)), atol=1e-4)
    assert b.core[1:].abs().max() < 1e-4
    for gram in (b.left.T @ b.left, b.right @ b.right.T):
        assert torch.allclose(gram, torch.eye(3), atol=1e-4)
