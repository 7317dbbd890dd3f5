"""Factored models through transformers' own save and load, in every way people load them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from eckart.errors import Refused, UsageError
from eckart.hub.attach import attach, dequantize
from eckart.hub.load import load, meta_model
from eckart.nn import LowRankLinear
from eckart.nn.surgery import low_rank_layers, replace_linear

KINDS = ["llama", "bert", "gpt2"]


def auto(kind: str) -> Any:
    return AutoModel if kind == "bert" else AutoModelForCausalLM


def on_disk(folder: Any) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            found |= {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  (safe_open is no mapping)
    return found


def all_but(model: nn.Module, block: str, prefix: str = "") -> dict[str, str]:
    """A device map with everything on the CPU, and one block on disk."""
    devices: dict[str, str] = {}
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if f"{block}.".startswith(f"{path}.") and path != block:
            devices |= all_but(child, block, f"{path}.")
        else:
            devices[path] = "disk" if path == block else "cpu"
    return devices


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_pairs_are_the_dense_model(kind: str, tiny: Any, factorise: Any, out: Any) -> None:
    model = tiny(kind)
    want = out(model)
    factorise(model)
    assert len(low_rank_layers(model)) == {"llama": 14, "bert": 13, "gpt2": 8}[kind]
    assert torch.allclose(out(model), want, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["plain", "cpu", "auto", "low_cpu_mem", "disk", "ours"])
def test_reload_is_exact(kind: str, how: str, saved: Any, out: Any, tmp_path: Any) -> None:
    folder, model = saved(kind)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    if how == "ours":
        again = load(folder)
        assert type(again) is type(model)
    elif how == "disk":
        block = {"llama": "model.layers.0", "bert": "encoder.layer.0", "gpt2": "transformer.h.0"}[kind]
        again = auto(kind).from_pretrained(folder, device_map=all_but(model, block), offload_folder=tmp_path)
        assert any(p.device.type == "meta" for p in again.parameters())  # it really is offloaded
    else:
        options = {"cpu": {"device_map": "cpu"}, "auto": {"device_map": "auto"}, "low_cpu_mem": {"low_cpu_mem_usage": True}}
        again = auto(kind).from_pretrained(folder, **options.get(how, {}))
    assert torch.equal(out(again), out(model))
    assert {n: m.rank for n, m in low_rank_layers(again).items()} == {n: m.rank for n, m in low_rank_layers(model).items()}
    assert not again.training


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str, saved: Any, out: Any) -> None:
    folder, model = saved(kind)
    again = auto(kind).from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for p in model.parameters():  # not model.to(...): it would round the rotary tables, which a load does not
        p.data = p.data.to(torch.bfloat16)
    assert torch.equal(out(again), out(model))
    assert torch.equal(out(load(folder, dtype="bfloat16")), out(again))


@pytest.mark.parametrize("kind", KINDS)
def test_save_again_gives_the_same(kind: str, saved: Any, tmp_path: Any) -> None:
    folder, _ = saved(kind)
    auto(kind).from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="12KB")
    assert (tmp_path / "config.json").read_text() == (folder / "config.json").read_text()
    first, second = on_disk(folder), on_disk(tmp_path)  # spread over the shards in another order
    assert sorted(first) == sorted(second)
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)


def test_what_is_on_disk(saved: Any) -> None:
    folder, model = saved("gpt2")
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert table["quant_method"] == "eckart"
    assert table["format_version"] == 1
    assert table["recipe"] == "svd"
    assert table["ranks"] == dict.fromkeys(low_rank_layers(model), 6)
    tensors = on_disk(folder)
    name = "transformer.h.0.attn.c_attn"  # Conv1D stores (in, out); the pair is an ordinary one
    assert {k: tuple(v.shape) for k, v in tensors.items() if k.startswith(name + ".")} == {
        f"{name}.down.weight": (6, 32),
        f"{name}.up.weight": (96, 6),
        f"{name}.up.bias": (96,),
        f"{name}.weight": (1,),
    }


def test_tied_embeddings_stay_tied(saved: Any) -> None:
    folder, _ = saved("llama")
    assert "lm_head.weight" not in on_disk(folder)
    again = load(folder)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    skeleton = meta_model(folder)
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight


def test_a_tied_head_is_refused_and_an_untied_one_works(tiny: Any, factorise: Any, out: Any, tmp_path: Any) -> None:
    with pytest.raises(Refused, match=r"lm_head.*shares its weight"):
        attach(factorise(tiny("llama"), skip=()))
    model = attach(factorise(tiny("llama", tie_word_embeddings=False), 6, skip=()))
    model.save_pretrained(tmp_path)
    assert torch.equal(out(load(tmp_path)), out(model))
    body = AutoModel.from_pretrained(tmp_path)  # has no head: its rank is dropped, the rest is renamed
    assert sorted(body.config.quantization_config.ranks) == sorted(low_rank_layers(body))
    assert torch.equal(out(body), out(model.model))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_body_and_back(kind: str, saved: Any, out: Any, tmp_path: Any) -> None:
    folder, model = saved(kind)
    body = AutoModel.from_pretrained(folder)
    assert torch.equal(out(body), out(model.base_model))
    body.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)  # the head is tied to what the body has
    assert torch.equal(out(whole), out(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate(kind: str, tiny: Any, factorise: Any, ids: torch.Tensor, tmp_path: Any) -> None:
    model = tiny(kind)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, **options)
    attach(factorise(model)).save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).generate(ids, **options), want)


def test_torch_export(saved: Any, out: Any, ids: torch.Tensor) -> None:
    model = load(saved("llama")[0])
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    with torch.no_grad():
        assert torch.equal(program.module()(input_ids=ids, use_cache=False)[0], out(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["method", "function", "never attached"])
def test_dequantize(kind: str, way: str, saved: Any, tiny: Any, factorise: Any, out: Any, tmp_path: Any) -> None:
    folder, model = saved(kind)
    want = out(model)
    if way == "method":
        dense = load(folder).dequantize()
    else:
        dense = dequantize(load(folder) if way == "function" else factorise(tiny(kind), 6))
    assert [type(m) for m in dense.modules()] == [type(m) for m in tiny(kind).modules()]  # Conv1D is Conv1D again
    assert torch.allclose(out(dense), want, atol=2e-5)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert set(on_disk(tmp_path)) == set(tiny(kind).state_dict()) - {"lm_head.weight"}  # no guard is left
    again, info = auto(kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(out(again), out(dense))
    dense.float()  # refused for models flagged as quantised: the flag is gone


def test_dequantize_to_another_type(saved: Any) -> None:
    dense = dequantize(load(saved("llama")[0]), dtype="bfloat16")
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}


def test_a_new_bias_is_kept(tiny: Any, factorise: Any, out: Any, tmp_path: Any) -> None:
    model = factorise(tiny("llama"), 6)
    layer = model.model.layers[0].mlp.up_proj
    shift = torch.randn(48, generator=torch.Generator().manual_seed(3))
    replace_linear(model, "model.layers.0.mlp.up_proj", LowRankLinear.from_factors(layer.up.weight, layer.down.weight, shift))
    attach(model).save_pretrained(tmp_path)
    assert model.config.quantization_config.bias == {"model.layers.0.mlp.up_proj": True}
    again = load(tmp_path)
    assert torch.equal(again.model.layers[0].mlp.up_proj.bias, shift)
    assert torch.equal(out(again), out(model))
    with pytest.raises(Refused, match=r"up_proj has a bias.*no place for one"):
        dequantize(again)
    assert low_rank_layers(again)  # a refusal changes nothing


def test_a_bias_that_is_gone_comes_back_as_zero(tiny: Any, factorise: Any, out: Any, tmp_path: Any) -> None:
    model = factorise(tiny("gpt2"), 6)
    layer = model.transformer.h[1].mlp.c_fc
    replace_linear(model, "transformer.h.1.mlp.c_fc", LowRankLinear.from_factors(layer.up.weight, layer.down.weight))
    attach(model).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.transformer.h[1].mlp.c_fc.bias is None
    want = out(model)
    assert torch.equal(out(again), want)
    dense = dequantize(again)
    assert torch.equal(dense.transformer.h[1].mlp.c_fc.bias, torch.zeros(128))
    assert torch.allclose(out(dense), want, atol=2e-5)


def test_names_that_differ_on_disk(ids: torch.Tensor, out: Any, tmp_path: Any) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)).eval()
    module = "model.language_model.layers.0.self_attn.q_proj"
    replace_linear(model, module, LowRankLinear(32, 32, 4, bias=False))
    attach(model).save_pretrained(tmp_path)
    stored = next(k for k in on_disk(tmp_path) if k.endswith(".down.weight")).removesuffix(".down.weight")
    assert stored != module
    assert torch.equal(out(load(tmp_path)), out(model))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ranks"] = {stored: 4}  # as a tool that only sees the file would write it
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load(tmp_path)
    assert again.config.quantization_config.ranks == {module: 4}
    assert torch.equal(out(again), out(model))


def test_meta_model_is_what_load_gives(saved: Any) -> None:
    for kind in KINDS:
        folder, model = saved(kind)
        state = torch.get_rng_state()
        skeleton = meta_model(folder)
        assert torch.equal(state, torch.get_rng_state())
        assert {p.device.type for p in skeleton.parameters()} == {"meta"}
        assert [(n, type(m)) for n, m in skeleton.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
        assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


class TestAttach:
    def test_it_draws_no_random_number_and_changes_no_weight(self, tiny: Any, factorise: Any) -> None:
        model = factorise(tiny("llama"), 6)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        state = torch.get_rng_state()
        assert attach(model) is model
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_what_contradicts_the_model(self, tiny: Any, factorise: Any) -> None:
        with pytest.raises(UsageError, match="no LowRankLinear"):
            attach(tiny("bert"))
        with pytest.raises(UsageError, match="transformers model"):
            attach(nn.Sequential(LowRankLinear(4, 4, 1)))
        model = factorise(tiny("bert"), 6)
        ranks = {n: m.rank for n, m in low_rank_layers(model).items()}
        attach(model, ranks)
        with pytest.raises(UsageError, match=r"'pooler.dense': None, the model holds 6"):
            attach(model, {n: r for n, r in ranks.items() if n != "pooler.dense"})
        with pytest.raises(UsageError, match=r"'pooler.dense': 7"):
            attach(model, ranks | {"pooler.dense": 7})
        with pytest.raises(UsageError, match=r"bias says 'pooler.dense': False"):
            attach(model, ranks, {"pooler.dense": False})
        with pytest.raises(UsageError, match="plain JSON"):
            attach(model, recipe=object())
        with pytest.raises(UsageError, match="plain JSON"):
            attach(model, score=float("nan"))

    def test_a_layer_the_class_does_not_have(self, tiny: Any, factorise: Any) -> None:
        model = factorise(tiny("bert"), 6)
        model.extra = LowRankLinear(4, 4, 1)
        with pytest.raises(Refused, match="'extra', but BertModel has no such module"):
            attach(model)
        del model.extra
        model.pooler.dense = LowRankLinear(32, 40, 6)
        with pytest.raises(Refused, match=r"pooler.dense: the pair maps \(40, 32\), BertModel expects \(32, 32\)"):
            attach(model)


class TestReplaceLinear:
    def test_it_takes_over_flags(self) -> None:
        model = nn.Sequential(nn.Linear(4, 6)).eval()
        model[0].weight.requires_grad_(False)
        replace_linear(model, "0", LowRankLinear(4, 6, 2))
        assert not model[0].training
        assert [p.requires_grad for p in model[0].parameters()] == [False, False, True]

    def test_what_cannot_be_replaced(self) -> None:
        attention = nn.MultiheadAttention(4, 2)  # reads out_proj.weight itself: a pair would be ignored
        for model, name, words in (
            (nn.Sequential(nn.Linear(4, 6)), "1", "no module"),
            (nn.Sequential(nn.Linear(4, 6)), "0.weight", "no module"),
            (nn.Sequential(nn.Linear(6, 4)), "0", "maps"),
            (nn.Sequential(nn.Embedding(6, 4)), "0", "Embedding"),
            (nn.Sequential(attention), "0.out_proj", "NonDynamicallyQuantizableLinear"),
            (nn.Linear(4, 6), "", "no name"),
        ):
            with pytest.raises(UsageError, match=words):
                replace_linear(model, name, LowRankLinear(4, 6, 2))
        with pytest.raises(Refused, match="offloaded"):
            replace_linear(nn.Sequential(nn.Linear(4, 6, device="meta")), "0", LowRankLinear(4, 6, 2))
