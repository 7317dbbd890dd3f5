"""Narrower heads: what is allowed computes what the full width with zeros in the dropped dimensions computes; everything else is refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, GPT2Config, GPT2Model, GPTNeoXConfig, GPTNeoXModel, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model
from transformers.models.bert.modeling_bert import BertSelfAttention

from eckart.errors import Refused
from eckart.nn.heads import check_narrowing, head_attribute, narrow, narrowed

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 40}
QKVO = {p: f"{p}_proj" for p in "qkvo"}


def build(cls, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(config).eval()


def llama(**more):
    return build(LlamaModel, LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=32, **more))


def test_llama_with_grouped_queries_can_be_cut() -> None:
    attention = llama(attention_bias=True).layers[0].self_attn
    before = {k: v.clone() for k, v in attention.state_dict().items()}
    check_narrowing(attention, QKVO, 4, 2, True)
    assert all(torch.equal(v, before[k]) for k, v in attention.state_dict().items())
    assert attention.head_dim == 8


def test_the_check_works_without_weights() -> None:
    with torch.device("meta"):
        attention = LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=2)).layers[0].self_attn
    check_narrowing(attention, QKVO, 4, 2, True)


def test_bert_and_gpt2_can_be_cut() -> None:
    attention = build(BertSelfAttention, BertConfig(**SMALL))
    check_narrowing(attention, {"q": "query", "k": "key", "v": "value"}, 4, 4, False)
    attention = build(GPT2Model, GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=40)).h[0].attn
    check_narrowing(attention, {"qkv": "c_attn", "o": "c_proj"}, 4, 4, False)


def test_normalised_heads_are_refused() -> None:
    attention = build(Qwen3Model, Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)).layers[0].self_attn
    with pytest.raises(Refused, match="Qwen3Attention: its heads cannot be cut"):
        check_narrowing(attention, QKVO, 4, 2, True)


def test_interleaved_rotary_codes_are_refused() -> None:
    from transformers import CohereConfig, CohereModel

    config = CohereConfig(**SMALL, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    attention = build(CohereModel, config).layers[0].self_attn
    with pytest.raises(Refused, match="depends on all dimensions"):
        check_narrowing(attention, QKVO, 4, 2, True)


def test_woven_heads_without_the_attribute_are_refused() -> None:
    attention = build(GPTNeoXModel, GPTNeoXConfig(**SMALL)).layers[0].attention
    with pytest.raises(Refused, match="cannot be changed"):
        check_narrowing(attention, {"qkv": "query_key_value", "o": "dense"}, 4, 4, True)
    assert head_attribute(nn.MultiheadAttention(8, 2)) is None


def test_heads_that_are_too_narrow_are_refused() -> None:
    attention = build(BertSelfAttention, BertConfig(**SMALL | {"hidden_size": 8}))
    with pytest.raises(Refused, match="too narrow"):
        check_narrowing(attention, {"q": "query", "k": "key", "v": "value"}, 4, 4, False)


def test_narrowing_is_remembered_copied_and_cuts_rotary_codes_by_name_or_position() -> None:
    model = llama()
    attention = model.layers[0].self_attn
    for part, heads in (("q", 4), ("k", 2), ("v", 2)):
        layer = attention.get_submodule(QKVO[part])
        layer.weight = nn.Parameter(layer.weight.reshape(heads, 8, 32)[:, [0, 3, 4, 7]].reshape(-1, 32).detach())
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.reshape(32, 4, 8)[..., :4].reshape(32, 16).detach())
    narrow(attention, 4, [0, 3, 4, 7])
    assert narrowed(model) == {"layers.0.self_attn": {"head_dim": 4, "rope": [0, 3, 4, 7]}}
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        out = model(ids).last_hidden_state
        assert torch.equal(copy.deepcopy(model)(ids).last_hidden_state, out)
        x, codes = torch.randn(1, 3, 32), model.rotary_emb(torch.zeros(1, 3, 32), torch.arange(3)[None])
        assert torch.equal(attention(x, codes, None)[0], attention(x, position_embeddings=codes, attention_mask=None)[0])
    assert attention.scaling == 8**-0.5  # of the original width: scores are those of the full heads
    cache = model(ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (1, 2, 3, 4)  # and the cache is smaller too
