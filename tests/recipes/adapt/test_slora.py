"""SLoRA: s B N A written out, and LoRA where N is the identity."""

import torch


def test_update_and_first_gradients(world, adapted) -> None:
    model, b = adapted(world.make(), "slora", 4, alpha=8)
    assert torch.equal(model(world.x), world.make()(world.x))
    y = model(world.x)
    y.square().sum().backward()
    g = (2 * y.detach()).double().T @ world.x.double()
    want = 2.0 * g @ (b.core.detach().double() @ b.right.detach().double()).T
    assert torch.allclose(b.left.grad.double(), want, rtol=1e-4, atol=1e-3)
    assert not b.core.grad.any()
    assert not b.right.grad.any()
    with torch.no_grad():
        b.left.fill_(0.1)
    want = 2.0 * b.left.double() @ b.core.double() @ b.right.double()
    merged = model.merge_and_unload()[0].weight.detach().double()
    assert torch.allclose(merged - world.W, want, atol=1e-5)


def test_draws_are_those_of_the_released_code(world, adapted) -> None:
    _, b = adapted(world.make(), "slora", 8)
    assert 0.8 * 8**-0.5 < float(b.core.detach().abs().max()) <= 8**-0.5
    assert float(b.right.detach().abs().max()) <= world.shape[1] ** -0.5
    assert sum(p.numel() for p in b.parameters()) == 8 * sum(world.shape) + 64


def test_with_the_identity_between_it_is_lora(world, adapted) -> None:
    _, a = adapted(world.make(), "slora", 4, settings=["form.core.init=zero"], alpha="2r")
    _, b = adapted(world.make(), "lora", 4, alpha="2r")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        a.core.copy_(torch.eye(4))
        for module in (a, b):
            module.left.copy_(torch.randn(module.left.shape, generator=g.manual_seed(0)))
    assert torch.equal(a.right, b.right)
    assert torch.allclose(a.delta_matrix(), b.delta_matrix(), atol=1e-6)
