"""ek.load: the right class, and a clear refusal for everything else."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, BertModel, LlamaForCausalLM, LlamaModel

from eckart.errors import Refused, UsageError
from eckart.hub.load import is_causal, is_encoder, load, load_tokenizer, meta_model


def change(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    file.write_text(json.dumps(config))
    return folder


def retensor(folder: Path, edit: Any) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def dense(tiny: Any, tmp_path: Any) -> Path:
    tiny("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def factored(saved: Any, tmp_path: Any) -> Path:
    saved("bert")[1].save_pretrained(tmp_path / "factored")
    return tmp_path / "factored"


class TestClass:
    def test_a_dense_folder(self, dense: Path, tiny: Any, out: Any) -> None:
        model = load(dense)
        assert type(model) is LlamaForCausalLM
        assert not model.training
        assert torch.equal(out(model), out(tiny("llama")))
        assert load(dense, dtype="bfloat16").dtype == load(dense, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert load(str(dense), device="cpu").device.type == "cpu"
        assert load(dense, attn_implementation="eager").config._attn_implementation == "eager"

    def test_without_architectures_the_body(self, dense: Path) -> None:
        assert type(load(change(dense, architectures=None))) is LlamaModel
        assert type(meta_model(dense)) is LlamaModel

    @pytest.mark.parametrize("names", [["Trainer"], ["os"], ["__class__"], ["pipeline"], ["no identifier"], ["LlamaFancy"], ["BertModel"]])
    def test_names_that_are_no_class_of_this_model(self, dense: Path, names: list[str]) -> None:
        assert type(load(change(dense, architectures=names))) is LlamaModel

    def test_architectures_that_are_no_names(self, dense: Path) -> None:
        # a number is refused by eckart, or already by the config class of a newer transformers
        with pytest.raises(Refused, match="architectures"):
            load(change(dense, architectures=[1]))

    def test_only_the_head_is_missing(self, tmp_path: Any) -> None:
        config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
        BertModel(config).save_pretrained(tmp_path)
        change(tmp_path, architectures=["BertForMaskedLM"])
        with pytest.warns(UserWarning, match=r"names BertForMaskedLM, but its head \(cls.*\) is not in the file; loaded as BertModel"):
            model = load(tmp_path)
        assert type(model) is BertModel


class TestRefusals:
    @pytest.mark.parametrize("read", [load, meta_model, load_tokenizer])
    def test_no_such_place(self, read: Any, tmp_path: Any) -> None:
        for path in ("no/such/folder", "./nothing", "/no/such", "~/no-such-folder-at-all", "a b", "a/..", "a@", "-a/b"):
            with pytest.raises(Refused, match="no such folder"):
                read(path)
        file = tmp_path / "file.safetensors"
        file.write_bytes(b"")
        with pytest.raises(Refused, match="this is a file"):
            read(file)

    def test_no_config(self, tmp_path: Any) -> None:
        for read in (load, meta_model):
            with pytest.raises(Refused, match=r"no config.json in this folder"):
                read(tmp_path)
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(Refused, match="PEFT adapter: merge"):
            load(tmp_path)

    def test_model_and_adapter(self, dense: Path) -> None:
        (dense / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
        with pytest.raises(Refused, match="a model and a PEFT adapter"):
            load(dense)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", '{"a": 1}', '{"model_type": 3}', '{"model_type": ["llama"]}', '{"model_type": null}']
    )
    def test_no_usable_config(self, tmp_path: Any, text: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(Refused, match=r"config\.json"):
            load(tmp_path)

    def test_unknown_model_type(self, dense: Path) -> None:
        with pytest.raises(Refused, match=r"does not know model_type 'llamma'. Did you mean 'llama'.*pip install -U transformers"):
            load(change(dense, model_type="llamma"))
        with pytest.raises(Refused, match="ships its own Python code, and eckart never runs code"):
            load(change(dense, model_type="my_own", auto_map={"AutoConfig": "code.Config"}))

    def test_own_code_under_a_native_model_type(self, dense: Path) -> None:
        (dense / "code.py").write_text("raise SystemExit('this must never run')")
        own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        with pytest.raises(Refused, match="MyLlama comes with its own Python code, and eckart never runs code"):
            load(change(dense, architectures=["MyLlama"], auto_map=own))
        assert type(load(change(dense, architectures=["LlamaForCausalLM"], auto_map=own))) is LlamaForCausalLM

    def test_sizes_no_module_can_have(self, dense: Path) -> None:
        for changes in ({"hidden_size": -1}, {"hidden_size": "x"}, {"num_attention_heads": 0}):
            shutil.copytree(dense, dense.parent / "bad", dirs_exist_ok=True)
            with pytest.raises(Refused, match=r"LlamaForCausalLM|model_type 'llama'"):
                meta_model(change(dense.parent / "bad", **changes))

    def test_pickled_weights(self, dense: Path) -> None:
        (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
        with pytest.raises(Refused, match=r"(?s)pytorch_model.bin, a format that can run code.*eckart convert"):
            load(dense)

    def test_no_weights_and_damaged_weights(self, dense: Path) -> None:
        file = dense / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(Refused, match=r"model\.safetensors"):
            load(dense)
        file.unlink()
        with pytest.raises(Refused, match=r"no \.safetensors file found"):
            load(dense)
        with pytest.raises(Refused, match=r"could not be read.*no file named model\.fp16\.safetensors"):
            load(dense, variant="fp16")

    @pytest.mark.parametrize(
        "text", ["{", "{}", '{"weight_map": {"a": "../elsewhere.safetensors"}}', '{"weight_map": {"a": "gone.safetensors"}}']
    )
    def test_hostile_index(self, dense: Path, text: str) -> None:
        (dense / "model.safetensors").unlink()
        (dense / "model.safetensors.index.json").write_text(text)
        with pytest.raises(Refused):
            load(dense)

    def test_a_missing_weight_would_be_random(self, dense: Path) -> None:
        retensor(dense, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(Refused, match=r"1 weights of LlamaForCausalLM are not in the file.*layers.1.mlp.up_proj.weight"):
            load(dense)

    def test_another_shape(self, dense: Path) -> None:
        retensor(dense, lambda t: t.update({"model.norm.weight": torch.ones(33)}))
        with pytest.raises(Refused, match=r"model.norm.weight has shape \(33,\), LlamaForCausalLM expects \(32,\)"):
            load(dense)
        with pytest.raises(Refused, match="has shape"):
            load(dense, ignore_mismatched_sizes=True)

    @pytest.mark.parametrize("part", ["down.weight", "up.weight", "up.bias", "weight"])
    def test_a_factored_folder_lacks_a_part(self, factored: Path, part: str) -> None:
        retensor(factored, lambda t: t.pop(f"pooler.dense.{part}"))
        with pytest.raises(Refused, match=rf"not in the file.*pooler.dense.{part}"):
            load(factored)

    def test_a_factored_folder_has_too_much(self, factored: Path) -> None:
        retensor(factored, lambda t: t.update({"pooler.dense.bias": torch.zeros(32)}))
        with pytest.raises(Refused, match=r"1 tensors of the file have no place in BertModel: pooler.dense.bias"):
            load(factored)

    def test_a_factored_folder_has_another_rank(self, factored: Path) -> None:
        retensor(factored, lambda t: t.update({"pooler.dense.down.weight": torch.zeros(5, 32)}))
        with pytest.raises(Refused, match=r"pooler.dense.down.weight has shape \(5, 32\), BertModel expects \(6, 32\)"):
            load(factored)

    def test_calls_that_contradict_themselves(self, dense: Path) -> None:
        for options in (
            {"trust_remote_code": True},
            {"use_safetensors": False},
            {"output_loading_info": True},
            {"device": "cpu", "device_map": "cpu"},
            {"dtype": "int8"},
            {"dtype": "nn"},
            {"dtype": torch.int64},
        ):
            with pytest.raises(UsageError, match="load: "):
                load(dense, **options)
        with pytest.raises(UsageError, match="trust_remote_code"):
            load_tokenizer(dense, trust_remote_code=True)
        with pytest.raises(UsageError, match=r"unknown option 'revison'\. Did you mean 'revision'"):
            meta_model(dense, revison="x")

    def test_without_transformers(self, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def without(name: str, *args: Any, **kw: Any) -> Any:
            if name.split(".")[0] == "transformers":
                raise ImportError(name)
            return real(name, *args, **kw)

        monkeypatch.setattr(builtins, "__import__", without)
        for read in (load, meta_model, load_tokenizer):
            with pytest.raises(UsageError, match=r'pip install "eckart\[hf\]"'):
                read(dense)


def test_tokenizer(tmp_path: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "low": 1, "rank": 2}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("low rank high").input_ids == [1, 2, 0]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(Refused, match="no tokenizer could be read"):
        load_tokenizer(tmp_path)


def test_what_kind_of_model(tiny: Any) -> None:
    small = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10)
    decoder = BertConfig(**{**small.to_dict(), "is_decoder": True})
    cases = [
        (tiny("llama"), True, False),
        (tiny("gpt2"), True, False),
        (tiny("llama").model, False, True),
        (tiny("bert"), False, True),
        (BertForMaskedLM(small), False, True),
        (BertLMHeadModel(decoder), True, False),
    ]
    for model, causal, encoder in cases:
        assert (is_causal(model), is_encoder(model)) == (causal, encoder), type(model).__name__
        model.config.architectures = [type(model).__name__]
        assert (is_causal(model.config), is_encoder(model.config)) == (causal, encoder), type(model).__name__
    from transformers import T5Config, ViTConfig

    assert not is_causal(T5Config())
    assert not is_encoder(T5Config())
    assert not is_encoder(ViTConfig())
    assert not is_causal(ViTConfig())
