"""Other shapes of model: transposed storage, encoders, and what cannot be factored is named instead of failing."""

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import eckart as ek
from eckart.nn import LowRankLinear


def make(kind: str, folder):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
            )
        else:
            sizes = {
                "hidden_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 96,
                "max_position_embeddings": 64,
            }
            model = BertModel(BertConfig(vocab_size=96, **sizes))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("recipe", ["svd_llm", "two_sided", "afm"])
def test_compresses_saves_and_reloads(kind, recipe, token_ids, tmp_path) -> None:
    source = make(kind, tmp_path / "model")
    made = ek.compress(source, recipe, 0.6, calib=token_ids, out=tmp_path / "small")
    small = ek.load(made.path)
    pairs = {n for n, m in small.named_modules() if isinstance(m, LowRankLinear)}
    assert pairs == {j.name for j in made.plan.jobs if j.state == "factored"}
    assert not any("pooler" in n for n in pairs)
    ids = torch.tensor(token_ids[:2])
    with torch.no_grad():
        memory = ek.compress(source, recipe, 0.6, calib=token_ids, stats=made.stats).model
        a, b = small(ids)[0], memory(ids)[0]
    assert torch.allclose(a, b, atol=1e-5)
    assert ek.verify(made.path, source).ok


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_nearly_full_rank_gives_back_the_model(kind, token_ids, tmp_path) -> None:
    """At the largest rank that still saves parameters the output moves little; a transposed matrix read the wrong way would not pass."""
    source = make(kind, tmp_path / "model")
    ids = torch.tensor(token_ids[:2])
    original = ek.load(source)
    made = ek.compress(source, "svd_llm", 0.97, calib=token_ids)
    rough = ek.compress(source, "svd_llm", 0.3, calib=token_ids, stats=made.stats)
    with torch.no_grad():
        whole = original(ids)[0]
        near, far = (torch.dist(m.model(ids)[0], whole) / whole.norm() for m in (made, rough))
    assert near < 0.5 * far


def test_a_folder_without_an_architecture_is_read_by_names(tmp_path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "bare").mkdir()
    g = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.up.weight": torch.randn(64, 32, generator=g) for i in range(2)} | {
        "embed.weight": torch.randn(10, 32, generator=g)
    }
    save_file(tensors, tmp_path / "bare" / "model.safetensors")
    made = ek.compress(tmp_path / "bare", "svd", 0.5, out=tmp_path / "small")
    assert [j.name for j in made.plan.jobs] == ["layers.0.up", "layers.1.up"]
    assert ek.verify(made.path, tmp_path / "bare").ok


def test_plain_automodel_opens_an_encoder(token_ids, tmp_path) -> None:
    source = make("bert", tmp_path / "model")
    ek.compress(source, "svd", 0.5, out=tmp_path / "small")
    assert any(isinstance(m, LowRankLinear) for m in AutoModel.from_pretrained(tmp_path / "small").modules())
