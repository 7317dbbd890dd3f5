"""PiSSA against numpy's SVD and against PEFT's exact and randomised initialisations."""

import pytest
import torch
from peft import LoraConfig, get_peft_model


@pytest.mark.parametrize("alpha", [None, 12])
def test_factors_carry_the_root_of_each_singular_value(world, adapted, alpha) -> None:
    _, b = adapted(world.make(), "pissa", 4, alpha=alpha)
    s = 1.0 if alpha is None else 3.0
    assert b.scale == s
    root = (world.S[:4] / s).sqrt()
    sign = torch.sign((b.left.double() * world.U[:, :4]).sum(0))
    assert torch.allclose(b.left.double(), world.U[:, :4] * root * sign, atol=1e-5)
    assert torch.allclose(b.right.double(), (root * sign)[:, None] * world.Vh[:4], atol=1e-5)


def test_residual_has_the_norm_of_the_tail(world, adapted) -> None:
    _, b = adapted(world.make(), "pissa", 4)
    residual = world.W - b.gain_matrix().detach().double()
    assert float(residual.norm()) == pytest.approx(float(world.S[4:].square().sum().sqrt()), rel=1e-5)


@pytest.mark.parametrize("alpha", [4, 12])
def test_same_subspaces_residual_and_factors_as_peft(world, adapted, angles, alpha) -> None:
    theirs = get_peft_model(world.make(), LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights="pissa"))
    layer = theirs.base_model.model[0]
    mutated, b = adapted(world.make(), "pissa", 4, alpha=alpha, base="mutate")
    assert angles(b.left, layer.lora_B["default"].weight).max() < 1e-5
    assert angles(b.right.T, layer.lora_A["default"].weight.T).max() < 1e-5
    assert torch.allclose(mutated.base_model.model[0].base_layer.weight, layer.base_layer.weight, atol=1e-5)
    assert torch.allclose(b.left.norm(dim=0), layer.lora_B["default"].weight.norm(dim=0), rtol=1e-4)
    assert torch.allclose(mutated(world.x), theirs(world.x), atol=1e-5)


def test_exact_where_the_randomised_initialisation_is_not(world, adapted) -> None:
    theirs = get_peft_model(world.make(), LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="pissa_niter_4"))
    layer = theirs.base_model.model[0]
    _, b = adapted(world.make(), "pissa", 4)

    def worst(product: torch.Tensor) -> float:
        found = torch.linalg.svdvals(product.detach().double())[:4]
        return float(((found - world.S[:4]) / world.S[:4]).abs().max())

    assert worst(b.gain_matrix()) < 1e-5
    assert worst(b.gain_matrix()) <= worst(layer.lora_B["default"].weight @ layer.lora_A["default"].weight)


def test_an_adapter_of_peft_is_the_same_function(world, adapted) -> None:
    theirs = get_peft_model(world.make(), LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="pissa"))
    layer = theirs.base_model.model[0]
    ours, b = adapted(world.make(), "pissa", 4)
    with torch.no_grad():
        for mine, other in ((b.left, layer.lora_B["default"].weight), (b.right, layer.lora_A["default"].weight)):
            other += 0.1
            mine.copy_(other)
    assert torch.allclose(ours(world.x), theirs(world.x), atol=1e-4)
