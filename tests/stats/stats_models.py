"""Tiny models for the statistics tests."""

from __future__ import annotations

import torch
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from eckart.catalogue import from_model

VOCAB = 40


def make(name: str):
    """Tiny float64 models, so that oracles can be exact; weights large enough to be far from symmetric."""
    small = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    if name == "llama":
        config = LlamaConfig(
            **small, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True, max_position_embeddings=32
        )
        model = LlamaForCausalLM(config)
    elif name == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0
            )
        )
    elif name == "bert":
        model = BertModel(BertConfig(**small, num_attention_heads=2, max_position_embeddings=32))
    else:
        model = AlbertModel(
            AlbertConfig(**small | {"num_hidden_layers": 3}, embedding_size=8, num_attention_heads=2, max_position_embeddings=32)
        )
    with torch.no_grad():
        g = torch.Generator().manual_seed(5)
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model.double().train()  # train mode: collecting must leave it, and must not drop out


def linears(model, example=None):
    return [s for s in from_model(model, torch.zeros(1, 4, dtype=torch.long) if example is None else example).sites if s.kind == "linear"]
