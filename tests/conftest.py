"""Models that several test files share. Nothing here is downloaded."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def lm_folder():
    """The small language model that ships with the package."""
    import eckart as ek

    return ek.demo_model()


@pytest.fixture(scope="session")
def calib(lm_folder):
    """A few of the shipped calibration texts, short enough to be quick."""
    from eckart.data import load_texts

    return [t[:1200] for t in load_texts(lm_folder / "calibration.jsonl")[:12]]


@pytest.fixture(scope="session")
def heldout(lm_folder):
    """A few held-out texts."""
    from eckart.data import load_texts

    return [t[:1500] for t in load_texts(lm_folder / "heldout.jsonl")[:16]]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A random Llama with grouped-query attention and biases, as a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    config = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attention_bias=True, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def token_ids():
    """Calibration as token ids, for models without a tokenizer."""
    import torch

    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (24,), generator=g).tolist() for _ in range(40)]
