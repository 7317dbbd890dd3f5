"""SVFit: only singular values move, and their gradient is u^T G v."""

import pytest
import torch


def test_gradient_of_each_singular_value(world, adapted) -> None:
    model, b = adapted(world.make(), "svfit", 6)
    y = model(world.x)
    y.square().sum().backward()
    g = (2 * y.detach()).double().T @ world.x.double()  # dL/dW
    u, v = b.left.double(), b.right.double()
    want = torch.stack([u[:, i] @ g @ v[i] for i in range(6)])
    assert torch.allclose(b.core.grad.double(), want, rtol=1e-4, atol=1e-4)
    assert {k for k, _ in b.named_parameters()} == {"core"}


def test_merged_weight_has_the_moved_singular_values(world, adapted) -> None:
    model, b = adapted(world.make(), "svfit", 6)
    move = torch.linspace(0.5, -0.3, 6)
    with torch.no_grad():
        b.core.copy_(move)
    merged = model.merge_and_unload()[0].weight.detach().double()
    want = world.S.clone()
    want[:6] += move.double()
    assert torch.allclose(torch.linalg.svdvals(merged), want.abs().sort(descending=True).values, atol=1e-5)


def test_rank_holds_99_percent_of_the_energy(world, adapted) -> None:
    model, b = adapted(world.make(), "svfit")
    square = world.S.square()
    want = int((square.cumsum(0) < 0.99 * square.sum()).sum()) + 1
    assert b.rank == want == model.peft_config["default"].ranks["0"]


def test_full_rank_is_every_singular_value(world, adapted) -> None:
    _, b = adapted(world.make(), "svfit", world.k)
    assert sum(p.numel() for p in b.parameters()) == world.k
    assert torch.allclose(b.left @ torch.diag(world.S.float()) @ b.right, world.W.float(), atol=1e-4)


def test_weight_decay_draws_to_the_pretrained_weight(world, adapted) -> None:
    model, b = adapted(world.make(), "svfit", 6)
    with torch.no_grad():
        b.core.fill_(1.0)
    optimizer = torch.optim.AdamW(b.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        (0 * model(world.x)).sum().backward()
        optimizer.step()
    assert torch.allclose(model(world.x), world.make()(world.x), atol=1e-2)


@pytest.mark.parametrize("rank", [1, 3])
def test_zero_singular_values_still_have_directions(adapted, rank) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5))
    torch.nn.init.zeros_(layer[0].weight)
    model, b = adapted(layer, "svfit", rank)
    model(torch.randn(4, 6)).sum().backward()
    assert torch.allclose(b.left.T @ b.left, torch.eye(rank), atol=1e-5)
    assert torch.allclose(b.right @ b.right.T, torch.eye(rank), atol=1e-5)
    assert b.core.grad.abs().min() > 0
