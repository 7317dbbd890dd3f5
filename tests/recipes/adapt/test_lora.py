"""Plain LoRA against PEFT's own, with the same numbers in it."""

import torch
from peft import LoraConfig, get_peft_model


def test_begins_at_zero_with_the_bound_of_torch_linear(world, adapted) -> None:
    _, branch = adapted(world.make(), "lora", 4)
    assert not branch.left.any()
    bound = world.shape[1] ** -0.5
    assert 0.8 * bound < branch.right.abs().max() <= bound
    assert branch.scale == 2.0  # alpha is twice the rank


def test_forward_and_gradients_are_those_of_peft(world, adapted) -> None:
    ours, branch = adapted(world.make(), "lora", 4, alpha=6)
    theirs = get_peft_model(world.make(), LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        branch.left.copy_(torch.randn(branch.left.shape, generator=torch.Generator().manual_seed(0)))
        layer.lora_A["default"].weight.copy_(branch.right)
        layer.lora_B["default"].weight.copy_(branch.left)
    for model in (ours, theirs):
        model.train()
        model(world.x).square().sum().backward()
    assert torch.allclose(ours(world.x), theirs(world.x), atol=1e-4)
    assert torch.allclose(branch.left.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-3)
    assert torch.allclose(branch.right.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-3)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == 4 * sum(world.shape)
