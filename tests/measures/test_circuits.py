"""Head composition against explicit float64 products, and the Interaction Basis against full Jacobians."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from eckart.catalogue import from_model
from eckart.catalogue.parts import attentions, hidden
from eckart.data.batches import Batch
from eckart.errors import Refused
from eckart.linalg.psd import Weight
from eckart.linalg.weighted import spectrum
from eckart.measures.base import CheckpointView, ModelView
from eckart.measures.interaction_basis import MEASURE as BASIS
from eckart.measures.talking_heads import MEASURE as HEADS
from eckart.measures.talking_heads import factorise
from eckart.spectra.composition import compose, outliers, output_value, reader
from eckart.spectra.interaction import interaction_basis
from tests.stats.stats_models import make


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def checkpoint(model, config=None, sites=None):
    catalogue = from_model(model)
    state = model.state_dict()

    def read(site):
        w = state[site.tensors[0]]
        return w.T if site.view == "transposed" else w.reshape(site.shape)

    given = model.config.to_dict() if config is None else config
    linears = [s for s in catalogue.sites if s.kind == "linear"]
    return CheckpointView(catalogue, read, given, linears if sites is None else sites)


# ---- composition


def test_thin_scores_equal_products_of_whole_matrices():
    d, r = 24, 5
    V, O, V2, O2, Q, K = (gaussian(*s, seed=i) for i, s in enumerate([(r, d), (d, r), (r, d), (d, r), (r, d), (r, d)]))
    A, OV2, QK = O @ V, O2 @ V2, Q.T @ K
    written = output_value(V, O)
    assert torch.allclose(written.dense(), A, atol=1e-12)
    for B, factors in ((OV2, output_value(V2, O2)), (QK.T, reader(Q, K)), (QK, reader(K, Q))):
        R, s = factors.Vh, factors.S
        assert float(s.square().sum()) == pytest.approx(float(B.square().sum())), "its norm is kept"
        direct = float((B @ A).norm() / (B.norm() * A.norm()))
        thin = float(((s[:, None] * (R @ written.U) * written.S).norm()) / (s.norm() * written.S.norm()))
        assert thin == pytest.approx(direct, abs=1e-12)
        for i in range(r):
            component = written.S[i] * torch.outer(written.U[:, i], written.Vh[i])
            alone = float((B @ component).norm() / (B.norm() * component.norm()))
            assert float((s * (R @ written.U[:, i])).norm() / s.norm()) == pytest.approx(alone, abs=1e-12)


def test_rotary_reader_is_the_mean_over_angles():
    d, r = 10, 6
    Q, K, x = gaussian(r, d), gaussian(r, d, seed=1), gaussian(d, seed=2)
    pairs = torch.tensor([[0, 2], [1, 3]])  # rows 4 and 5 are not rotated
    total, count = 0.0, 16
    for i in range(count):
        for j in range(count):
            R = torch.eye(r, dtype=torch.float64)
            for (p, q), t in zip(pairs.tolist(), (2 * math.pi * i / count, 2 * math.pi * j / count), strict=True):
                R[p, p] = R[q, q] = math.cos(t)
                R[p, q], R[q, p] = -math.sin(t), math.sin(t)
            total += float((K.T @ R.T @ Q @ x).square().sum()) / count**2
    B = reader(Q, K, pairs)
    assert float((B.dense() @ x).square().sum()) == pytest.approx(total, rel=1e-12)
    wide = reader(gaussian(8, 3), gaussian(8, 3, seed=1))
    assert torch.allclose(wide.S[:3], torch.linalg.svdvals(gaussian(8, 3).T @ gaussian(8, 3, seed=1)), atol=1e-10), (
        "more rows than the width"
    )


def explicit(model, config):
    """(table of whole heads, table of components) by products of d x d matrices, with grouped keys and the norms' scales."""
    model.requires_grad_(False)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    width = model.model.layers[0].self_attn.head_dim
    maps = []
    for layer in model.model.layers:
        scale = torch.diag(layer.input_layernorm.weight)
        at = layer.self_attn
        q, k, v = (p.weight @ scale for p in (at.q_proj, at.k_proj, at.v_proj))
        for h in range(heads):
            g = h // (heads // kv)
            Q, K, V = q[h * width :][:width], k[g * width :][:width], v[g * width :][:width]
            maps.append((layer.self_attn.layer_idx, Q, K, at.o_proj.weight[:, h * width :][:, :width] @ V))
    return maps, width


def test_measure_equals_explicit_products_on_a_grouped_query_model():
    model = make("llama")
    config = model.config.to_dict() | dict.fromkeys(("rope_parameters", "rope_theta", "rope_scaling"))
    maps, _ = explicit(model, config)
    records = {r.module: r for r in HEADS.compute(checkpoint(model, config))}
    assert records["model.layers.0.self_attn"].note == "no earlier attention writes to what it reads"
    value = records["model.layers.1.self_attn"].value
    assert records["model.layers.1.self_attn"].settings["norm"] == "model.layers.1.input_layernorm.weight"
    best = {"query": 0.0, "key": 0.0, "value": 0.0}
    whole = dict(best)
    for later in (m for m in maps if m[0] == 1):
        for earlier in (m for m in maps if m[0] == 0):
            _, Q, K, OV2 = later
            u, s, _ = torch.linalg.svd(earlier[3])
            for side, B in (("query", K.T @ Q), ("key", Q.T @ K), ("value", OV2)):
                whole[side] = max(whole[side], float((B @ earlier[3]).norm() / (B.norm() * earlier[3].norm())))
                best[side] = max(best[side], *(float((B @ u[:, i]).norm() / B.norm()) for i in range(4) if s[i] > 1e-9))
    for side in best:
        assert value[side] == pytest.approx(best[side], rel=1e-9)
        assert value[side + "_heads"] == pytest.approx(whole[side], rel=1e-9)
    assert records[""].value["random"] == pytest.approx(1 / 4)
    assert max(records[""].value["query"], records[""].value["key"]) <= 1


def test_a_planted_channel_is_the_one_that_is_named():
    model = make("gpt2")
    with torch.no_grad():
        a, b = model.transformer.h[0].attn, model.transformer.h[1].attn
        direction = gaussian(16, seed=8)
        direction = (direction - direction.mean()) / 4
        out = a.c_proj.weight  # stored (in, out)
        out[8:16] *= 0.05
        out[11] = 40 * direction  # head 1 of layer 0 writes one direction
        b.c_attn.weight[:, 0:8] *= 0.02
        b.c_attn.weight[:, 3] = 40 * direction / model.transformer.h[1].ln_1.weight  # head 0 of layer 1 reads it by its query
    model.config.n_inner = None
    records = {r.module: r for r in HEADS.compute(checkpoint(model))}
    value = records["transformer.h.1.attn"].value
    assert records["transformer.h.1.attn"].settings["norm"] == "transformer.h.1.ln_1.weight"
    assert value["query"] > 0.95
    assert value["key"] < 0.9
    channels = records[""].value["channels"]
    assert max(channels, key=channels.get) == "0.1.0 -> 1.0 query"
    assert channels["0.1.0 -> 1.0 query"] == pytest.approx(value["query"])
    assert records[""].value["channel_energy"]["0.1.0 -> 1.0 query"] > 0.99


def test_scores_of_random_heads_are_near_one_over_root_width():
    d, r = 400, 8
    scores = []
    for seed in range(20):
        a = output_value(gaussian(r, d, seed=4 * seed), gaussian(d, r, seed=4 * seed + 1))
        b = reader(gaussian(r, d, seed=4 * seed + 2), gaussian(r, d, seed=4 * seed + 3))
        scores += ((b.S[:, None] * (b.Vh @ a.U)).norm(dim=0) / b.S.norm()).tolist()
    assert np.sqrt(np.mean(np.square(scores))) == pytest.approx(1 / math.sqrt(d), rel=0.1)


def test_outliers_stand_out_robustly():
    scores = 1 + 0.01 * gaussian(500).abs()
    scores[7], scores[9] = 1.5, 0.0
    z, out = outliers(scores, 8.0)
    assert out.nonzero().tolist() == [[7]]
    assert float(z[7]) > 8
    assert not outliers(torch.zeros(3), 8.0)[1].any()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_heads_of_real_architectures_are_found(kind):
    model = make(kind)
    view = checkpoint(model)
    found, why = attentions(view.catalogue, view.config)
    assert (len(found), why) == (2, {})
    assert all(a.heads == (4 if kind == "llama" else 2) for a in found)
    assert len(hidden(view.catalogue)) == 2
    heads = factorise(view.read, found[1], None, None)
    assert heads.writes.shape[1] == 16
    assert compose(heads, heads, "value").components.shape == (found[1].heads, found[1].heads, found[1].v.at.shape[1])
    assert all(r.valid or r.note for r in HEADS.compute(view))


def test_models_without_attention_and_broken_ones_give_a_reason():
    (record,) = HEADS.compute(checkpoint(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), {}))
    assert (record.module, record.valid) == ("", False)
    assert record.note.startswith("no attention")
    model = make("llama")
    notes = {r.module: r.note for r in HEADS.compute(checkpoint(model, {}))}
    assert "config.json does not say how many attention heads" in notes["model.layers.0.self_attn"]
    notes = {r.module: r.note for r in HEADS.compute(checkpoint(model, {"num_attention_heads": 3}))}
    assert "model.layers.0.self_attn" in notes
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = math.nan
    records = {r.module: r for r in HEADS.compute(checkpoint(model))}
    assert records["model.layers.0.self_attn"].note == "model.layers.0.self_attn.k_proj holds NaN or Inf"
    assert "no earlier attention" in records["model.layers.1.self_attn"].note
    view = checkpoint(model)
    (record,) = HEADS.compute(checkpoint(model, sites=[s for s in view.sites if "mlp" in s.name]))
    assert "no attention module with all of its projections" in record.note


def test_zero_heads_do_not_divide_by_zero():
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[1].self_attn.q_proj.weight.zero_()
    records = {r.module: r for r in HEADS.compute(checkpoint(model))}
    value = records["model.layers.1.self_attn"].value
    assert (value["query"], value["value_heads"]) == (0, 0)


# ---- interaction basis


def test_basis_whitens_and_is_invariant():
    n, m = 6, 5
    x, g, W = gaussian(300, n) @ gaussian(n, n, seed=1), gaussian(200, m, seed=2), gaussian(m, n, seed=3)
    S, G = x.T @ x / 300, g.T @ g / 200
    b = interaction_basis(W, S, G, cut=1e-13)
    f = x @ b.forth.T
    assert torch.allclose(f.T @ f / 300, torch.diag(b.values), atol=1e-9), "uncorrelated, each with the size of its effect"
    pull = b.back.T @ W.T @ G @ W @ b.back
    assert torch.allclose(pull, torch.eye(5, dtype=torch.float64), atol=1e-9), "the output's metric is the identity there"
    P = b.back @ b.forth
    assert torch.allclose(P @ P, P, atol=1e-9)
    assert torch.allclose(spectrum(W, out=Weight(G), into=Weight(S)).square(), b.values, atol=1e-8)
    A, C = gaussian(n, n, seed=5), gaussian(m, m, seed=6)
    other = interaction_basis(C @ W @ torch.linalg.inv(A), A @ S @ A.T, torch.linalg.inv(C).T @ G @ torch.linalg.inv(C), cut=1e-13)
    assert torch.allclose(other.values, b.values, rtol=1e-6), "features in any coordinates interact the same"
    assert torch.allclose(other.forth.abs(), (b.forth @ torch.linalg.inv(A)).abs(), atol=1e-6)


def test_basis_drops_directions_that_do_not_occur_or_do_not_matter():
    W = torch.eye(4, dtype=torch.float64)
    occur, matter = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])), torch.diag(torch.tensor([4.0, 1.0, 0.0, 1.0]))
    b = interaction_basis(W, occur, matter)
    assert b.values.tolist() == pytest.approx([4, 1])
    assert b.forth.shape == (2, 4)
    assert interaction_basis(W, 0 * occur, matter).forth.shape == (0, 4)
    with pytest.raises(Refused, match="expected inputs of shape"):
        interaction_basis(W, torch.eye(3), matter)


def live(model, data, **options):
    catalogue = from_model(model)
    given = {"sites": [s for s in catalogue.sites if s.kind == "linear"], "config": {}, "causal": False}
    return ModelView(model, catalogue, batches=data, **{**given, **options})


def full_values(model, layer, x):
    """Lambda by full Jacobians of the output in the layer's input with a constant feature, sample by sample."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    f = torch.cat([seen[0], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    S = f.T @ f / len(x)
    G = torch.zeros(f.shape[1], f.shape[1], dtype=torch.float64)
    for i in range(len(x)):

        def through(v, i=i):
            hook = layer.register_forward_hook(lambda _m, _a, _o: (torch.cat([layer.weight, layer.bias[:, None]], 1) @ v)[None])
            try:
                return model(x[i : i + 1])[0]
            finally:
                hook.remove()

        J = torch.autograd.functional.jacobian(through, f[i])
        G += J.T @ J / len(x)
    values, vectors = torch.linalg.eigh(S)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return torch.linalg.eigvalsh(root @ G @ root).flip(0)


def test_measure_equals_full_jacobians_of_a_small_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = gaussian(40, 4)
    records = {r.module: r for r in BASIS.compute(live(model, [x[:25], x[25:]]))}
    for name in ("0", "2", "4"):
        exact = full_values(model, model.get_submodule(name), x)
        record = records[name]
        assert record.settings["sources"] == "every output"
        assert record.value["total"] == pytest.approx(float(exact.sum()), rel=1e-9)
        count = len(record.value["values"])
        assert record.value["values"] == pytest.approx(exact[:count].tolist(), abs=1e-9 * float(exact[0]))
        held = (exact.clamp_min(0).cumsum(0) < 0.99 * exact.sum()).sum()
        assert record.value["directions"] == int(held) + 1


def test_linear_networks_give_the_closed_form():
    a, b = nn.Linear(5, 4, bias=False).double(), nn.Linear(4, 3, bias=False).double()
    x = gaussian(60, 5)
    records = {r.module: r.value for r in BASIS.compute(live(nn.Sequential(a, b), [x]))}
    J = (b.weight @ a.weight).detach()
    values, vectors = np.linalg.eigh((x.T @ x / 60).numpy())
    expected = np.linalg.svd(J.numpy() @ (vectors * np.sqrt(values)), compute_uv=False) ** 2
    assert records["0"]["values"][:3] == pytest.approx(expected.tolist(), rel=1e-9)


def test_random_sources_estimate_the_same_on_a_language_model():
    model = make("gpt2").eval()
    ids = torch.randint(0, 40, (8, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 10).long()
    mask[0, 6:] = 0
    data = [Batch(ids[i : i + 1], mask[i : i + 1]) for i in range(8)]
    v = live(model, data, causal=True, config=model.config.to_dict())
    records = {r.module: r for r in BASIS.compute(v)}
    assert not records["lm_head"].valid
    assert "nothing follows" in records["lm_head"].note
    record = records["transformer.h.1.mlp.c_proj"]
    assert record.settings["rows"] == 76, "padding is left out"
    layer = model.transformer.h[1].mlp.c_proj
    total, rows = 0.0, 0
    for i in range(8):
        keep = mask[i].bool()
        seen = []
        handle = layer.register_forward_hook(lambda _m, _a, o, seen=seen: seen.append(o))
        z = model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits
        handle.remove()
        y = seen[0]
        for t in keep.nonzero()[:, 0].tolist():
            for k in range(z.shape[2]):
                g = torch.autograd.grad(z[0, t, k], y, retain_graph=True)[0][0, keep]
                total += float((g.square().sum(1) * 1.0).sum())
        rows += int(keep.sum())
    from eckart.measures.interaction_basis import GRADIENTS, Sources
    from eckart.stats.collect import collect

    site = next(s for s in v.sites if s.name == "transformer.h.1.mlp.c_proj")
    many = [b for b in data for _ in range(24)]
    sources = Sources(0, 24)
    found = collect(model, many, {GRADIENTS}, [site], probe="task_loss", loss=sources).get(GRADIENTS, site)
    assert float(found.second().trace()) == pytest.approx(total / rows, rel=0.15), "trace of the mean of J^T J"
    assert sources.calls == len(many)


def test_broken_inputs_give_reasons():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    (record,) = BASIS.compute(live(model, []))
    assert "no calibration text" in record.note
    with torch.no_grad():
        model[2].weight.zero_()
    notes = {r.module: r.note for r in BASIS.compute(live(model, [gaussian(5, 3)])) if not r.valid}
    assert notes == {"0": "the output does not depend on it"}
    with torch.no_grad():
        model[0].weight.fill_(math.inf)
    (record,) = BASIS.compute(live(model, [gaussian(5, 3)]))
    assert "not finite" in record.note
    conv = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(4, 2)).double()
    v = live(conv, [gaussian(3, 1, 3)], sites=from_model(conv).sites)
    notes = {r.module: r.note for r in BASIS.compute(v) if not r.valid}
    assert notes == {"0": "not a linear layer"}
