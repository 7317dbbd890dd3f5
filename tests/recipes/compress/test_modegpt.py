"""Smaller dense matrices: exact where there is nothing to lose, least squares where there is, and loadable by whoever can."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import eckart as ek
from eckart.axes import Budget, Bundle, Site, allocate, form, group, score
from eckart.axes.group import pack
from eckart.axes.protocols import World
from eckart.axes.solve import cost, solve
from eckart.errors import Refused
from eckart.hub.attach import dequantize
from eckart.nn.heads import narrowed
from eckart.stats.moments import moments

G = torch.Generator().manual_seed(0)
HALF = ek.get_recipe("modegpt").with_(allocate=allocate.Uniform(), score=score.PredictedLoss(), budget=Budget(rank=0.5))
READ = HALF.with_(form=form.Smaller(by="energy"))  # leverage scores look at the units alone, not at who reads them


def redundant(kind):
    """A model of which half of every MLP and of every head does nothing, at random places."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            more = {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "vocab_size": 40, "max_position_embeddings": 32}
            model = LlamaForCausalLM(LlamaConfig(**small, **more))
        elif kind == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
            )
        else:
            model = BertModel(BertConfig(vocab_size=40, max_position_embeddings=32, **small))
        for name, p in model.named_parameters():
            if name.endswith("bias") or (p.ndim == 2 and "embed" not in name):
                nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        for i in range(2):
            if kind == "llama":
                layer = model.model.layers[i]
                a, m = layer.self_attn, layer.mlp
                drop_rotary(a, 4, 2)
                thin(a.v_proj, a.o_proj, 2, 8)
                m.down_proj.weight[:, torch.randperm(48, generator=G)[:24]] = 0
            elif kind == "bert":
                layer = model.encoder.layer[i]
                a = layer.attention.self
                for h in range(4):
                    gone = torch.randperm(8, generator=G)[:4] + 8 * h
                    a.query.weight[gone], a.query.bias[gone] = 0, 0
                thin(a.value, layer.attention.output.dense, 4, 8)
                layer.output.dense.weight[:, torch.randperm(48, generator=G)[:24]] = 0
            else:
                layer = model.transformer.h[i]
                for h in range(4):
                    gone = torch.randperm(8, generator=G)[:4] + 8 * h
                    layer.attn.c_attn.weight[:, gone], layer.attn.c_attn.bias[gone] = 0, 0
                value = layer.attn.c_attn.weight[:, 64:].reshape(32, 4, 8).clone()
                value[:, :, 4:] = value[:, :, :4] @ torch.randn(4, 4, generator=G)
                layer.attn.c_attn.weight[:, 64:] = value.reshape(32, 32)
                layer.attn.c_attn.bias[64:] = 0
                layer.mlp.c_proj.weight[torch.randperm(128, generator=G)[:64]] = 0
    return model.eval()


def drop_rotary(attention, heads, kv):
    """The same two of four frequencies are gone from all query heads."""
    pairs = torch.randperm(4, generator=G)[:2]
    for h in range(heads):
        for i in torch.cat([pairs, pairs + 4]) + 8 * h:
            attention.q_proj.weight[i], attention.q_proj.bias[i] = 0, 0


def thin(value, output, heads, width):
    """Values of each head in a subspace of half its width, seen from the output through all of it."""
    for h in range(heads):
        rows = slice(h * width, (h + 1) * width)
        basis = torch.randn(width, width // 2, generator=G)
        value.weight[rows] = basis @ torch.randn(width // 2, value.in_features, generator=G) * 0.2
        value.bias[rows] = basis @ torch.randn(width // 2, generator=G) * 0.2


@pytest.fixture(scope="module")
def ids():
    return [torch.randint(3, 40, (16,), generator=G).tolist() for _ in range(24)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_half_that_does_nothing_is_dropped_without_loss(kind, ids, tmp_path) -> None:
    model = redundant(kind)
    model.save_pretrained(tmp_path / "model")
    made = ek.compress(tmp_path / "model", READ, calib=ids, out=tmp_path / "small")
    assert all(j.state == "factored" for j in made.plan.jobs)
    small = ek.load(tmp_path / "small")
    assert {h["head_dim"] for h in narrowed(small).values()} == {4}
    x = torch.tensor(ids[:3])
    with torch.no_grad():
        a, b = model(x)[0], small(x)[0]
    assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))
    whole = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    assert sum(p.numel() for n, p in small.named_parameters() if "embed" not in n) < 0.62 * whole


def test_cache_of_narrower_heads_and_generation(ids, tmp_path) -> None:
    redundant("llama").save_pretrained(tmp_path / "model")
    made = ek.compress(tmp_path / "model", READ, calib=ids, out=tmp_path / "small")
    small = ek.load(made.path)
    x = torch.tensor(ids[:1])
    with torch.no_grad():
        cache = small(x, use_cache=True).past_key_values
        assert cache.layers[0].keys.shape == (1, 2, 16, 4)
        step = small(x[:, -1:], past_key_values=small(x[:, :-1], use_cache=True).past_key_values)[0][:, -1]
        assert torch.allclose(step, small(x)[0][:, -1], atol=1e-4)
        assert small.generate(x, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 20)


def test_equal_mlps_load_without_us(ids, tmp_path) -> None:
    redundant("llama").save_pretrained(tmp_path / "model")
    made = ek.compress(tmp_path / "model", HALF.with_(group=group.Channels(attention=False)), calib=ids, out=tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["intermediate_size"] == 24
    assert "quantization_config" not in config
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(plain.model.layers[0].mlp.down_proj) is nn.Linear
    assert made.report["form"] == "plain"
    assert "q_proj" in " ".join(made.plan.skipped)


def test_unequal_mlps_load_with_us_and_loudly_fail_without(ids, tmp_path) -> None:
    redundant("llama").save_pretrained(tmp_path / "model")
    recipe = HALF.with_(group=group.Channels(attention=False), allocate=allocate.WaterFill())
    ek.compress(tmp_path / "model", recipe, 0.63, calib=ids, out=tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 2
    assert len({tuple(v) for v in config["quantization_config"]["shapes"].values()}) > 2
    small = ek.load(tmp_path / "small")
    del config["quantization_config"]
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="size mismatch|mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with pytest.raises(Refused, match="smaller than in its class"):
        dequantize(small)


SITES = (
    Site("up", (20, 8), ("up.weight",), bias="up.bias", dtype="F64"),
    Site("down", (6, 20), ("down.weight",), bias="down.bias", dtype="F64"),
)
MLP = Bundle("{up,down}", SITES)


def mlp_case(bias=True):
    weights = {s.name: torch.randn(*s.shape, generator=G, dtype=torch.float64) for s in SITES}
    biases = {f"{s.name}.bias": torch.randn(s.shape[0], generator=G, dtype=torch.float64) for s in SITES}
    z = torch.relu(torch.randn(300, 8, generator=G, dtype=torch.float64) @ weights["up"].T + biases["up.bias"])
    sites = SITES if bias else tuple(Site(s.name, s.shape, s.tensors, dtype="F64") for s in SITES)
    return Bundle(MLP.name, sites), weights, biases, z


@pytest.mark.parametrize("by", ["leverage", "greedy", "energy"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_reads_the_units_is_refitted_by_least_squares(by, bias) -> None:
    bundle, weights, biases, z = mlp_case(bias)

    class Known:
        def get(self, stat, site):
            return moments(z)

    edits = solve(HALF.with_(form=form.Smaller(by=by)), bundle, lambda s: weights[s.name], lambda k: biases[k], Known(), rank=9)
    up = edits.tensors["up.weight"]
    kept = [int((weights["up"] == row).all(1).nonzero()) for row in up]
    assert kept == sorted(kept)
    y = (z @ weights["down"].T + (biases["down.bias"] if bias else 0)).numpy()
    x = np.concatenate([z[:, kept].numpy(), *([np.ones((300, 1))] if bias else [])], axis=1)
    fit, *_ = np.linalg.lstsq(x, y, rcond=None)
    assert np.allclose(edits.tensors["down.weight"].numpy(), fit[:9].T, atol=1e-6)
    if bias:
        assert np.allclose(edits.tensors["down.bias"].numpy(), fit[9], atol=1e-6)
        assert torch.equal(edits.tensors["up.bias"], biases["up.bias"][kept])
    assert edits.record["loss"] == pytest.approx(float(((y - x @ fit) ** 2).sum() / 300), rel=1e-5)
    made = HALF.form.outcome(bundle, 9, False).tensors
    assert {k: tuple(t.shape) for k, t in edits.tensors.items()} == {k: m.shape for k, m in made.items()}
    stored = sum(t.numel() for k, t in edits.tensors.items() if k != "down.bias")
    assert cost(HALF, bundle).at(9) == stored


def channels(sites, config=None, shapes=None, **settings):
    return pack(group.Channels(**settings), sites, World(lambda s: torch.zeros(s.shape), Budget(keep=0.5), shapes or {}, config or {}))


def test_a_norm_over_the_hidden_units_is_noticed() -> None:
    sites = [Site(f"l.0.mlp.{s.name}_proj", s.shape, (f"l.0.mlp.{s.name}_proj.weight",), block=0) for s in SITES]
    found, left = channels(sites)
    assert [b.name for b in found] == ["l.0.mlp.{up_proj,down_proj}"]
    found, left = channels(sites, shapes={"l.0.mlp.norm.weight": (20,), "l.1.mlp.norm.weight": (20,)})
    assert found == []
    assert left["l.0.mlp.up_proj"] == "l.0.mlp.norm.weight spans its hidden units too"


def test_what_is_no_mlp_or_attention_is_named() -> None:
    sites = [Site(n, (8, 8), (f"{n}.weight",)) for n in ("a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "head")]
    found, left = channels(sites)
    assert found == []
    assert "how many attention heads" in left["a.q_proj"]
    assert "belongs to no MLP" in left["head"]
    found, left = channels(sites, {"num_attention_heads": 2})
    assert found[0].facts == (("heads", 2), ("kv", 2), ("width", 4), ("rope", 0), ("fused", 0))
    assert left == {"head": "belongs to no MLP or attention whose channels are known"}


def test_block_influence_decides_which_block_loses_most(ids, tmp_path) -> None:
    redundant("llama").save_pretrained(tmp_path / "model")
    made = ek.compress(tmp_path / "model", "modegpt", 0.5, calib=ids)
    found = {b: float(made.stats.get(score.INFLUENCE, Site(f"model.layers.{b}.mlp.up_proj", (1, 1), (), block=b))[0]) for b in (0, 1)}
    kept = {
        b: sum(j.after for j in made.plan.jobs if f".{b}." in j.name) / sum(j.before for j in made.plan.jobs if f".{b}." in j.name)
        for b in (0, 1)
    }
    assert (kept[0] > kept[1]) == (found[0] > found[1])
