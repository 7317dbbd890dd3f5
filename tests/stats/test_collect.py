"""Collected statistics against brute force: every sample alone and unpadded, captured tensors, float64."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from eckart.axes.protocols import Stat
from eckart.catalogue import from_model
from eckart.data import Batch, batches
from eckart.errors import Refused, UsageError
from eckart.seeds import generator
from eckart.stats import collect
from tests.stats.stats_models import linears, make

IN, OUT, ABS = Stat("moments"), Stat("moments", at="out"), Stat("absmean")
GRAD = Stat("moments", at="out", via="backward")
SAMPLE = Stat("fisher", at="weight", via="backward")
COLUMNS, ROWS = (Stat("gradient_gram", at="weight", via="backward", opts=(side,)) for side in ("in", "out"))
BATCH = Stat("fisher", at="weight", via="backward", opts=("per_batch",))


@contextlib.contextmanager
def captured(model, sites):
    """Inputs and outputs of the sites, all calls, with gradients kept on the outputs."""
    seen = {s.name: ([], []) for s in sites}

    def hook(name):
        def store(_m, args, out):
            if out.requires_grad:
                out.retain_grad()
            seen[name][0].append(args[0].detach())
            seen[name][1].append(out)

        return store

    modules = dict(model.named_modules())
    handles = [modules[s.name].register_forward_hook(hook(s.name)) for s in sites]
    try:
        yield seen
    finally:
        for h in handles:
            h.remove()


def flat(tensors):
    return torch.cat([t.reshape(-1, t.shape[-1]) for t in tensors])


def alone(model, ids, sites, scalar):
    """Per sample: inputs, outputs, output gradients, weight gradients (out, in), by site name; each sample is its own unpadded batch."""
    model.eval()
    for index, sample in enumerate(ids):
        with captured(model, sites) as seen:
            output = model(input_ids=torch.tensor([sample]))
        model.zero_grad()
        value = scalar(output, index, sample)
        if value.requires_grad:
            value.backward()
        rows = {}
        for s in sites:
            x, y = seen[s.name]
            grads = [t.grad for t in y if t.grad is not None]
            weight = model.get_parameter(s.tensors[0]).grad
            weight = None if weight is None else weight.T.clone() if s.view == "transposed" else weight.clone()
            rows[s.name] = (flat(x) if x else None, flat(y).detach() if y else None, flat(grads) if grads else None, weight)
        yield rows
    model.zero_grad()


def next_token(output, _index, sample):
    logp = torch.log_softmax(output.logits[0, :-1], -1)
    return -sum(logp[t, token] for t, token in enumerate(sample[1:])) if len(sample) > 1 else output.logits.sum() * 0


def projection(draws):
    def scalar(output, index, _sample):
        mean = output.last_hidden_state[0].mean(0)
        return draws[index] @ (mean / mean.norm())

    return scalar


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_everything_against_one_sample_at_a_time(model, ids, size):
    """All needs in one pass: GQA and biases, Conv1D, an encoder, a layer that is called three times; padding must not show."""
    sites = linears(model)
    padded = batches(ids, None, batch_size=size)
    stats = collect(model, padded, {IN, OUT, ABS, GRAD, SAMPLE, COLUMNS, ROWS}, sites, seed=7)
    if hasattr(model, "lm_head"):
        assert stats.auto == "task_loss"
        scalar = next_token
    else:
        assert stats.auto == "random_projection"
        draws = [
            torch.randn((1, len(b.input_ids), 16), generator=generator(7, "random_projection", str(i)))[0] for i, b in enumerate(padded)
        ]
        scalar = projection(torch.cat(draws).double())
    samples = list(alone(model, ids, sites, scalar))
    for site in sites:
        rows = [s[site.name] for s in samples]
        x, y = torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])
        found = stats.get(IN, site)
        close(found.gram, x.T @ x)
        close(found.total, x.sum(0))
        assert found.count == len(x) == stats.count(site)
        close(stats.get(OUT, site).gram, y.T @ y)
        close(stats.get(ABS, site), x.abs().mean(0))
        if all(r[2] is None for r in rows):
            assert "pooler" in site.name
            assert not stats.has(GRAD, site)
            continue
        g = torch.cat([r[2] for r in rows])
        moments = stats.get(GRAD, site)
        assert moments.count == len(x)
        close(moments.gram, g.T @ g)
        fisher = sum((r[3] ** 2).sum(0) for r in rows) / len(rows)
        close(stats.get(SAMPLE, site), fisher)
        close(stats.get(COLUMNS, site), sum(r[3].T @ r[3] for r in rows).flatten() / len(rows))
        close(stats.get(ROWS, site), sum(r[3] @ r[3].T for r in rows).flatten() / len(rows))


def test_fisher_per_batch_is_another_number(padded):
    model = make("llama")
    sites = linears(model)
    stats = collect(model, padded, {SAMPLE, BATCH}, sites)
    ids = [[row[m.bool()].tolist() for row, m in zip(b.input_ids, b.attention_mask, strict=True)] for b in padded]
    expected = {s.name: torch.zeros(s.shape[1], dtype=torch.float64) for s in sites}
    for part in ids:
        total = {s.name: 0 for s in sites}
        for sample in alone(model, part, sites, next_token):
            for s in sites:
                total[s.name] = total[s.name] + sample[s.name][3]
        for s in sites:
            expected[s.name] += (total[s.name] ** 2).sum(0) / len(ids)
    for s in sites:
        close(stats.get(BATCH, s), expected[s.name])
        assert not torch.allclose(stats.get(BATCH, s), stats.get(SAMPLE, s) * 8 / 3, rtol=1e-2)
        assert (stats.count(s, BATCH), stats.count(s, SAMPLE)) == (3, 8)


def test_projections_estimate_the_jacobians_second_moment():
    """Mean over many draws of the gradient's second moment = second moment of the Jacobian, by torch.func on the normalised output."""
    torch_seed = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    x = torch.randn(6, 3, generator=torch_seed).double()
    site = linears(net, x)[0]
    found = collect(net, [x], {GRAD}, [site], probes=4000).get(GRAD, site)

    def tail(y):
        return nn.functional.normalize(net[2](torch.tanh(y)), dim=-1)

    jac = torch.stack([torch.func.jacrev(tail)(y) for y in net[0](x).detach()])
    expected = torch.einsum("bdi,bdj->ij", jac, jac) / 6
    assert found.count == 6 * 4000
    assert (found.second() - expected).norm() / expected.norm() < 0.05


def test_shared_inputs_share_one_sum_and_any_reader_finds_it(padded):
    model = make("llama")
    sites = linears(model)
    stats = collect(model, padded, {IN}, sites)
    assert len(stats.values) == len({s.reads for s in sites}) == 2 * 4 + 1
    q, k = (next(s for s in sites if s.name.endswith(e)) for e in ("0.self_attn.q_proj", "0.self_attn.k_proj"))
    assert stats.get(IN, q) is stats.get(IN, k)
    only = collect(model, padded, {IN}, [k])  # the first reader is not among the sites
    assert torch.equal(only.get(IN, k).gram, stats.get(IN, k).gram)


def test_token_weights(ids):
    model = make("bert")
    site = linears(model)[0]
    (batch,) = batches(ids, None, batch_size=8)
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(batch.input_ids.shape, generator=g) * (torch.rand(batch.input_ids.shape, generator=g) > 0.3)
    stats = collect(model, [Batch(batch.input_ids, batch.attention_mask, weights)], {IN, ABS, OUT}, [site])
    rows = torch.cat([s[site.name][0] for s in alone(model, ids, [site], lambda *_: torch.zeros(()))])
    w = torch.cat([weights[i, : len(t)] for i, t in enumerate(ids)]).double()
    close(stats.get(IN, site).gram, (rows * w[:, None]).T @ rows)
    close(stats.get(IN, site).total, w @ rows)
    close(stats.get(ABS, site), w @ rows.abs() / w.sum())
    assert stats.count(site) == pytest.approx(w.sum().item())
    with pytest.raises(UsageError, match=r"batch 0.*token weights of shape"):
        collect(model, [Batch(batch.input_ids, batch.attention_mask, weights[:, :2])], {IN}, [site])


def test_the_model_is_left_as_it_was(padded):
    model = make("llama")
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    for p in model.model.layers[1].parameters():
        p.grad = torch.full_like(p, 2.0)
    state = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    before = [p.clone() for p in model.parameters()]
    sites = linears(model)
    collect(model, padded, {IN, GRAD, SAMPLE}, sites)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
        before = [p.clone() for p in model.parameters()]
    with pytest.raises(Refused):
        collect(model, padded, {IN, GRAD, SAMPLE}, sites)
    assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == state
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(model.parameters(), before, strict=True))
    assert all((p.grad == 2).all() for p in model.model.layers[1].parameters())
    assert all(p.grad is None for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_models_no_grad_and_inference_mode_do_not_matter(padded, freeze):
    model = make("llama")
    sites = linears(model)
    expected = collect(model, padded, {GRAD}, sites).get(GRAD, sites[0]).gram
    model.requires_grad_(not freeze)
    with torch.no_grad():
        assert torch.equal(collect(model, padded, {GRAD}, sites).get(GRAD, sites[0]).gram, expected)
    with torch.inference_mode():
        assert torch.equal(collect(model, padded, {GRAD}, sites).get(GRAD, sites[0]).gram, expected)


def test_bad_numbers_name_the_module_and_the_batch(ids):
    model = make("llama")
    sites = linears(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = torch.inf
    where = next(i for i, t in enumerate(ids) if 11 in t)
    with pytest.raises(Refused, match=rf"model\.layers\.0\.self_attn\.q_proj: its input is not finite in calibration batch {where}"):
        collect(model, batches(ids, None, batch_size=1), {IN}, sites)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * torch.nan

    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    net.register_forward_hook(lambda _m, _a, out: Broken.apply(out))
    sites = linears(net, torch.ones(1, 2))
    with pytest.raises(Refused, match="1: its output gradient is not finite in calibration batch 0"):
        collect(net, [torch.ones(2, 2)], {GRAD}, sites)
    with pytest.raises(Refused, match="1: its weight gradient is not finite"):
        collect(net, [torch.ones(2, 2)], {SAMPLE}, sites)
    with pytest.raises(Refused, match="1: its weight gradient is not finite"):
        collect(net, [torch.ones(2, 2)], {ROWS}, sites)


class Experts(nn.Module):
    """Two experts on gathered tokens; a third that nobody chooses."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids).reshape(-1, 6)
        first = (input_ids % 2 == 0).reshape(-1)
        out = torch.zeros_like(x)
        out = out.index_add(0, first.nonzero().flatten(), self.experts[0](x[first]))
        out = out.index_add(0, (~first).nonzero().flatten(), self.experts[1](x[~first]))
        return out.reshape(*input_ids.shape, 6)


def test_experts(ids):
    model = Experts().double()
    cat = linears(model, {"input_ids": torch.tensor([[0, 1, 2]]), "attention_mask": torch.ones(1, 3)})
    with pytest.raises(Refused, match=r"experts\.0: its rows .* batch 0, so padding would be measured.*batch_size=1"):
        collect(model, batches(ids, None, batch_size=3), {IN}, cat)
    stats = collect(model, batches(ids, None, batch_size=1), {IN, SAMPLE, GRAD}, cat)
    tokens = torch.tensor([t for row in ids for t in row])
    even = model.embed(tokens[tokens % 2 == 0]).detach()
    close(stats.get(IN, cat[0]).gram, even.T @ even)
    assert stats.count(cat[0]) == len(even)
    assert stats.count(cat[1]) == len(tokens) - len(even)
    assert stats.count(cat[2]) == 0
    assert not stats.has(IN, cat[2])
    with pytest.raises(Refused, match=r"experts\.2: calibration never reached this layer"):
        stats.get(IN, cat[2])
    with pytest.raises(Refused, match=r"experts\.2: the probe's gradient never reached"):
        stats.get(SAMPLE, cat[2])
    equal = [Batch(b.input_ids, b.attention_mask) for b in batches([ids[4], ids[5]], None, batch_size=2)]
    collect(model, equal, {IN, BATCH}, cat)  # nothing is padded: all rows count
    with pytest.raises(Refused, match="cannot be split by the 2 samples"):
        collect(model, equal, {SAMPLE}, cat)


def test_plain_modules_with_a_loss():
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()  # in place right after the first leaf
    data = [(torch.randn(5, 3, generator=g).double(), torch.randn(5, 2, generator=g).double()) for _ in range(3)]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, _target):
            return self.net(x)

    model = Model()
    sites = linears(model, data[0])
    stats = collect(model, data, {IN, GRAD, SAMPLE}, sites, loss=lambda out, batch: ((out - batch[1]) ** 2).sum(1))
    assert stats.auto == "task_loss"

    def loss(params, x, t):
        return ((torch.func.functional_call(net, params, (x[None],))[0] - t) ** 2).sum()

    params = {k: v.detach() for k, v in net.named_parameters()}
    x, t = torch.cat([d[0] for d in data]), torch.cat([d[1] for d in data])
    net[1].inplace = False
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, t)
    for site in sites:
        local = site.name.removeprefix("net.")
        close(stats.get(SAMPLE, site), (grads[f"{local}.weight"] ** 2).sum((0, 1)) / len(x))
        close(stats.get(GRAD, site).gram, grads[f"{local}.bias"].T @ grads[f"{local}.bias"])  # dL/dbias is dL/dy here
    close(stats.get(IN, sites[0]).gram, x.T @ x)


def test_two_probes_in_one_pass(padded):
    model = make("llama")
    site = linears(model)[3]
    a, b = (
        Stat("moments", at="out", via="backward", probe="task_loss"),
        Stat("moments", at="out", via="backward", probe="random_projection"),
    )
    both = collect(model, padded, {a, b, GRAD}, [site], probes=2)
    for stat in (a, b):
        one = collect(model, padded, {stat}, [site], probes=2)
        assert torch.equal(both.get(stat, site).gram, one.get(stat, site).gram)
    assert both.get(GRAD, site) is both.get(a, site)
    assert both.count(site, b) == 2 * both.count(site, a)


def test_seeds_and_chosen_probes(padded):
    model = make("bert")
    site = linears(model)[2]
    grams = [collect(model, padded, {GRAD}, [site], seed=s).get(GRAD, site).gram for s in (0, 0, 1)]
    assert torch.equal(grams[0], grams[1])
    assert not torch.equal(grams[0], grams[2])
    with pytest.raises(UsageError, match="task_loss: expected token ids and a causal model"):
        collect(model, padded, {GRAD}, [site], probe="task_loss")
    llama = make("llama")
    assert collect(llama, padded, {GRAD}, [linears(llama)[2]], probe="random_projection").auto == "random_projection"


def test_an_input_changed_in_place_is_refused_for_fisher():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            x = x * 1
            y = self.a(x)
            x.add_(1)
            return y + x

    model = Sneaky()
    with pytest.raises(Refused, match="a: its input is changed in place"):
        collect(model, [torch.ones(2, 3)], {SAMPLE}, linears(model, torch.ones(2, 3)))


@pytest.mark.parametrize(
    ("stat", "message"),
    [
        (Stat("momenst"), "Did you mean 'moments'"),
        (Stat("moments", at="weight"), 'expected at "in" via forward'),
        (Stat("moments", at="in", via="backward"), 'found at "in" via backward'),
        (Stat("moments", inputs="propagated"), "sweep over blocks"),
        (Stat("moments", opts=("centred",)), "unknown options"),
        (Stat("fisher", at="weight", via="backward", opts=("per_token",)), "expected 'per_sample' or 'per_batch'"),
        (Stat("moments", at="out", via="backward", probe="task"), "probe 'task'"),
    ],
)
def test_needs_that_cannot_be_measured(stat, message, padded):
    model = make("llama")
    with pytest.raises(UsageError, match=message):
        collect(model, padded, {stat}, linears(model))


@pytest.mark.parametrize("stat", [IN, GRAD])
def test_a_site_that_is_missing_leaves_no_hook_on_the_others(padded, stat):
    model = make("llama")
    sites = linears(model)
    wrong = replace(sites[-1], name="zz.absent", reads="zz.absent")
    with pytest.raises(Refused, match="no such module"):
        collect(model, padded, {stat}, [*sites, wrong])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_refusals(padded):
    model = make("llama")
    sites = linears(model)
    with pytest.raises(Refused, match="at least one calibration batch"):
        collect(model, [], {IN}, sites)
    with pytest.raises(UsageError, match="kind 'embedding'"):
        collect(model, padded, {IN}, from_model(model).sites)
    with pytest.raises(Refused, match="no such module"):
        collect(make("gpt2"), padded, {IN}, sites)
    with pytest.raises(UsageError, match="probes"):
        collect(model, padded, {GRAD}, sites, probes=0)
    with pytest.raises(UsageError, match="found str"):
        collect(model, ["text"], {IN}, sites)
