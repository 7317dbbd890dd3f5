"""What every adapter recipe must hold to: one table over the registry, nothing to add for a new recipe."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import eckart as ek
from eckart.axes.border import from_yaml, to_dict, to_yaml
from eckart.axes.training import needs_glue
from eckart.errors import EckartError, Refused
from eckart.hub.peft.export import export_lora
from eckart.hub.peft.glue import adapter_layers
from eckart.registry import get_recipe, list_recipes

ALL = list_recipes("adapt")
NAMES = [n for n in ALL if get_recipe(n).target.kind == "linears"]  # the others adapt other layers: tests/recipes has theirs
LAYERS = ("0", "2", "4")


def variants(name: str) -> list[str | None]:
    return list(get_recipe(name).variants) or [None]


CASES = [(n, v) for n in NAMES for v in variants(n)]
IDS = [n if v is None else f"{n}-{v}" for n, v in CASES]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 32, bias=False), nn.Tanh(), nn.Linear(32, 20)).to(dtype)


def inputs(count: int, seed: int = 1, width: int = 24) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=g) @ torch.randn(width, width, generator=g) / 5


def loss_of(output: torch.Tensor, _batch: Any) -> torch.Tensor:
    return output.square().sum(1)


def rank_of(recipe: Any, wanted: int) -> int | None:
    """The rank to ask for; None for a recipe whose own budget is no number of triples."""
    return wanted if recipe.budget.kind in ("rank", "total_rank") and recipe.budget.value >= 1 else None


def adapted(name: str, variant: str | None = None, model: nn.Module | None = None, **how: Any) -> PeftModel:
    recipe = get_recipe(name)
    rank = rank_of(recipe, 4)
    calib = [inputs(64, seed) for seed in range(4)] if recipe.needs() else None
    how = {"rank": rank, "calib": calib, "loss": loss_of if calib else None, "seed": 3, **how}
    return ek.adapt(net() if model is None else model, name, variant=variant, **how)


@torch.no_grad()
def shake(model: nn.Module, size: float = 0.05) -> None:
    g = torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(size * torch.randn(p.shape, generator=g))


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(x)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
def test_a_layer_begins_as_it_was_or_as_the_recipe_says(name: str, variant: str | None) -> None:
    x = inputs(16, 9)
    model = adapted(name, variant)
    before, after = output(net(), x), output(model, x)
    if getattr(model.peft_config["default"].value.form, "identity", True):
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    changed = net().double()
    for key, layer in zip(LAYERS, adapter_layers(model), strict=True):
        changed[int(key)].weight.data += layer.branch("default").delta_matrix().double()
    assert torch.allclose(after.double(), output(changed, x.double()), atol=1e-5)
    for key, layer in zip(LAYERS, adapter_layers(model), strict=True):
        assert torch.equal(layer.get_base_layer().weight, net()[int(key)].weight)


@pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
def test_trained_numbers_follow_the_formula(name: str, variant: str | None) -> None:
    model = adapted(name, variant)
    config = model.peft_config["default"]
    recipe = config.value
    want = 0
    for key in LAYERS:
        layer = net()[int(key)]
        if config.ranks[key]:
            want += recipe.form.trainable(tuple(layer.weight.shape), config.ranks[key], recipe.roles, layer.bias is not None)
    assert sum(p.numel() for p in trained(model).values()) == want > 0
    assert all(".eckart_branch." in k for k in trained(model))


@pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
@pytest.mark.parametrize("lazily", [False, True])
def test_round_trip_is_bit_equal(name: str, variant: str | None, lazily: bool, tmp_path: Any) -> None:
    model = adapted(name, variant)
    shake(model)
    model.save_pretrained(tmp_path)
    json.loads((tmp_path / "adapter_config.json").read_text())
    again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=lazily)
    x = inputs(16, 9)
    state, before = again.state_dict(), model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.items())
    # a tensor that stays in the file's memory may lie where a processor's products round otherwise
    torch.testing.assert_close(output(again, x), output(model, x), rtol=1e-5 if lazily else 0, atol=1e-6 if lazily else 0)
    assert again.peft_config["default"].value == model.peft_config["default"].value
    training = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert trained(training).keys() == trained(model).keys()


@pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
def test_merged_equals_unmerged_and_unmerging_restores(name: str, variant: str | None) -> None:
    model = adapted(name, variant)
    shake(model)
    x = inputs(16, 9)
    want = output(model, x)
    with model.disable_adapter():
        assert torch.equal(output(model, x), output(net(), x))
    if any(layer.branch("default").not_mergeable for layer in adapter_layers(model)):
        with pytest.raises(Refused, match="cannot be merged"):
            model.merge_adapter()
        return
    model.merge_adapter()
    assert torch.allclose(output(model, x), want, atol=1e-5 * float(want.abs().max()) + 1e-6)
    model.unmerge_adapter()
    assert torch.allclose(output(model, x), want, atol=1e-5)
    plain = copy.deepcopy(model).unload()
    assert torch.allclose(output(plain, x), output(net(), x), atol=1e-5)
    merged = model.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    assert torch.allclose(output(merged, x), want, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.lora_bias=True.")  # where only some of the layers have a bias to train
@pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
def test_plain_lora_does_the_same(name: str, variant: str | None, tmp_path: Any) -> None:
    model = adapted(name, variant)
    shake(model)
    try:
        export_lora(model, tmp_path / "lora")
    except Refused:
        assert any(x.branch("default").not_mergeable or x.branch("default").lora() is None for x in adapter_layers(model))
        return
    x = inputs(16, 9)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora")
    assert torch.allclose(output(plain, x), output(model, x), atol=1e-5)


@pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
def test_same_bytes_again_and_with_other_layers(name: str, variant: str | None) -> None:
    one, two = (adapted(name, variant).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    if get_recipe(name).allocate.decides == "shape":
        alone = adapted(name, variant, target=["2"]).state_dict()
        mine = [k for k in alone if ".2.eckart_branch." in k]
        assert mine
        assert all(torch.equal(alone[k], one[k]) for k in mine)


@pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
def test_training_lowers_the_loss_and_leaves_the_base_alone(name: str, variant: str | None) -> None:
    model = adapted(name, variant)
    recipe = model.peft_config["default"].value
    model.train()
    x, y = inputs(32, 9), inputs(32, 5)[:, :20]
    if needs_glue(recipe):
        with pytest.raises(EckartError, match=r"callbacks=\[ek.glue\(model\)\]"):
            model(x)
    frozen = {k: t.clone() for k, t in model.state_dict().items() if k not in trained(model) and ".state_" not in k}
    optimizer = torch.optim.Adam(trained(model).values(), lr=1e-2)
    losses = []
    with ek.glue(model).begin(optimizer, total_steps=25) as glue:
        for _ in range(25):
            loss = (model(x) - y).square().mean()
            losses.append(float(loss.detach()))
            loss.backward()
            glue.before_step()
            optimizer.step()
            glue.after_step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(math.isfinite(v) for v in losses)
    now = model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in frozen.items())


@pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
def test_half_precision_base_keeps_its_bits_and_branches_are_float32(name: str, variant: str | None) -> None:
    stats = None
    if get_recipe(name).needs():
        stats = _statistics(name, variant)
    model = adapted(name, variant, model=net(torch.bfloat16), calib=None, stats=stats)
    x = inputs(16, 9).bfloat16()
    after = output(model, x)
    assert after.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    if getattr(model.peft_config["default"].value.form, "identity", True):
        assert torch.equal(after, output(net(torch.bfloat16), x))


def _statistics(name: str, variant: str | None) -> Any:
    """Those of the float32 network: calibration inputs of a half-precision module would have to be half precision too."""
    return adapted(name, variant).peft_config["default"].statistics


@pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
@pytest.mark.parametrize("case", ["zero", "rank one", "one row", "one column"])
def test_degenerate_weights_give_finite_branches(name: str, variant: str | None, case: str) -> None:
    m, n = {"zero": (12, 24), "rank one": (12, 24), "one row": (1, 24), "one column": (12, 1)}[case]
    model = nn.Sequential(nn.Linear(n, m))
    with torch.no_grad():
        weight = torch.outer(torch.arange(1.0, m + 1), torch.ones(n)) if case != "zero" else torch.zeros(m, n)
        model[0].weight.copy_(weight)
    recipe = get_recipe(name)
    if getattr(recipe.form, "uses_rest", False) and min(m, n) == 1:
        pytest.skip("one triple cannot be both protected and trained")
    calib = [inputs(64, s)[:, :n] for s in range(3)] if recipe.needs() else None
    rank = rank_of(recipe, 1)
    if recipe.budget.kind == "energy" and case == "zero":
        rank = 1
    found = ek.adapt(model, name, rank=rank, variant=variant, calib=calib, loss=loss_of if calib else None)
    assert all(torch.isfinite(t).all() for t in found.state_dict().values())


@pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
def test_damaged_weights_are_refused_by_name(name: str, variant: str | None) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    recipe = get_recipe(name)
    if recipe.source.kind == "zero" and not recipe.needs():
        adapted(name, variant, model=model)  # it never looks at the weight
        return
    with pytest.raises(EckartError, match=r"\b2\b|\b4\b"):
        adapted(name, variant, model=model)


@pytest.mark.parametrize("name", ALL)
def test_yaml_round_trip(name: str) -> None:
    recipe = get_recipe(name)
    for found in (recipe, *(recipe.variant(v) for v in recipe.variants)):
        assert from_yaml(to_yaml(found)) == found
        json.dumps(to_dict(found), allow_nan=False)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")  # PEFT's, of recipes for embeddings
@pytest.mark.parametrize("name", ALL)
def test_language_model_round_trip(name: str, tiny_llama: Any, token_ids: Any, tmp_path: Any) -> None:
    """Grouped-query attention, biases and tied embeddings, and the calibration that a language model has."""
    base = ek.load(tiny_llama)
    recipe = get_recipe(name)
    ids = torch.tensor(token_ids[:2])
    before = output(base, ids).logits
    model = ek.adapt(base, name, rank=rank_of(recipe, 4), calib=token_ids[:8] if recipe.needs() else None)
    if getattr(recipe.form, "identity", True):
        assert (output(model, ids).logits - before).abs().max() <= 1e-5 * before.abs().max()
    shake(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(ek.load(tiny_llama), tmp_path)
    assert torch.equal(output(again, ids).logits, output(model, ids).logits)
