"""ALLoRA against its closed form."""

from __future__ import annotations

import math

import pytest
import torch

import eckart as ek
from eckart.axes import gradient
from eckart.axes.gradient import update_rows
from eckart.errors import UsageError
from eckart.registry import get_recipe


def one_step(world, recipe, make, shake: bool = True, rank: int = 3):
    """(branch, values before, gradients, by how much the factors moved)."""
    model = ek.adapt(world.make(), recipe, rank=rank)
    b = next(m for m in model.modules() if hasattr(m, "eckart_branch")).branch("default")
    if shake:
        with torch.no_grad():
            for p in b.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4)))
    optimizer = make(list(b.parameters()))
    before = {k: p.detach().clone() for k, p in b.named_parameters()}
    rows = b.delta_matrix().detach().double().norm(dim=1)
    model.train()
    with ek.glue(model).begin(optimizer) as glue:
        (model(world.x) - 1).square().mean().backward()
        grads = {k: p.grad.clone() for k, p in b.named_parameters()}
        glue.before_step()
        optimizer.step()
        glue.after_step()
    return before, grads, {k: p.detach() - before[k] for k, p in b.named_parameters()}, rows


def sgd(ps):
    return torch.optim.SGD(ps, lr=0.5)


@pytest.mark.parametrize("when", ["update", "gradient"])
@pytest.mark.parametrize("base", ["allora", "pissa"])
def test_rows_of_the_left_factor_move_by_their_factor(world, when, base) -> None:
    piece = gradient.RowNorm(eta=3.0, of="product", when=when)
    _, grads, moved, rows = one_step(world, get_recipe(base).with_(gradient=(piece,)), sgd)
    c = 1 / (rows + 1 / 9).sqrt()
    assert torch.allclose(moved["left"].double(), -0.5 * c[:, None] * grads["left"].double(), atol=1e-5)
    assert torch.allclose(moved["right"], -0.5 * grads["right"], atol=1e-6)


def test_rows_of_each_factor(world) -> None:
    before, grads, moved, _ = one_step(world, get_recipe("allora").variant("factor"), sgd)
    for part in ("left", "right"):
        c = 1 / (before[part].double().norm(dim=1) + 1 / 4).sqrt()
        assert torch.allclose(moved[part].double(), -0.5 * c[:, None] * grads[part].double(), atol=1e-5)


def test_under_adam_the_step_is_scaled_and_not_the_gradient(world) -> None:
    def adam(ps):
        return torch.optim.Adam(ps, lr=0.01)

    _, _, moved, rows = one_step(world, "allora", adam)
    c = 1 / (rows + 1 / 4).sqrt()
    assert torch.allclose(moved["left"].abs().double(), (0.01 * c[:, None]).expand_as(moved["left"]), rtol=1e-3)


def test_a_zero_row_steps_eta_times_as_far_and_small_eta_is_plain_lora(world) -> None:
    recipe = get_recipe("allora")
    _, grads, moved, _ = one_step(world, recipe, sgd, shake=False)
    assert torch.allclose(moved["left"], -0.5 * 2.0 * grads["left"], atol=1e-6)
    tiny = recipe.with_(gradient=(gradient.RowNorm(eta=1e-3),))
    _, grads, moved, _ = one_step(world, tiny, lambda ps: torch.optim.SGD([{"params": ps[:1], "lr": 0.5e3}, {"params": ps[1:]}], lr=0.5))
    assert torch.allclose(moved["left"], -0.5 * grads["left"], rtol=1e-3, atol=1e-6)


def test_forward_is_lora_with_scale_one(world, adapted) -> None:
    model, b = adapted(world.make(), "allora", 3)
    with torch.no_grad():
        b.left.normal_(generator=torch.Generator().manual_seed(0))
    w = world.W + b.left.double() @ b.right.double()
    assert torch.allclose(model(world.x).double(), world.x.double() @ w.T + world.bias, atol=1e-4)
    assert b.dropout is None
    assert torch.allclose(update_rows(b).double(), (b.left.double() @ b.right.double()).norm(dim=1), atol=1e-5)


def test_what_cannot_be(world) -> None:
    with pytest.raises(UsageError, match="eta must be positive"):
        gradient.RowNorm(eta=0.0)
    assert math.isclose(gradient.RowNorm().eta, 2.0)
    with pytest.raises(UsageError, match="no rows of outputs to scale"):
        ek.adapt(world.make(), "soka", rank=2, glue=["allora"])
