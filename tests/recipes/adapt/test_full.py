"""Full fine-tuning beside a weight, against training the weight itself."""

from __future__ import annotations

import torch

import eckart as ek


def test_the_update_trains_as_the_weight_itself_would(world) -> None:
    y = torch.randn(50, world.shape[0], generator=torch.Generator().manual_seed(5))
    ours, plain = ek.adapt(world.make(), "full").train(), world.make()
    plain[0].bias.requires_grad_(False)
    for model in (ours, plain):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        for _ in range(10):
            optimizer.zero_grad()
            (model(world.x) - y).square().mean().backward()
            optimizer.step()
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == world.W.numel()
    assert not torch.allclose(plain[0].weight, world.make()[0].weight, atol=1e-3)
    assert torch.allclose(ours.merge_and_unload()[0].weight, plain[0].weight, atol=2e-5)


def test_layers_of_every_kind(world) -> None:
    conv = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    model = ek.adapt(conv, "full", target=["0"])
    layer = next(m for m in model.modules() if hasattr(m, "eckart_branch"))
    with torch.no_grad():
        layer.branch("default").whole.normal_(generator=torch.Generator().manual_seed(1))
        want = torch.nn.functional.conv2d(
            x, conv[0].base_layer.weight + layer.branch("default").whole.reshape(6, 2, 3, 3), conv[0].base_layer.bias, groups=2
        )
        assert torch.allclose(model(x), want, atol=1e-5)
        assert torch.allclose(model.merge_and_unload()(x), want, atol=1e-5)
