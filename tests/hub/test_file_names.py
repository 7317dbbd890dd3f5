"""Names of the file against what transformers itself loads under each name of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    ViTConfig,
    ViTModel,
)  # fmt: skip

from eckart.hub.load import meta_model
from eckart.hub.names import file_names

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SMALL, "vocab_size": 30, "max_position_embeddings": 16}
MODELS: dict[str, Any] = {
    "bert": lambda: BertModel(BertConfig(**TEXT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TEXT)),
    "vit": lambda: ViTModel(ViTConfig(**SMALL, image_size=8, patch_size=4)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=3, num_key_value_heads=1)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**TEXT, num_experts=3, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts_per_tok=2)
    ),
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_tensor_is_found_and_holds_the_same_numbers(kind: str, tmp_path: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = file_names(meta_model(tmp_path), stored)
    state = model.state_dict()
    tied = {"lm_head.weight"} if kind == "gpt2" else set()
    assert set(names) == set(state) - tied
    assert sorted(k for keys in names.values() for k in keys) == sorted(stored)
    for name, keys in names.items():
        found = torch.cat([stored[k].flatten() for k in keys])
        assert torch.equal(found, state[name].flatten()), name


def test_tensors_of_another_model_are_left_out() -> None:
    with torch.device("meta"):
        model = MODELS["bert"]()
    assert file_names(model, ["nothing.weight", "bert.encoder.layer.0.output.dense.bias"]) == {
        "encoder.layer.0.output.dense.bias": ("bert.encoder.layer.0.output.dense.bias",)
    }
