"""`config.json` as a stranger may have written it, and what the plug refuses."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

from eckart.errors import Refused
from eckart.hub import quantizer
from eckart.hub.attach import attach, dequantize
from eckart.hub.config import EckartConfig
from eckart.hub.load import load, meta_model
from eckart.nn.surgery import low_rank_layers

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def edited(saved: Any, tmp_path: Any) -> Any:
    """edited(**changes) -> a copy of the Llama folder with that in its quantization_config (a callable changes the whole)."""
    folder, _ = saved("llama")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)

    def run(**changes: Any) -> Any:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changes
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 4}, "format_version 4 was written by a newer eckart.*pip install -U eckart"),
        ({"format_version": 0}, "format_version to be an integer of at least 1, found 0"),
        ({"format_version": "1"}, "format_version to be an integer"),
        ({"format_version": True}, "format_version to be an integer"),
        ({"ranks": [4]}, "ranks to be a table of module names, found list"),
        ({"ranks": {LAYER: 0}}, "expected an integer of at least 1, found 0"),
        ({"ranks": {LAYER: 2.0}}, "found 2.0"),
        ({"ranks": {LAYER: "6"}}, "found '6'"),
        ({"ranks": {LAYER: True}}, "found True"),
        ({"ranks": {LAYER: None}}, "found None"),
        ({"ranks": {LAYER: 33}}, r"rank 33, but its shape is \(32, 32\)"),
        ({"ranks": {LAYER: 10**30}}, "but its shape is"),
        ({"ranks": {"": 1}}, "not a text: ''"),
        ({"ranks": {"model.layers.9.self_attn.q_proj": 6}}, "LlamaForCausalLM has no such module. Did you mean"),
        ({"ranks": {"model.layers.0.self_attn.q_proj.weight": 6}}, "no such module"),
        ({"ranks": {"__class__": 6}}, "no such module"),
        ({"ranks": {"config": 6}}, "no such module"),
        ({"ranks": {"model": 6}}, "it is a LlamaModel"),
        ({"ranks": {"model.embed_tokens": 6}}, "shares its weight"),
        ({"ranks": {"lm_head": 6}}, "shares its weight"),
        ({"ranks": {LAYER: 6, "layers.0.self_attn.q_proj": 6}}, "names one module twice"),
        ({"bias": [LAYER]}, "bias to be a table"),
        ({"bias": {LAYER: 1}}, "expected true or false, found 1"),
        ({"bias": {"model.layers.0": True}}, "'model.layers.0', which has no rank"),
    ],
)
def test_hostile_tables(edited: Any, changes: dict[str, Any], words: str) -> None:
    folder = edited(**changes)
    for read in (load, meta_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(Refused, match=words):
            read(folder)


def test_a_table_that_is_no_table(saved: Any, tmp_path: Any) -> None:
    config = json.loads((saved("llama")[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": ["eckart"]}))
    with pytest.raises(Refused, match="quantization_config to be a table, found list"):
        load(tmp_path)


def test_provenance_is_kept_and_never_acted_on(edited: Any, tmp_path: Any) -> None:
    # "dequantize" is a switch of transformers' own: obeyed, it would drop the config of a model that stays factored
    extra = {"recipe": {"name": "svd", "keep": 0.8}, "dequantize": True, "modules_to_not_convert": ["x"], "info": 1, "self": 2}
    model = AutoModelForCausalLM.from_pretrained(edited(**extra))
    assert low_rank_layers(model)
    model.save_pretrained(tmp_path / "again")
    table = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert {k: table[k] for k in extra} == extra
    assert low_rank_layers(load(tmp_path / "again"))


def test_round_trip_of_the_config() -> None:
    config = EckartConfig({"b": 2, "a": 1}, {"a": False}, recipe="svd", keep=0.5)
    table = config.to_dict()
    assert list(table) == ["quant_method", "format_version", "ranks", "bias", "keep", "recipe"]
    assert list(table["ranks"]) == ["a", "b"]
    assert EckartConfig.from_dict(json.loads(json.dumps(table))).to_dict() == table == dict(config)
    with pytest.raises(Refused, match="quant_method 'eckart', found 'gptq'"):
        EckartConfig.from_dict({"quant_method": "gptq"})


def test_a_dense_model_is_not_compressed_at_load(tiny: Any, tmp_path: Any) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=EckartConfig({LAYER: 4}))


def test_tensor_parallelism_is_refused(saved: Any) -> None:
    _, model = saved("llama")
    model.hf_quantizer.update_parallel_plan(model, {})
    model.config.distributed_config = SimpleNamespace(tp_size=2)
    with pytest.raises(Refused, match="tensor parallelism"):
        model.hf_quantizer.update_parallel_plan(model, {})


def test_an_unknown_head_is_refused_by_its_own_class_only(edited: Any) -> None:
    folder = edited(ranks={**{f"model.layers.{i}.mlp.{n}_proj": 6 for i in (0, 1) for n in ("up", "gate", "down")}, "score": 2})
    with pytest.raises(Refused, match="'score', but LlamaForCausalLM has no such module"):
        load(folder)
    with pytest.raises(Refused, match=r"model.layers.7"):
        AutoModel.from_pretrained(edited(ranks={"model.layers.7.mlp.up_proj": 6}))  # inside the body: a mistake under any class


class TestRegister:
    def test_twice_and_after_a_reload(self, monkeypatch: pytest.MonkeyPatch) -> None:
        quantizer.register()
        assert auto.AUTO_QUANTIZER_MAPPING["eckart"] is quantizer.EckartQuantizer
        stale = type("EckartQuantizer", (quantizer.EckartQuantizer,), {"__module__": quantizer.__name__})
        monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "eckart", stale)
        quantizer.register()
        assert auto.AUTO_QUANTIZER_MAPPING["eckart"] is quantizer.EckartQuantizer

    def test_a_name_that_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        other = type("Other", (quantizer.EckartQuantizer,), {"__module__": "other.package"})
        monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "eckart", other)
        with pytest.raises(Refused, match=r"from other\.package"):
            quantizer.register()


def test_adapters_are_not_silently_dropped(saved: Any) -> None:
    class Wrapped(nn.Linear):
        pass

    _, model = saved("bert")
    layer = model.pooler.dense
    layer.up = Wrapped(layer.rank, 32)
    with pytest.raises(Refused, match=r"pooler\.dense: its factors were wrapped"):
        model.dequantize()
    assert isinstance(model.pooler.dense, type(layer))


def test_two_methods_cannot_share_a_model(tiny: Any, factorise: Any) -> None:
    model = factorise(tiny("bert"), 6)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))
    for call in (attach, dequantize):
        with pytest.raises(Refused, match="already quantised with gptq"):
            call(model)
