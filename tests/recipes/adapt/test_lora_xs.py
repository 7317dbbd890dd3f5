"""LoRA-XS: frozen factors with the singular values on the input side, and one small matrix that trains."""

import torch


def test_factors_of_the_released_initialisation(world, adapted) -> None:
    _, b = adapted(world.make(), "lora_xs", 4)
    assert torch.allclose(b.left.T @ b.left, torch.eye(4), atol=1e-5)
    assert torch.allclose((b.right @ b.right.T).diagonal().double(), world.S[:4].square(), rtol=1e-4)
    assert torch.allclose((b.left @ b.right).double(), world.U[:, :4] * world.S[:4] @ world.Vh[:4], atol=1e-5)
    assert 0.2e-5 < b.core.std() < 5e-5
    assert {k for k, _ in b.named_parameters()} == {"core"}
    assert b.core.numel() == 16


def test_output_moves_by_the_draw_alone(world, adapted) -> None:
    model, b = adapted(world.make(), "lora_xs", 4)
    before = world.make()(world.x)
    limit = 1e-5 * 6 * float(b.left.norm() * b.right.norm()) * float(world.x.norm(dim=1).max())
    assert (model(world.x) - before).abs().max() < limit


def test_gradient_of_the_core(world, adapted) -> None:
    model, b = adapted(world.make(), "lora_xs", 4, alpha=8)
    y = model(world.x)
    y.sum().backward()
    want = 2.0 * b.left.double().T @ torch.ones_like(y).double().T @ (world.x.double() @ b.right.double().T)
    assert torch.allclose(b.core.grad.double(), want, rtol=1e-4, atol=1e-3)
