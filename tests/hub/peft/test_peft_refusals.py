"""What goes wrong, and what is said: before anything is changed, with the layer, the file or the option named."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import eckart as ek
from eckart.errors import Refused, UsageError
from eckart.hub.peft.config import EckartConfig


def test_rank_above_a_layer_names_it_and_the_largest_possible(tiny) -> None:
    with pytest.raises(UsageError, match=r"k_proj: rank 17 is above the layer, whose shape is 16x32. Give a rank of at most 16"):
        ek.adapt(tiny("llama"), "pissa", rank=17)
    with pytest.raises(UsageError, match=r"rank: expected an integer of at least 1, or a share in \(0, 1\), found 0"):
        ek.adapt(tiny("llama"), "pissa", rank=0)
    with pytest.raises(UsageError, match=r"rank: expected .* found 2.5"):
        ek.adapt(tiny("llama"), "pissa", rank=2.5)


def test_target_that_matches_nothing_lists_what_is_near(tiny) -> None:
    for call in (
        lambda: ek.adapt(tiny("llama"), "pissa", rank=2, target=["q_proj", "vproj"]),
        lambda: get_peft_model(tiny("llama"), EckartConfig(recipe="pissa", r=2, target_modules=["q_proj", "vproj"])),
    ):
        with pytest.raises(UsageError, match=r"no layer is called 'vproj'. Did you mean 'v_proj'"):
            call()
    with pytest.raises(UsageError, match=r"no layer is called 'decoder.\*'"):
        get_peft_model(tiny("llama"), EckartConfig(recipe="pissa", r=2, target_modules="decoder.*"))


def test_layers_that_cannot_hold_an_adapter_are_no_targets() -> None:
    class Special(nn.Linear):
        pass

    with pytest.raises(UsageError, match="no layer is called '0'"):
        ek.adapt(nn.Sequential(Special(4, 4), nn.Linear(4, 4)), "pissa", rank=2, target=["0"])
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = ek.adapt(block, "pissa", rank=2).peft_config["default"].ranks
    assert set(found) == {"linear1", "linear2"}  # the attention reads out_proj's weight without calling it


def test_a_refused_adapter_leaves_the_model_alone(tiny, logits) -> None:
    model = tiny("llama")
    before = logits(model)
    with pytest.raises(UsageError):
        ek.adapt(model, "pissa", rank=17)
    assert torch.equal(logits(model), before)
    assert not any("eckart" in k for k in model.state_dict())


def test_missing_calibration(tiny) -> None:
    for call in (
        lambda: ek.adapt(tiny("llama"), "corda", rank=2),
        lambda: get_peft_model(tiny("llama"), EckartConfig(recipe="eva", r=2)),
    ):
        with pytest.raises(UsageError, match=r"(corda|eva) measures moments of the layers' inputs on calibration text, and there is none"):
            call()


def test_damage_found_during_a_data_driven_start(tiny, token_ids) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    for recipe in ("corda", "pissa"):
        with pytest.raises(Refused, match=r"layers.1.mlp.down_proj: 1 of 1536 values of its weight are NaN or Inf"):
            ek.adapt(model, recipe, rank=2, calib=token_ids[:4] if recipe == "corda" else None)
        assert not any("eckart" in k for k in model.state_dict())  # the layers before it were not touched either
    inf = tiny("llama")
    with torch.no_grad():
        inf.model.embed_tokens.weight[5] = float("inf")
    with pytest.raises(Refused, match="finite|NaN"):
        ek.adapt(inf, "eva", rank=2, calib=[[5, 6, 7]] * 4)


def test_quantised_base_cannot_be_mutated(tiny) -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    model = tiny("llama")
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
    with pytest.raises(Refused, match=r"q_proj: its weight is quantised, and base='mutate' .* Use base='subtract'"):
        ek.adapt(model, "pissa", rank=2, base="mutate")


def test_offloaded_weights_cannot_be_read(tiny) -> None:
    model = tiny("llama").to("meta")
    with pytest.raises(Refused, match="offloaded"):
        ek.adapt(model, "pissa", rank=2, target=["q_proj"])


class TestAnotherBase:
    @pytest.fixture
    def folder(self, tiny, tmp_path):
        ek.adapt(tiny("llama"), "pissa", rank=2).save_pretrained(tmp_path)
        return tmp_path

    def test_other_weights(self, tiny, folder) -> None:
        other = tiny("llama")
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.0001)
        with pytest.raises(Refused, match=r"the adapter was made for other weights \(an entry was .*, here it is"):
            PeftModel.from_pretrained(other, folder)

    def test_other_shapes_and_layers(self, tiny, folder) -> None:
        with pytest.raises(Refused, match=r"made for a layer of shape \(32, 48\), this one is \(64, 48\)"):
            PeftModel.from_pretrained(tiny("llama", hidden_size=64), folder)
        with pytest.raises(Refused, match=r"made for a model with the layer .*layers.1.*, which this one lacks"):
            PeftModel.from_pretrained(tiny("llama", num_hidden_layers=1), folder)

    def test_the_same_weights_in_another_precision_pass(self, tiny, folder) -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            PeftModel.from_pretrained(tiny("llama").to(dtype), folder)

    def test_a_merged_copy_is_another_base(self, tiny, folder, shake) -> None:
        merged = shake(PeftModel.from_pretrained(tiny("llama"), folder, is_trainable=True)).merge_and_unload()
        with pytest.raises(Refused, match="other weights"):
            PeftModel.from_pretrained(merged, folder)


class TestFiles:
    @pytest.mark.filterwarnings("ignore:.*missing adapter keys")
    def test_missing_tensors_are_named_at_the_first_forward(self, tiny, tmp_path, ids) -> None:
        ek.adapt(tiny("llama"), "pissa", rank=2, target=["q_proj"]).save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        gone = next(k for k in tensors if k.endswith("initial_left"))
        save_file({k: v for k, v in tensors.items() if k != gone}, file, metadata={"format": "pt"})
        model = PeftModel.from_pretrained(tiny("llama"), tmp_path)
        with pytest.raises(Refused, match=r"adapter 'default': initial_left came neither from a checkpoint nor from an initialisation"):
            model(input_ids=ids)

    def test_a_config_from_a_file_makes_no_new_adapter(self, tiny, tmp_path, ids) -> None:
        ek.adapt(tiny("llama"), "pissa", rank=2, target=["q_proj"]).save_pretrained(tmp_path)
        config = EckartConfig.from_pretrained(tmp_path)
        config.base_model_name_or_path = None
        model = get_peft_model(tiny("llama"), config)
        with pytest.raises(Refused, match=r"load it with PeftModel.from_pretrained, or make a new EckartConfig"):
            model(input_ids=ids)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format_version": 2}, "format_version 2 is newer than this release reads"),
            ({"recipe": {"name": "x", "verb": "adapt", "form": {"kind": "brnch"}}}, "no form is called 'brnch'. Did you mean 'branch'"),
            ({"recipe": "svd"}, "svd does compress, not adapt"),
            ({"recipe": {"name": "x", "verb": "adapt", "paper": "-", "evil": 1}}, "evil: a recipe has no such key"),
            ({"ranks": {}}, "no rank|no layer a rank"),
        ],
    )
    def test_strange_configs(self, tiny, tmp_path, change, message) -> None:
        ek.adapt(tiny("llama"), "pissa", rank=2, target=["q_proj"]).save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises((Refused, UsageError), match=message):
            PeftModel.from_pretrained(tiny("llama"), tmp_path)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_tied_weights_are_not_merged(tiny, logits) -> None:
    model = ek.adapt(tiny("llama"), "pissa", rank=2, target=["embed_tokens"])
    with pytest.raises(Refused, match=r"embed_tokens shares its weight with lm_head: merging would change both"):
        model.merge_and_unload()


def test_a_second_adapt_on_the_bare_model_is_refused(tiny) -> None:
    model = tiny("llama")
    ek.adapt(model, "pissa", rank=2)
    with pytest.raises(UsageError, match="already carries adapters. Pass the PeftModel"):
        ek.adapt(model, "pissa", rank=2)


def test_several_adapters_in_one_batch_are_refused(tiny, ids) -> None:
    layer = next(m for m in ek.adapt(tiny("llama"), "pissa", rank=2).modules() if hasattr(m, "eckart_branch"))
    with pytest.raises(UsageError, match="Run a batch per adapter"):
        layer(torch.zeros(2, 32), adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"recipe": "pisa"}, "no system 'pisa'. Did you mean 'pissa'"),
        ({"variant": "kpm"}, "pissa has no variant 'kpm'"),
        ({"base": "change"}, "base: expected 'subtract' or 'mutate'"),
        ({"alpha": "three"}, 'alpha: expected a number, "r"'),
        ({"alpha": -1.0}, "alpha: expected a positive number"),
        ({"settings": ["form.balance=evn"]}, "form.balance: Input should be 'even'"),
        ({"settings": ["form.right=kaimng"]}, "no initial value is called 'kaimng'. Did you mean 'kaiming'"),
        ({"settings": ["form.right=normal"]}, "expected a number behind the colon"),
        ({"settings": ["budget.rank=3"]}, "two budgets"),
        ({"rank_pattern": {"w_proj": 3}}, "rank_pattern: 'w_proj' matches no layer"),
        ({"recipe": "lora", "base": "mutate"}, "takes nothing away from the base"),
        ({"target": []}, "expected names of layers, found none"),
    ],
)
def test_calls(tiny, how, message) -> None:
    with pytest.raises(UsageError, match=message):
        ek.adapt(tiny("llama"), **{"recipe": "pissa", "rank": 2, **how})
