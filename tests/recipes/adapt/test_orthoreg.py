"""OrthoReg against the dense formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

import eckart as ek
from eckart.axes import penalty
from eckart.registry import get_recipe


def dense(update: torch.Tensor) -> torch.Tensor:
    m, n = update.shape
    gram = update @ update.T if m <= n else update.T @ update
    return (gram - torch.eye(min(m, n), dtype=update.dtype)).norm()


def penalised(model, piece) -> float:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with ek.glue(model).begin(optimizer) as glue:
        training = glue.trainings["default"]
        value = float(piece.value(training).detach())
        piece.before_step(training)
    return value


def test_the_squared_norm(world) -> None:
    model = ek.adapt(world.make(), "full")
    b = next(m for m in model.modules() if hasattr(m, "eckart_branch")).branch("default")
    with torch.no_grad():
        b.whole.copy_(torch.randn(b.whole.shape, generator=torch.Generator().manual_seed(1)))
    update = b.whole.detach().double().requires_grad_()
    (want := dense(update) ** 2).backward()
    assert penalised(model, penalty.UnitUpdate(norm="fro2")) == pytest.approx(float(want.detach()), rel=1e-4)
    assert torch.allclose(b.whole.grad.double(), update.grad, rtol=1e-3, atol=1e-4 * float(update.grad.abs().max()))


@pytest.mark.parametrize("base", ["lora", "pissa", "sorsa", "full"])
def test_value_and_gradient_are_those_of_the_dense_update(world, base) -> None:
    model = ek.adapt(world.make(), base, rank=None if base == "full" else 4)
    b = next(m for m in model.modules() if hasattr(m, "eckart_branch")).branch("default")
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    t = {k: v.detach().double().requires_grad_(k in b.trained()) for k, v in b.parts().items()}
    if base == "full":
        update = t["whole"]
    else:
        core = t["core"] if base == "sorsa" else torch.ones(4).double()
        update = b.scale * (t["left"] * core) @ t["right"]
        if base != "lora":
            first = t["initial_core"] if base == "sorsa" else torch.ones(4).double()
            update = update - b.scale * (t["initial_left"] * first) @ t["initial_right"]
    want = dense(update)
    (0.7 * want).backward()
    found = penalised(model, penalty.UnitUpdate(weight=0.7, smooth=0.0))
    assert found == pytest.approx(0.7 * float(want.detach()), rel=1e-4)
    for k, p in b.trained().items():
        assert torch.allclose(p.grad.double(), t[k].grad, rtol=1e-3, atol=1e-4 * float(t[k].grad.abs().max()))


def test_a_zero_update_is_not_moved(world) -> None:
    model = ek.adapt(world.make(), "orthoreg", rank=4)
    piece = penalty.UnitUpdate(weight=1.0, smooth=0.0)
    assert penalised(model, piece) == pytest.approx(math.sqrt(world.k), rel=1e-6)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_floor_of_a_rank_is_reached_at_unit_singular_values(world) -> None:
    model = ek.adapt(world.make(), "orthoreg", rank=4)
    b = next(m for m in model.modules() if hasattr(m, "eckart_branch")).branch("default")
    m, n = world.shape
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        b.left.copy_(torch.linalg.qr(torch.randn(m, 4, generator=g))[0] / b.scale)
        b.right.copy_(torch.linalg.qr(torch.randn(n, 4, generator=g))[0].T)
    floor = penalised(model, penalty.UnitUpdate(smooth=0.0))
    assert floor == pytest.approx(math.sqrt(world.k - 4), rel=1e-5)
    assert max(float(p.grad.abs().max()) for p in b.parameters()) < 1e-5
    with torch.no_grad():
        turn = torch.linalg.qr(torch.randn(m, m, generator=g))[0]
        b.left.copy_(turn @ b.left)
    assert penalised(model, penalty.UnitUpdate(smooth=0.0)) == pytest.approx(floor, rel=1e-5)
    with torch.no_grad():
        b.left.mul_(1.3)
    assert penalised(model, penalty.UnitUpdate(smooth=0.0)) > floor


def test_a_perfect_fit_gives_no_gradient_but_zero() -> None:
    """At full rank the norm itself has none there."""
    model = ek.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)), "full")
    b = next(m for m in model.modules() if hasattr(m, "eckart_branch")).branch("default")
    with torch.no_grad():
        b.whole.copy_(torch.eye(4))
    assert penalised(model, get_recipe("orthoreg").penalty[0]) == 0.0
    assert not b.whole.grad.any()


def test_weight_zero_is_plain_training(world) -> None:
    none = get_recipe("orthoreg").with_(penalty=(penalty.UnitUpdate(weight=0.0),))
    model = ek.adapt(world.make(), none, rank=4)
    penalised(model, none.penalty[0])
    assert all(p.grad is None for p in model.parameters())
