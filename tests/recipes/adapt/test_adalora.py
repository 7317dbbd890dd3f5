"""AdaLoRA beside PEFT's, step by step on the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

import eckart as ek
from eckart.axes import refresh
from eckart.errors import UsageError
from eckart.hub.peft.glue import adapter_layers
from eckart.registry import get_recipe

STEPS, WARM, FINAL, EVERY, RANK, TARGET = 20, 2, 6, 3, 6, 3


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7))


def pair():
    """(ours, PEFT's), with the same factors."""
    cuts = refresh.Allocate(keep=TARGET / RANK, every=EVERY, warm=WARM, final=FINAL, betas=(0.85, 0.85))
    ours = ek.adapt(net(), get_recipe("adalora").with_(penalty=(), refresh=(cuts,)), rank=RANK, alpha=4)
    config = AdaLoraConfig(
        init_r=RANK, target_r=TARGET, tinit=WARM, tfinal=FINAL, deltaT=EVERY, beta1=0.85, beta2=0.85, total_step=STEPS, lora_alpha=4,
        target_modules=["0", "2"], lora_dropout=0.0,
    )  # fmt: skip
    theirs = get_peft_model(net(), config)
    branches = [x.branch("default") for x in adapter_layers(ours)]
    layers = [theirs.base_model.model[i] for i in (0, 2)]
    with torch.no_grad():
        for b, layer in zip(branches, layers, strict=True):
            layer.lora_A["default"].copy_(b.right)
            layer.lora_B["default"].copy_(b.left)
            layer.lora_E["default"].copy_(b.core[:, None])
    return ours.train(), branches, theirs.train(), layers


def test_the_same_entries_are_cut_at_the_same_steps_as_in_peft() -> None:
    ours, branches, theirs, layers = pair()
    one = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.3)
    two = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.3)
    g = torch.Generator().manual_seed(3)
    seen = set()
    with ek.glue(ours).begin(one, total_steps=STEPS) as glue:
        for step in range(1, STEPS + 1):
            x = torch.randn(16, 9, generator=g)
            for model, optimizer in ((ours, one), (theirs, two)):
                optimizer.zero_grad()
                (model(x) - x[:, :7]).square().mean().backward()
                if model is ours:
                    glue.before_step()
                optimizer.step()
            glue.after_step()
            theirs.base_model.update_and_allocate(step)
            if step < STEPS - FINAL:  # at the last cut PEFT leaves the sensitivity of that step out
                for b, layer in zip(branches, layers, strict=True):
                    assert torch.allclose(b.core, layer.lora_E["default"][:, 0], atol=1e-5)
                    assert torch.equal(b.core == 0, layer.lora_E["default"][:, 0] == 0)
                seen.add(sum(int((b.core != 0).sum()) for b in branches))
    assert len(seen) > 3
    assert sum(int((b.core != 0).sum()) for b in branches) == 2 * TARGET == sum(int((x.lora_E["default"] != 0).sum()) for x in layers)


def test_scale_and_start_are_those_of_the_paper(world, adapted) -> None:
    model, b = adapted(world.make(), "adalora", 4)
    assert b.scale == 32 / 4
    assert not b.core.any()
    assert float(torch.cat([b.left.flatten(), b.right.flatten()]).detach().std()) == pytest.approx(0.02, rel=0.2)
    assert torch.equal(model(world.x), world.make()(world.x))


def test_phases_are_shares_of_the_run() -> None:
    piece = get_recipe("adalora").refresh[0]
    assert piece.ends(300) == (30, 100)
    assert (piece.budget(30, 300, 120), piece.budget(200, 300, 120), piece.budget(300, 300, 120)) == (120, 80, 80)
    assert piece.budget(115, 300, 120) == int(80 + 40 * 0.5**3)


def test_a_form_without_a_diagonal_cannot_be_cut() -> None:
    with pytest.raises(UsageError, match=r"refresh.allocate cuts entries of a diagonal .* this form has left, right"):
        ek.adapt(copy.deepcopy(net()), "lora", rank=2, glue=["adalora"])
