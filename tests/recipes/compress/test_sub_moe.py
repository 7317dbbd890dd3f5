"""Merging experts: against the frequency-weighted average, the paper's own formula, and models whose experts are copies."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import eckart as ek
from eckart.axes import Budget, Bundle, Site, form, group
from eckart.axes.group import pack
from eckart.axes.merged import aligned, cluster, merge
from eckart.axes.protocols import World
from eckart.axes.solve import cost, solve
from eckart.errors import Refused, UsageError

G = torch.Generator().manual_seed(0)
RECIPE = ek.get_recipe("sub_moe")
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
}


def test_without_truncation_the_merge_is_the_frequency_weighted_average() -> None:
    weights = [torch.randn(6, 9, generator=G, dtype=torch.float64) for _ in range(4)]
    f = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    average = torch.einsum("k,kmn->mn", f, torch.stack(weights))
    assert torch.allclose(merge(weights, f), average, atol=1e-12)
    u, s, vh = np.linalg.svd(np.concatenate([w.numpy() for w in weights], axis=1), full_matrices=False)
    mean_v = sum(float(a) * vh[:, i * 9 : i * 9 + 9] for i, a in enumerate(f))  # the paper's merged right factor
    assert np.allclose((u * s) @ mean_v, average.numpy(), atol=1e-12)


@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_truncated_merge_is_the_papers_formula(energy) -> None:
    weights = [torch.randn(6, 9, generator=G, dtype=torch.float64) for _ in range(3)]
    f = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    u, s, vh = np.linalg.svd(np.concatenate([w.numpy() for w in weights], axis=1), full_matrices=False)
    rank = int(np.searchsorted(np.cumsum(s**2), energy * (s**2).sum())) + 1
    mean_v = sum(float(a) * vh[:rank, i * 9 : i * 9 + 9] for i, a in enumerate(f))
    assert np.allclose((u[:, :rank] * s[:rank]) @ mean_v, merge(weights, f, energy).numpy(), atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_those_of_brute_force(seed) -> None:
    from itertools import product

    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def spread(owner):
        return sum(float((x[owner == c] - x[owner == c].mean(0)).square().sum()) for c in range(3))

    best = min(spread(np.array(o)) for o in product(range(3), repeat=7) if len(set(o)) == 3)
    found = cluster(x, 3, seed=0)
    assert spread(found.numpy()) == pytest.approx(best)
    assert found[0] == 0
    assert torch.equal(found, cluster(x, 3, seed=0))


def test_clusters_are_never_empty_not_even_of_copies() -> None:
    assert sorted(cluster(torch.ones(5, 2), 3, seed=1).unique().tolist()) == [0, 1, 2]
    assert cluster(torch.eye(4), 4, seed=0).tolist() == [0, 1, 2, 3]
    assert cluster(torch.randn(4, 2, generator=G), 1, seed=0).tolist() == [0, 0, 0, 0]


def test_alignment_undoes_a_permutation_of_hidden_units() -> None:
    up, down = torch.randn(20, 6, generator=G, dtype=torch.float64), torch.randn(6, 10, generator=G, dtype=torch.float64)
    order = torch.randperm(10, generator=G)
    moved = torch.cat([up[:10][order], up[10:][order]])
    ups, downs = aligned(torch.stack([up, moved]), torch.stack([down, down[:, order]]), torch.tensor([0.6, 0.4]))
    assert torch.equal(ups[1], up)
    assert torch.equal(downs[1], down)


def build(cls=MixtralForCausalLM, **more):
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, **more)
    if cls is Qwen2MoeForCausalLM:
        config = Qwen2MoeConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=12, **more
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config).eval()
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.2)
    return model


def copies(model):
    """Experts 0 and 2 are one, 1 and 3 are one, and so are their rows of the router."""
    with torch.no_grad():
        for layer in model.model.layers:
            moe = layer.mlp
            for p in (moe.experts.gate_up_proj, moe.experts.down_proj, moe.gate.weight):
                p[2], p[3] = p[0], p[1]
    return model


@pytest.fixture(scope="module")
def ids():
    return [torch.randint(3, 40, (12,), generator=G).tolist() for _ in range(8)]


@pytest.mark.parametrize("cls", [MixtralForCausalLM, Qwen2MoeForCausalLM])
def test_copies_are_found_and_become_one(cls, ids, tmp_path) -> None:
    """A token that took both copies of an expert takes one of it and one of the other afterwards, so only the layers are compared."""
    model = copies(build(cls))
    model.save_pretrained(tmp_path / "model")
    made = ek.compress(tmp_path / "model", "sub_moe", 0.5, calib=ids, out=tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    for old, new in zip(model.model.layers, small.model.layers, strict=True):
        for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
            assert torch.allclose(old.mlp.get_parameter(name)[:2], new.mlp.get_parameter(name), atol=1e-6)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["num_local_experts" if cls is MixtralForCausalLM else "num_experts"] == 2
    assert "quantization_config" not in config
    assert ek.verify(made.path, tmp_path / "model").ok
    assert {r["clusters"] == [0, 1, 0, 1] for r in (json.loads((made.path / "eckart.json").read_text())["records"]).values()} == {True}


def test_memory_and_folder_agree_and_plain_save_pretrained_works(ids, tmp_path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "model")
    made = ek.compress(tmp_path / "model", "sub_moe", 0.75, calib=ids, out=tmp_path / "small")
    memory = ek.compress(model, "sub_moe", 0.75, calib=ids).model
    x = torch.tensor(ids)
    with torch.no_grad():
        folder, here = ek.load(made.path)(x)[0], memory(x)[0]
        assert torch.equal(folder, here)
        memory.save_pretrained(tmp_path / "again")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(x)[0], here)
    assert memory.config.num_local_experts == 3
    assert model.config.num_local_experts == 4
    expected = cost(RECIPE, bundle_of(4)[0]).at(3) / cost(RECIPE, bundle_of(4)[0]).dense
    assert made.plan.after / made.plan.before == pytest.approx(expected)


def test_all_experts_kept_changes_nothing(ids) -> None:
    model = build()
    made = ek.compress(model, RECIPE.with_(budget=Budget(rank=4)), calib=ids)
    assert all(j.state == "dense" for j in made.plan.jobs)
    with torch.no_grad():
        assert torch.equal(made.model(torch.tensor(ids))[0], model(torch.tensor(ids))[0])


def test_fewer_experts_than_a_token_takes_is_refused_before_any_work(ids, tmp_path) -> None:
    build().save_pretrained(tmp_path / "model")
    with pytest.raises(Refused, match="1 experts would remain, and a token takes 2"):
        ek.compress(tmp_path / "model", "sub_moe", 0.3, calib=ids, out=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def bundle_of(count, hidden=16, width=24):
    sites = (
        Site("m.experts.gate_up_proj", (count, 2 * width * hidden), ("m.experts.gate_up_proj",), kind="experts"),
        Site("m.experts.down_proj", (count, hidden * width), ("m.experts.down_proj",), kind="experts"),
        Site("m.gate.weight", (count, hidden), ("m.gate.weight",), kind="other"),
    )
    facts = (("experts", count), ("hidden", hidden), ("chosen", 2))
    return Bundle("m.experts", sites, facts=facts), sites


def test_experts_that_are_never_chosen_are_averaged_evenly() -> None:
    bundle, sites = bundle_of(3, hidden=4, width=5)
    weights = {s.name: torch.randn(*s.shape, generator=G) for s in sites}

    class Known:
        def get(self, stat, site):
            cosines = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
            return torch.cat([cosines.flatten(), torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)])

    edits = solve(RECIPE, bundle, lambda s: weights[s.name], lambda k: k, Known(), rank=2)
    rows = edits.tensors["m.gate.weight"]
    assert torch.allclose(rows[0], weights["m.gate.weight"][:2].mean(0), atol=1e-6)
    assert torch.equal(rows[1], weights["m.gate.weight"][2])
    assert edits.tensors["m.experts.gate_up_proj"].shape == (2, 10, 4)
    assert torch.allclose(edits.tensors["m.experts.down_proj"][0].flatten(), weights["m.experts.down_proj"][:2].mean(0), atol=1e-6)


def packed(config, shapes=None, change=None):
    _, sites = bundle_of(4)
    sites = change(sites) if change else sites
    return pack(group.Experts(), sites, World(lambda s: torch.zeros(s.shape), Budget(keep=0.5), shapes or {}, config))


@pytest.mark.parametrize(
    ("config", "shapes", "change", "words"),
    [
        ({"num_experts": 8}, {}, None, "does not say that there are 4 experts"),
        ({"num_experts": 4, "n_group": 2}, {}, None, "groups of experts first"),
        ({"num_experts": 4}, {"m.gate.e_score_correction_bias": (4,)}, None, "has a row for every expert too"),
        ({"num_experts": 4}, {}, lambda s: s[:2], "2 stacks of experts and no router"),
        ({"num_experts": 4}, {}, lambda s: (s[1], s[0], s[2]), "not gate, up and down"),
    ],
)
def test_layers_of_another_kind_are_left_alone_with_a_reason(config, shapes, change, words) -> None:
    found, left = packed(config, shapes, change)
    assert found == []
    assert all(words in why for why in left.values())


def test_layers_must_keep_equally_many() -> None:
    a, _ = bundle_of(4)
    with pytest.raises(Refused, match="equally many experts"):
        RECIPE.form.config_of([(a, 2), (a, 3)], False, {"num_experts": 4}, {})
    with pytest.raises(UsageError, match=r"form\.energy"):
        form.Merged(energy=0.0)
