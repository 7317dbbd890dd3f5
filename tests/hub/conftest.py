"""Tiny random models of three families, and their exact or truncated factors by torch's float64 SVD."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eckart.hub.attach import attach
from eckart.nn import LowRankLinear
from eckart.nn.surgery import factorable, replace_linear

SIZE = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}


def _config(kind: str, **more: Any) -> Any:
    if kind == "llama":  # grouped-query attention, biases on q/k/v/o, none on the MLP, tied embeddings
        from transformers import LlamaConfig

        options = {"attention_bias": True, "tie_word_embeddings": True, "pad_token_id": 0, "max_position_embeddings": 64}
        return LlamaConfig(**{**SIZE, "num_key_value_heads": 2, **options, **more})
    if kind == "bert":
        from transformers import BertConfig

        return BertConfig(**{**SIZE, "max_position_embeddings": 64, **more})
    from transformers import GPT2Config

    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2Config(**{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96, **ends, **more})


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """tiny("llama" | "bert" | "gpt2", **config) -> a fresh dense model, always with the same weights; biases are not zero."""
    from transformers import BertModel, GPT2LMHeadModel, LlamaForCausalLM

    classes = {"llama": LlamaForCausalLM, "bert": BertModel, "gpt2": GPT2LMHeadModel}

    def make(kind: str, **config: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = classes[kind](_config(kind, **config)).eval()
            for name, parameter in model.named_parameters():
                nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.05)
                if "norm" in name.lower() or "ln_" in name:
                    nn.init.normal_(parameter, mean=1.0, std=0.1) if name.endswith("weight") else nn.init.zeros_(parameter)
        return model

    return make


@pytest.fixture(scope="session")
def factorise() -> Callable[..., Any]:
    """factorise(model, rank=None, skip=("lm_head",)) -> the model, every linear layer now a pair of factors; rank None is exact."""

    def run(model: Any, rank: int | None = None, skip: tuple[str, ...] = ("lm_head",)) -> Any:
        for name, module in list(model.named_modules()):
            if not factorable(module) or name in skip:
                continue
            weight = module.weight.detach().double()
            u, s, vh = torch.linalg.svd(weight if type(module) is nn.Linear else weight.T, full_matrices=False)
            r = rank or len(s)
            up, down = (u[:, :r] * s[:r].sqrt()).float(), (s[:r].sqrt()[:, None] * vh[:r]).float()
            replace_linear(model, name, LowRankLinear.from_factors(up, down, module.bias))
        return model

    return run


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def out(ids: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """Logits, or hidden states, of a model on `ids`."""

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids)[0]

    return run


@pytest.fixture(scope="session")
def saved(tiny: Any, factorise: Any, out: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """saved(kind) -> (folder of a model at rank 6 in small shards, that model in memory). Do not change either."""
    done: dict[str, tuple[Path, Any]] = {}

    def run(kind: str) -> tuple[Path, Any]:
        if kind not in done:
            model = attach(factorise(tiny(kind), 6), recipe="svd")
            folder = tmp_path_factory.mktemp("saved") / kind
            model.save_pretrained(folder, max_shard_size="12KB")
            done[kind] = folder, model
        return done[kind][0], copy.deepcopy(done[kind][1])

    return run
