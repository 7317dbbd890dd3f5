"""Other shapes of model: transposed and fused storage, encoders, vision, experts, other names on disk; what is left alone is named."""

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTModel,
)

import eckart as ek
from eckart.nn import LowRankLinear
from eckart.nn.quantised import quantised_layers
from eckart.nn.surgery import factored_layers, shared_groups

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {**SMALL, "vocab_size": 96, "max_position_embeddings": 64}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "bert": lambda: BertModel(BertConfig(**TEXT)),
    "vit": lambda: ViTModel(ViTConfig(**SMALL, image_size=16, patch_size=4)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TEXT)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT, num_key_value_heads=2)),  # grouped queries, biases on q, k and v alone
    "llama": lambda: LlamaForCausalLM(  # a head that is the embedding, grouped queries, biases in attention and MLP
        LlamaConfig(**TEXT, num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)),
}


def make(kind: str, folder):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MODELS[kind]().save_pretrained(folder)
    return folder


def pixels():
    return [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def result(model, calib):
    with torch.no_grad():
        found = model(calib[0] if isinstance(calib[0], torch.Tensor) else torch.tensor(calib[:2]))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("recipe", ["two_sided", "afm", "basis_sharing", "modegpt"])
def test_compresses_saves_and_reloads(kind, recipe, token_ids, tmp_path) -> None:
    source = make(kind, tmp_path / "model")
    calib = pixels() if kind == "vit" else token_ids
    made = ek.compress(source, recipe, 0.6, calib=calib, out=tmp_path / "small")
    small, memory = ek.load(made.path), ek.compress(source, recipe, 0.6, calib=calib, stats=made.stats).model
    assert torch.equal(result(small, calib), result(memory, calib))
    memory.save_pretrained(tmp_path / "again")
    assert torch.equal(result(ek.load(tmp_path / "again"), calib), result(memory, calib))
    assert ek.verify(made.path, source).ok
    stored = sum(p.numel() for p in small.parameters())
    assert stored == made.report["sizes"]["total_after"]
    assert made.plan.after <= 0.6 * made.plan.before
    changed = {r["name"] for r in made.report["layers"] if r["state"] == "factored"}
    if recipe != "modegpt":
        assert set(factored_layers(small)) == changed
    assert bool(shared_groups(small)) == (recipe == "basis_sharing")
    left = {r["name"]: r["reason"] for r in made.report["layers"] if r["state"] == "skipped"}
    assert not any("pooler" in n for n in changed)
    assert all(left.values())
    matrices = {n for n, m in ek.load(source).named_modules() if type(m).__name__ in ("Linear", "Conv1D", "Conv2d")}
    assert matrices <= {r["name"] for r in made.report["layers"]}  # nothing goes unsaid
    if kind == "mixtral":
        assert "4 experts in one stack" in left["model.layers.0.mlp.experts.gate_up_proj"]
    if (kind, recipe) == ("gpt_neox", "modegpt"):
        assert "woven" in left["gpt_neox.layers.0.attention.query_key_value"]


@pytest.mark.parametrize("kind", list(MODELS))
def test_integers_save_and_reload(kind, token_ids, tmp_path) -> None:
    """Pairs and what stays dense in int8; the head that is an embedding, tables and stacks of experts are left as they are."""
    source = make(kind, tmp_path / "model")
    calib = pixels() if kind == "vit" else token_ids
    made = ek.compress(source, "svd", 0.6, out=tmp_path / "small", quantise="int8")
    small, memory = ek.load(made.path), ek.compress(source, "svd", 0.6, quantise="int8").model
    assert torch.equal(result(small, calib), result(memory, calib))
    memory.save_pretrained(tmp_path / "again")
    assert torch.equal(result(ek.load(tmp_path / "again"), calib), result(memory, calib))
    assert ek.verify(made.path, source).ok
    changed = {r["name"] for r in made.report["layers"] if r["state"] == "factored"}
    assert {n.rpartition(".")[0] for n in quantised_layers(small) if n.endswith((".down", ".up"))} == changed
    assert torch.isfinite(result(small, calib)).all()


@pytest.mark.parametrize("kind", ["mixtral"])
def test_experts_merge(kind, token_ids, tmp_path) -> None:
    source = make(kind, tmp_path / "model")
    made = ek.compress(source, "sub_moe", 0.75, calib=token_ids, out=tmp_path / "small")
    small = AutoModel.from_pretrained(made.path)
    assert small.config.num_local_experts == 3
    assert made.report["form"] == "plain"


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
