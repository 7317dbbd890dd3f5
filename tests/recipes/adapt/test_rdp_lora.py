"""RDP-LoRA: the blocks that are chosen against a recursion written here on the hidden states that transformers returns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import eckart as ek
from eckart.axes import target
from eckart.errors import UsageError
from eckart.registry import get_recipe


def recursion(points: np.ndarray, eps: float) -> set[int]:
    """Ramer-Douglas-Peucker as it is published; the inner points that are kept."""
    if len(points) < 3:
        return set()
    start, end = points[0], points[-1]
    chord = end - start
    distances = []
    for p in points[1:-1]:
        t = np.clip((p - start) @ chord / (chord @ chord), 0, 1)
        distances.append(np.linalg.norm(p - start - t * chord))
    far = int(np.argmax(distances)) + 1
    if distances[far - 1] <= eps:
        return set()
    return {far} | recursion(points[: far + 1], eps) | {far + k for k in recursion(points[far:], eps)}


def kept(points: np.ndarray, count: int) -> set[int]:
    """The largest tolerance that keeps at least so many."""
    for eps in np.linspace(2, 0, 20001):
        found = recursion(points, eps)
        if len(found) >= count:
            return found
    raise AssertionError


@pytest.fixture(scope="module")
def path(lm_folder, heldout):
    """(model, texts, points (layers + 1, d) from the hidden states that transformers itself returns, before the last norm)."""
    model = ek.load(lm_folder, dtype=torch.float32).eval()
    tokenizer = ek.load_tokenizer(lm_folder)
    texts = [t[:400] for t in heldout[:6]]
    inputs: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    sums = 0
    for t in texts:
        ids = tokenizer(t, return_tensors="pt").input_ids
        with torch.no_grad():
            states = [*model(ids, output_hidden_states=True).hidden_states[:-1], inputs[-1]]
        sums = sums + torch.stack([s[0].double().mean(0) for s in states])
    handle.remove()
    points = sums.numpy()
    return model, texts, points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("share", [13 / 36, 0.5])
def test_adapters_stand_where_the_path_turns(path, share) -> None:
    model, texts, points = path
    recipe = get_recipe("rdp_lora")
    recipe = recipe.with_(target=target.Turns(share=share))
    adapted = ek.adapt(model, recipe, rank=2, calib=texts)
    blocks = {int(n.split(".")[2]) for n in adapted.peft_config["default"].ranks}
    adapted.unload()
    count = round(share * 6)
    assert len(blocks) == count
    assert blocks == {k - 1 for k in kept(points, count)}


def test_a_straight_path_turns_nowhere(lm_folder) -> None:
    """Blocks that add nothing leave the state where it was; then no layer is left to adapt, and that is said."""
    model = ek.load(lm_folder, dtype=torch.float32)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    with pytest.raises(UsageError, match="the path turns at no block"):
        ek.adapt(model, "rdp_lora", rank=2, calib=["def f(x):", "return x"])


def test_as_glue_it_chooses_for_another_recipe_and_measures_both(path, lm_folder, tmp_path) -> None:
    from eckart.hub.peft.offline import initialise

    model, texts, _ = path
    adapted = ek.adapt(model, "corda", rank=2, calib=texts, glue=["rdp_lora"])
    config = adapted.peft_config["default"]
    assert config.value.target == target.Turns(inner=get_recipe("corda").target)
    assert len({n.split(".")[2] for n in config.ranks}) == 2
    assert len(config.ranks) == 14
    adapted.unload()
    offline = initialise(lm_folder, "pissa", 2, out=tmp_path / "a", calib=texts, glue=["rdp_lora"])
    assert {n.split(".")[2] for n in offline.ranks} == {n.split(".")[2] for n in config.ranks}
    from peft import PeftModel

    again = PeftModel.from_pretrained(ek.load(lm_folder), tmp_path / "a")
    assert {n.split(".")[2] for n in again.peft_config["default"].ranks} == {n.split(".")[2] for n in config.ranks}


def test_what_cannot_be(path) -> None:
    model, texts, _ = path
    with pytest.raises(UsageError, match="measures the path of the hidden state through the blocks on calibration text"):
        ek.adapt(model, "rdp_lora", rank=2)
    with pytest.raises(UsageError, match="where none of the chosen layers lies"):
        ek.adapt(model, "rdp_lora", rank=2, calib=texts, target=["layers.5.mlp.up_proj"])
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(UsageError, match="this model has 0 repeated blocks"):
        ek.adapt(net, "rdp_lora", rank=2, calib=[torch.ones(2, 4)])
    with pytest.raises(UsageError, match="the recipe's target is vocabulary, and both cannot hold"):
        ek.adapt(model, "cross_init", rank=1, calib=texts, glue=["rdp_lora"])
    assert not hasattr(model, "peft_config")
