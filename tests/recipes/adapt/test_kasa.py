"""KaSA: the truncated base of numpy's SVD, PEFT's port beside it, and the penalties by hand."""

import math

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig

import eckart as ek


def test_begins_as_the_weight_without_its_smallest_singular_values(world, adapted) -> None:
    model, b = adapted(world.make(), "kasa", 4)
    cut = world.k - 4
    truncated = (world.U[:, :cut] * world.S[:cut]) @ world.Vh[:cut]
    want = world.x.double() @ truncated.T + world.bias.double()
    assert torch.allclose(model(world.x).double(), want, atol=1e-5)
    assert torch.equal(model.base_model.model[0].base_layer.weight, world.make()[0].weight)
    assert {k for k, _ in b.named_parameters()} == {"left", "core", "right"}
    assert not b.left.any()


def test_same_truncation_as_peft(world, adapted) -> None:
    theirs = get_peft_model(world.make(), LoraConfig(r=4, lora_alpha=8, target_modules=["0"], kasa_config=KasaConfig()))
    ours, _ = adapted(world.make(), "kasa", 4, base="mutate")
    mutated = ours.base_model.model[0].base_layer.weight
    assert torch.allclose(mutated, theirs.base_model.model[0].base_layer.weight, atol=1e-5)


def test_truncating_twice_changes_nothing(world, adapted) -> None:
    once = adapted(world.make(), "kasa", 4)[0].merge_and_unload()
    again, _ = adapted(once, "kasa", 4)
    kept = torch.linalg.svdvals(once[0].weight.detach().double())
    assert kept[world.k - 4 :].max() < 1e-5
    assert torch.allclose(again(world.x), once(world.x), atol=1e-5)


def test_penalties(world, adapted) -> None:
    model, b = adapted(world.make(), "kasa", 3)
    optimizer = torch.optim.SGD(b.parameters(), lr=0.1)
    d, right = b.core.detach().double(), b.right.detach().double()
    with ek.glue(model).begin(optimizer) as glue:
        glue.before_step()
    assert torch.allclose(b.core.grad.double(), 2e-4 * d, rtol=1e-5)
    off = right @ right.T - torch.eye(3, dtype=torch.float64)
    assert torch.allclose(b.right.grad.double(), 1e-3 * 2 * off @ right / math.sqrt(float(off.square().sum()) + 1e-6), rtol=1e-4, atol=1e-8)
