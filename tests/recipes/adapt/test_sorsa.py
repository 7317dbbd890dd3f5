"""SORSA: the split of the paper, and its penalty's gradient by hand."""

import math

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
