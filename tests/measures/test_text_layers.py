"""Measures of linear layers and attention under text: outlier ratio, KV spectra, and ZD, which needs none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from eckart.axes.protocols import Site
from eckart.catalogue import Catalogue, from_model
from eckart.measures import kv_spectra as kv_file
from eckart.measures._kv import groups_of, layers_of
from eckart.measures._watch import attention_role
from eckart.measures.base import CheckpointView, TextView
from eckart.measures.kv_spectra import MEASURE as KV
from eckart.measures.outlier_ratio import MEASURE as OUTLIERS
from eckart.measures.zd import MEASURE as ZD
from tests.measures.text_models import KINDS, make, run, states, texts, view_of


def rank90(s: np.ndarray) -> int:
    return int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9 - 1e-12) + 1)


# ---- OWL


@pytest.mark.parametrize("kind", KINDS)
def test_outlier_ratio_is_owl_s_score(kind) -> None:
    model, ids = make(kind), texts()
    with torch.no_grad():
        for p in model.parameters():
            p[p.abs() < p.abs().quantile(0.7)] *= 0.1  # heavy tails, so that there are outliers
    found = run(model, OUTLIERS, ids)
    view = view_of(model, len(ids))
    scores: dict[str, np.ndarray] = {}
    for site in view.sites:
        if kind in ("bert", "albert") and "pooler" in site.name:
            continue
        weight = model.get_submodule(site.name).weight.detach()
        weight = (weight.T if site.view == "transposed" else weight).numpy()
        x = torch.cat(states(model, ids, site.name, "in")).numpy()
        scores[site.name] = np.abs(weight) * np.sqrt((x**2).sum(0))
        a = scores[site.name]
        assert found[site.name].value == pytest.approx(100 * (a > 5 * a.mean()).mean(), abs=1e-9)
    for i, block in enumerate(view.catalogue.blocks):
        a = np.concatenate([scores[s.name].ravel() for s in view.sites if s.block == i])
        assert found[block].value == pytest.approx(100 * (a > 5 * a.mean()).mean(), abs=1e-9)
        assert found[block].settings["scope"] == "block"
    assert max(r.value for r in found.values()) > 0


def test_outlier_ratio_does_not_depend_on_scale_and_finds_planted_outliers() -> None:
    net = nn.Sequential(nn.Linear(100, 100, bias=False))
    weight = torch.rand(100, 100, generator=torch.Generator().manual_seed(0)) + 0.5
    x = torch.ones(3, 100)
    weight[:3, :2] = 60.0
    for scale in (1.0, 1e-6):
        with torch.no_grad():
            net[0].weight.copy_(weight * scale)
        assert run(net, OUTLIERS, rows=[x], ids=[[0]] * 3)["0"].value == pytest.approx(100 * 6 / 10_000)
    x[:, 7] = 5000.0  # one input channel is huge: all its weights stand out, and nothing else does any more
    assert run(net, OUTLIERS, rows=[x], ids=[[0]] * 3)["0"].value == pytest.approx(1.0)


def test_outlier_ratio_of_layers_that_cannot_be_scored() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2), "idle": nn.Linear(2, 2)}) for _ in range(2))
            self.zero, self.bad = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer["a"](x)
            self.zero(x)
            self.bad(x)
            return x

    net = Net()
    with torch.no_grad():
        net.zero.weight.zero_()
        net.bad.weight[0, 0] = float("inf")
    found = run(net, OUTLIERS, rows=[torch.eye(2)], ids=[[0]] * 2)
    assert found["layers.0.a"].valid
    assert found["layers.0.idle"].note == "no row of text passed this module"
    assert found["layers.0"].note == "layers.0.idle: no row of text passed this module"
    assert found["zero"].note == "every weight or every input is zero"
    assert found["bad"].note == "the weight is not of finite real numbers"
    empty = run(nn.Sequential(nn.ReLU(), nn.Embedding(3, 2)), OUTLIERS, rows=[], ids=[])
    assert empty[""].note == "the run holds no linear layer"


def test_outlier_ratio_in_half_precision_reads_the_stored_weight() -> None:
    model = make("llama")
    full, half = (run(m, OUTLIERS)["model.layers.0"].value for m in (model, model.to(torch.bfloat16)))
    assert half == pytest.approx(full, abs=0.5)


# ---- KV spectra


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_keys_and_values_are_those_of_the_projections(kind) -> None:
    model, ids = make(kind), texts()
    found = run(model, KV, ids)
    names = [k for k in found if k]
    key, value = ("k_proj", "v_proj") if kind == "llama" else ("key", "value")
    assert len(names) == 2
    rows = {(n, p): [h.numpy() for h in states(model, ids, f"{n}.{p}")] for n in names for p in (key, value)}
    for part, label in ((key, "key"), (value, "value")):
        own = []
        for name in names:
            s = np.linalg.svd(np.concatenate(rows[name, part]), compute_uv=False)
            own.append(s)
            got = found[name].value
            p = s / s.sum()
            assert got[f"{label}_width"] == (8 if kind == "llama" else 16)  # grouped queries: two of four heads
            assert got[f"{label}_rank90"] == rank90(s)
            assert got[f"{label}_effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)
            assert got[f"{label}_spectrum"] == pytest.approx((s / s[0])[np.array(got[f"{label}_spectrum_at"]) - 1].tolist(), abs=1e-7)
            each = [rank90(np.linalg.svd(h, compute_uv=False)) for h in rows[name, part]]
            assert got[f"{label}_prompt_rank90"] == pytest.approx(np.mean(each))
            assert found[name].settings["rows"] == 47
        both = [np.concatenate([a, b], 1) for a, b in zip(*(rows[n, part] for n in names), strict=True)]
        whole = found[""].value
        assert whole[f"{label}_joint_rank90"] == [rank90(np.linalg.svd(np.concatenate(both), compute_uv=False))]
        assert whole[f"{label}_apart_rank90"] == [rank90(np.sort(np.concatenate(own))[::-1])]
        assert whole[f"{label}_joint_prompt_rank90"] == [pytest.approx(np.mean([rank90(np.linalg.svd(b, compute_uv=False)) for b in both]))]
    assert found[""].settings["groups"] == [names]
    assert ("keeps no cache" in found[names[0]].note) == (kind == "bert")


def test_fused_projections_are_split_as_the_model_splits_them() -> None:
    model, ids = make("gpt2"), texts()
    found = run(model, KV, ids)["transformer.h.0.attn"].value
    fused = torch.cat(states(model, ids, "transformer.h.0.attn.c_attn")).numpy()
    for label, columns in (("key", slice(16, 32)), ("value", slice(32, 48))):
        assert found[f"{label}_rank90"] == rank90(np.linalg.svd(fused[:, columns], compute_uv=False))


def test_interleaved_projections_give_the_cache_of_the_model_itself() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8, max_position_embeddings=32
        )
        model = GPTNeoXForCausalLM(config).double().eval()
    row = texts((11,))[0]
    found = run(model, KV, [row])["gpt_neox.layers.0.attention"].value
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([row]), use_cache=True).past_key_values
    values = cache.layers[0].values[0].transpose(0, 1).reshape(11, 16).numpy()  # values are not rotated
    s = np.linalg.svd(values, compute_uv=False)
    assert found["value_spectrum"] == pytest.approx((s / s[0])[np.array(found["value_spectrum_at"]) - 1].tolist(), abs=1e-6)


def layer_of(name: str, out: int, config: dict, part: str):
    site = Site(f"{name}.{part}", (out, 16), (f"{name}.{part}.weight",), block=0)
    return layers_of(TextView(Catalogue((site,), blocks=("b",)), [site], config, True, 1))[0]


def test_layouts_with_grouped_queries_latents_and_unknown_ones() -> None:
    phi = layer_of("l.0.self_attn", 24, {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 16}, "qkv_proj")
    assert (phi.parts["key"][1], phi.parts["value"][1]) == (list(range(16, 20)), list(range(20, 24)))
    latent = layer_of("l.0.self_attn", 24, {"kv_lora_rank": 16}, "kv_a_proj_with_mqa")
    assert (latent.widths, latent.parts["key"][1]) == ({"key": 16}, list(range(16)))
    assert "kv_lora_rank" in layer_of("l.0.self_attn", 24, {}, "kv_a_proj_with_mqa").reason
    assert "how falcon lays out" in layer_of("l.0.self_attention", 24, {"model_type": "falcon"}, "query_key_value").reason
    assert "cannot be split" in layer_of("l.0.attn", 25, {}, "c_attn").reason
    inner = layer_of("l.0.attn", 48, {"text_config": {"num_attention_heads": 4, "hidden_size": 16}}, "Wqkv")
    assert inner.widths == {"key": 16, "value": 16}


def test_layers_are_grouped_by_four_of_one_width() -> None:
    sites = [Site(f"l.{i}.attn.k_proj", (8 if i < 6 else 4, 16), ("w",), block=i) for i in range(7)]
    view = TextView(Catalogue(tuple(sites)), sites, {}, True, 1)
    assert [[x.name[2] for x in g] for g in groups_of(view, layers_of(view), 4)] == [list("0123"), list("45"), ["6"]]


def test_wide_groups_are_measured_apart_and_a_lost_layer_alone_is_lost(monkeypatch) -> None:
    model, ids = make("llama"), texts()
    whole = run(model, KV, ids)
    monkeypatch.setattr(kv_file, "WIDEST", 8)
    apart = run(model, KV, ids)
    for name, value in whole["model.layers.0.self_attn"].value.items():
        assert apart["model.layers.0.self_attn"].value[name] == pytest.approx(value, rel=1e-9)
    assert (apart[""].valid, apart[""].note) == (False, "no group of two or more neighbouring layers was seen together")
    monkeypatch.undo()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    lost = run(model, KV, ids)
    assert lost["model.layers.0.self_attn"].value["key_rank90"] == whole["model.layers.0.self_attn"].value["key_rank90"]
    assert "NaN or Inf" in lost["model.layers.1.self_attn"].note


def test_layers_with_the_same_keys_share_all_directions_others_none() -> None:
    class Layer(nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({"k_proj": nn.Linear(16, 8, bias=False), "v_proj": nn.Linear(16, 8, bias=False)})
            for m in self.attn.values():
                m.weight.data.copy_(weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn["k_proj"](x) + self.attn["v_proj"](x)

    class Net(nn.Module):
        def __init__(self, weights: list[torch.Tensor]) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(w) for w in weights)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [layer(x) for layer in self.layers]

    x = torch.eye(16, dtype=torch.float64)[None].repeat(2, 1, 1)
    first, second = torch.eye(16, dtype=torch.float64)[:8], torch.eye(16, dtype=torch.float64)[8:]
    same = run(Net([first, first]).double(), KV, rows=[x], ids=[[0]] * 2)[""].value
    other = run(Net([first, second]).double(), KV, rows=[x], ids=[[0]] * 2)[""].value
    assert (same["key_joint_rank90"], same["key_apart_rank90"]) == ([8], [15])  # 90% of 8 equal values is all of them, of 16 it is 15
    assert (other["key_joint_rank90"], other["key_apart_rank90"]) == ([15], [15])
    assert (same["value_joint_prompt_rank90"], other["value_joint_prompt_rank90"]) == ([8.0], [15.0])


def test_models_without_attention_and_with_one_layer() -> None:
    none = run(nn.Sequential(nn.Linear(4, 4)), KV, rows=[torch.eye(4)], ids=[[0]] * 4)
    assert none[""].note == "the run holds no attention layer whose keys and values are known by name"
    shared = run(make("albert"), KV)
    assert shared[""].note == "there are no neighbouring layers to join"
    (layer,) = [r for k, r in shared.items() if k]
    assert layer.settings["rows"] == 3 * 47


@pytest.mark.parametrize("kind", KINDS)
def test_attention_weights_are_known_by_name(kind) -> None:
    found = [attention_role(s) for s in from_model(make(kind)).sites if s.kind == "linear"]
    expected = {"llama": "qkvo", "bert": "qkvo", "albert": "qkvo", "gpt2": ["qkv", "o"]}[kind]
    blocks = 1 if kind == "albert" else 2
    assert sorted(r for r in found if r) == sorted([*expected] * blocks)


# ---- ZD


def checkpoint(weights: dict[str, torch.Tensor], blocks: tuple[str, ...] = ()) -> CheckpointView:
    sites = [
        Site(k, tuple(w.shape), (k,), block=next((i for i, b in enumerate(blocks) if k.startswith(b)), -1)) for k, w in weights.items()
    ]
    return CheckpointView(Catalogue(tuple(sites), blocks=blocks), lambda s: weights[s.name], {}, sites)


def zd(weights: dict[str, torch.Tensor], blocks: tuple[str, ...] = ()):
    return {r.module: r for r in ZD.compute(checkpoint(weights, blocks))}


def test_zd_counts_what_is_a_deviation_above_the_mean() -> None:
    draw = np.random.default_rng(0)
    weights = {k: torch.from_numpy(draw.standard_t(3, (40, 30)) * 3 + 7) for k in ("b.0.x", "b.0.y", "b.1.x", "head")}
    found = zd(weights, ("b.0", "b.1"))
    for name, w in weights.items():
        w = w.numpy()
        assert found[name].value == pytest.approx(((w - w.mean()) / w.std() > 1).mean())
    both = np.concatenate([weights["b.0.x"].numpy().ravel(), weights["b.0.y"].numpy().ravel()])
    assert found["b.0"].value == pytest.approx(((both - both.mean()) / both.std() > 1).mean())
    assert set(found) == {*weights, "b.0", "b.1"}
    assert found["b.1"].value == found["b.1.x"].value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zd_of_any_normal_layer_is_the_same(dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for scale, mean in ((1.0, 0.0), (0.01, 3.0)):
        w = (torch.randn(3000, 300, generator=g) * scale + mean).to(dtype)
        tolerance = 0.002 if dtype == torch.float32 or mean == 0 else 0.03  # float16 has 0.002 between numbers around 3
        assert zd({"w": w})["w"].value == pytest.approx(0.5 * math.erfc(1 / math.sqrt(2)), abs=tolerance)


def test_zd_of_weights_that_have_no_deviation() -> None:
    found = zd(
        {"b.0.same": torch.full((3, 3), 0.1), "b.0.nan": torch.tensor([[float("nan"), 1.0]]), "int": torch.ones(2, 2, dtype=torch.int8)},
        ("b.0",),
    )
    assert found["b.0.same"].note == "every weight is the same"
    assert found["b.0.nan"].note == "b.0.nan: the weight is not of finite real numbers"
    assert found["b.0"].note == "b.0.nan: the weight is not of finite real numbers"
    assert not found["int"].valid
    assert zd({})[""].note == "the run holds no linear layer"
