"""Hessian and Gauss-Newton products, their spectra and loss slices against dense float64 matrices from torch.func."""

import math

import pytest
import torch
from torch import nn

from eckart.catalogue import from_model
from eckart.data.batches import Batch
from eckart.errors import Refused, UsageError
from eckart.linalg.symmetric import Quadrature, eigsh, hutchinson, slq
from eckart.measures.base import ModelView
from eckart.measures.hessian_spectrum import MEASURE as SPECTRUM
from eckart.measures.loss_landscape import MEASURE as LANDSCAPE
from eckart.stats.curvature import GaussNewton, Hessian, lla_criteria
from eckart.stats.landscape import length, normalise, random_direction, surface
from eckart.stats.objective import Objective, few


def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])


def net(seed=0, norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 6), nn.Tanh(), *([nn.BatchNorm1d(6)] if norm else []), nn.Linear(6, 3)]
        return nn.Sequential(*layers).double()


def batches(count=2, size=15, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (size,), generator=g)) for _ in range(count)]


def flat(model):
    names = [k for k, _ in model.named_parameters()]
    sizes = [p.numel() for _, p in model.named_parameters()]
    shapes = [p.shape for _, p in model.named_parameters()]
    w = torch.cat([p.detach().reshape(-1) for _, p in model.named_parameters()])
    return names, sizes, shapes, w


def dense(model, data):
    """(Hessian, Gauss-Newton) of the mean loss, by forward- and reverse-mode derivatives of the whole thing."""
    names, sizes, shapes, w = flat(model)

    def output(v, x):
        parts = {k: p.reshape(s) for k, p, s in zip(names, v.split(sizes), shapes, strict=True)}
        return torch.func.functional_call(model.eval(), parts, (x,))

    def mean(v):
        return sum(nn.functional.cross_entropy(output(v, x), y) for x, y in data) / len(data)

    H = torch.func.hessian(mean)(w)
    G = torch.zeros_like(H)
    for x, _ in data:
        J = torch.func.jacrev(lambda v, x=x: output(v, x))(w)
        p = output(w, x).softmax(1)
        bent = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        G += torch.einsum("bki,bkl,blj->ij", J, bent, J) / len(x) / len(data)
    return H, G


def objective(model, data, **options):
    return Objective(model, data, loss=loss, **options)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("hold", [False, True])
def test_products_equal_the_dense_matrices(norm, hold):
    model, data = net(norm=norm), batches()
    H, G = dense(model, data)
    model.train()
    for operator, exact in ((Hessian, H), (GaussNewton, G)):
        op = operator(objective(model, data), hold=hold)
        assert torch.allclose(op.to_dense(), exact, atol=1e-12)
        X = torch.randn(len(exact), 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        assert torch.allclose(op.matmat(X), exact @ X, atol=1e-12)
    assert all(m.training for m in model.modules()), "left as it was found"
    assert all(p.grad is None for p in model.parameters())


def test_a_part_of_the_parameters_is_a_block_of_the_matrix():
    model, data = net(), batches()
    H, _ = dense(model, data)
    names, sizes, _, _ = flat(model)
    keep = torch.cat([torch.full((n,), k == "2.weight") for k, n in zip(names, sizes, strict=True)])
    assert torch.allclose(Hessian(objective(model, data), ["2.weight"]).to_dense(), H[keep][:, keep], atol=1e-12)


def test_eigenvalues_trace_and_density_equal_the_dense_ones():
    model, data = net(), batches()
    H, G = dense(model, data)
    values = torch.linalg.eigvalsh(H)
    op = Hessian(objective(model, data), hold=True)
    found = eigsh(op, 4, 2, tol=1e-8, steps=len(H))
    assert torch.allclose(found.values, torch.cat([values.flip(0)[:4], values[:2]]), atol=1e-7)
    q = slq(op, steps=len(H), runs=20)
    for power in (1, 2):
        m = q.moment(power)
        assert abs(m.value - float((values**power).sum())) < 4 * m.error + 1e-9
    trace = hutchinson(op, 60)
    assert abs(trace.value - float(H.trace())) < 4 * trace.error
    top = eigsh(GaussNewton(objective(model, data)), 1, tol=1e-8, steps=len(H)).values[0]
    assert float(top) == pytest.approx(float(torch.linalg.eigvalsh(G)[-1]), rel=1e-8)


def test_cumulative_density_equals_the_dense_histogram():
    """Averaged over many starts, the mass below each level is the share of eigenvalues below it."""
    H, _ = dense(net(), batches())
    values = torch.linalg.eigvalsh(H)
    q = slq(H, steps=len(values), runs=60)
    for level in (float(values[0]) / 2, 0.1 * float(values[-1]), 0.5 * float(values[-1])):
        each = (q.weights * (q.nodes < level)).sum(1)
        share = float((values < level).double().mean())
        assert abs(float(each.mean()) - share) < 4 * float(each.std()) / math.sqrt(60) + 1e-9


class TinyLM(nn.Module):
    """A causal model small enough for a dense Hessian, with attention."""

    def __init__(self, vocabulary=7, width=4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.head(torch.tanh(x + y)))


def lm(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyLM().double()


def text():
    g = torch.Generator().manual_seed(3)
    rows = [Batch(torch.randint(0, 7, (2, 6), generator=g), torch.ones(2, 6, dtype=torch.long)) for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    return [rows[0], Batch(rows[1].input_ids, mask)]


def test_language_model_with_tied_weights_and_padding_equals_finite_differences():
    model, data = lm(), text()
    L = Objective(model, data)
    assert L.total == 5 + 5 + 5 + 2
    names = [k for k, _ in model.named_parameters()]
    assert names == ["embed.weight", "qkv.weight"], "the tied head counts once"
    w = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def mean(v):
        e, q = v.split([28, 48])
        state = {"embed.weight": e.reshape(7, 4), "qkv.weight": q.reshape(12, 4)}
        total = 0.0
        for b in data:
            logits = torch.func.functional_call(model, state, (b.input_ids, b.attention_mask)).logits
            nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), b.input_ids[:, 1:].flatten(), reduction="none")
            total = total + (nll * b.attention_mask[:, 1:].flatten()).sum()
        return total / 17

    assert L.mean(L.state()) == pytest.approx(float(mean(w)), abs=1e-12)
    v = torch.randn(76, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    h = 1e-4
    slope = torch.func.grad(mean)
    expected = (slope(w + h * v) - slope(w - h * v)) / (2 * h)
    found = Hessian(L).matmat(v[:, None])[:, 0]
    assert torch.allclose(found, expected, atol=1e-6 * float(expected.norm()))


def view(model, data, **options):
    catalogue = from_model(model)
    given = {"sites": [s for s in catalogue.sites if s.kind == "linear"], "config": {}, "causal": False, "loss": None}
    return ModelView(model, catalogue, batches=data, **{**given, **options})


def test_spectrum_measure_equals_the_dense_spectrum():
    model, data = net(), batches()
    H, G = dense(model, data)
    values = torch.linalg.eigvalsh(H)
    (record,) = SPECTRUM.compute(view(model, data, loss=loss))
    assert record.valid
    value, error = record.value, record.uncertainty
    assert abs(value["largest"] - float(values[-1])) <= error["largest"] + 1e-9
    assert abs(value["gauss_newton_largest"] - float(torch.linalg.eigvalsh(G)[-1])) <= error["gauss_newton_largest"] + 1e-9
    assert value["eigenvalues"] == sorted(value["eigenvalues"], reverse=True)
    assert abs(value["trace"] - float(H.trace())) < 6 * error["trace"], "three runs: a wide margin"
    assert abs(value["gauss_newton_trace"] - float(G.trace())) < 6 * error["gauss_newton_trace"]
    area = torch.trapezoid(torch.tensor(value["density"]), torch.tensor(value["density_at"]))
    assert float(area) == pytest.approx(1, abs=1e-3)
    assert record.settings["parameters"] == len(H)


def test_spectrum_of_chosen_matrices_is_a_block():
    model, data = net(), batches()
    H, _ = dense(model, data)
    names, sizes, _, _ = flat(model)
    keep = torch.cat([torch.full((n,), k.startswith("2.")) for k, n in zip(names, sizes, strict=True)])
    v = view(model, data, loss=loss)
    v = view(model, data, loss=loss, sites=[s for s in v.sites if s.name == "2"])
    (record,) = SPECTRUM.compute(v)
    top = float(torch.linalg.eigvalsh(H[keep][:, keep])[-1])
    assert record.settings["parameters"] == int(keep.sum())
    assert record.value["largest"] == pytest.approx(top, abs=record.uncertainty["largest"] + 1e-9)


@pytest.mark.parametrize("measure", [SPECTRUM, LANDSCAPE], ids=lambda m: m.name)
def test_models_without_a_loss_or_with_broken_numbers_give_a_reason(measure):
    model, data = net(), batches()
    (record,) = measure.compute(view(model, data))
    assert not record.valid
    assert "no loss of its own" in record.note
    (record,) = measure.compute(view(model, [], loss=loss))
    assert "at least one calibration batch" in record.note
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    (record,) = measure.compute(view(model, data, loss=loss))
    assert not record.valid
    assert "not finite" in record.note
    (record,) = measure.compute(view(lm(), [torch.zeros(2, 3)], causal=True))
    assert "need a loss of their own" in record.note


def test_criteria_of_a_known_density():
    nodes = torch.tensor([[-2.0, 0.0, 8.0], [-1.0, 1.0, 4.0]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], dtype=torch.float64)
    found = lla_criteria(Quadrature(nodes, weights, 10))
    assert found["r_e"] == pytest.approx(0.25)
    k = [math.sqrt(1) / math.sqrt(2), math.sqrt(0.25) / (math.sqrt(0.25) + math.sqrt(2))]
    assert found["k_hn"] == pytest.approx(sum(k) / 2)
    assert found["k_hn_error"] == pytest.approx(abs(k[0] - k[1]) / 2)
    assert lla_criteria(Quadrature(-nodes.abs(), weights, 10))["r_e"] is None


def test_normalisations():
    w = {"a": torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]), "b": torch.tensor([2.0, 0.0]), "c": torch.ones(2, 3, 2)}
    d = random_direction(w, 0)
    assert {k: v.shape for k, v in d.items()} == {k: v.shape for k, v in w.items()}
    rows = normalise(d, w, "filter")
    assert torch.allclose(rows["a"].norm(dim=1), w["a"].norm(dim=1))
    assert torch.allclose(rows["c"].flatten(1).norm(dim=1), w["c"].flatten(1).norm(dim=1))
    assert not rows["b"].any(), "biases stay"
    assert torch.allclose(normalise(d, w, "filter", vectors=True)["b"].norm(), w["b"].norm())
    columns = normalise(d, w, "filter", turned=["a"])
    assert torch.allclose(columns["a"].norm(dim=0), w["a"].norm(dim=0))
    layer = normalise(d, w, "layer")
    assert torch.allclose(layer["a"].norm(), w["a"].norm())
    whole = normalise(d, w, "model", vectors=True)
    assert length(whole) == pytest.approx(length(w), rel=1e-6)
    ratio = whole["a"] / d["a"]
    assert float(ratio.max() - ratio.min()) < 1e-6, "one factor for all of it: the direction does not turn"
    assert torch.equal(normalise(d, w, "weight")["a"], d["a"] * w["a"])
    assert torch.equal(normalise(d, w, "none", vectors=True)["b"], d["b"])
    assert torch.isfinite(normalise({"a": torch.zeros(3, 2)}, {"a": w["a"]})["a"]).all()
    with pytest.raises(UsageError, match="expected one of"):
        normalise(d, w, "rows")


def test_filter_normalised_slices_do_not_depend_on_the_scale_of_a_relu_network():
    """Scaling a hidden unit in and out leaves the function, and a filter-normalised slice of these weights as well (Li et al.)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    data = batches()
    L = objective(model, data)
    w = L.state()
    scale = 10.0
    grown = {"0.weight": w["0.weight"] * scale, "2.weight": w["2.weight"] / scale}
    direction = random_direction(w, 1)
    at = [-0.5, 0.25]
    plain = surface(L, [normalise(direction, w)], [at])
    with torch.no_grad():
        for k, p in model.named_parameters():
            p.copy_(grown[k])
    assert torch.allclose(surface(L, [normalise(direction, grown)], [at]), plain, atol=1e-10)
    assert not torch.allclose(surface(L, [direction], [at]), plain, atol=1e-3)


def test_surface_of_a_quadratic_is_the_quadratic():
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    L = Objective(model, [x], loss=lambda y, _: 0.5 * y.square().mean())
    found = eigsh(Hessian(L), 2, vectors=True, steps=3)
    axes = [{"weight": v.reshape(1, 3) * math.sqrt(2 / e)} for v, e in zip(found.vectors.T, found.values.tolist(), strict=True)]
    with torch.no_grad():
        model.weight.zero_()
    grid = surface(L, axes, [(-1.0, 0.0, 1.0), (-1.0, 0.0, 2.0)])
    expected = torch.tensor([[a * a + b * b for b in (-1.0, 0.0, 2.0)] for a in (-1.0, 0.0, 1.0)], dtype=torch.float64)
    assert torch.allclose(grid, expected, atol=1e-12)
    with pytest.raises(UsageError, match="list of steps for each axis"):
        surface(L, axes, [(0.0,)])


def test_landscape_measure_slices_run_through_the_loss():
    model, data = net(), batches()
    before = {k: p.clone() for k, p in model.named_parameters()}
    (record,) = LANDSCAPE.compute(view(model, data, loss=loss))
    assert record.valid
    value = record.value
    L = objective(model, data)
    centre = L.mean(L.state())
    for name in ("random_1", "random_2", "hessian_1", "hessian_2"):
        assert value[name][10] == pytest.approx(centre)
        assert len(value[name]) == len(value["at"]) == 21
    H, _ = dense(model, data)
    values, vectors = torch.linalg.eigh(H)
    assert value["curvatures"] == pytest.approx(values.flip(0)[:2].tolist(), abs=1e-6)
    step = 0.1 * math.sqrt(2 / float(values[-1])) * vectors[:, -1]
    names, sizes, shapes, w = flat(model)
    moved = {k: p.reshape(s) for k, p, s in zip(names, (w + step).split(sizes), shapes, strict=True)}
    near = L.mean(moved)
    assert min(abs(near - value["hessian_1"][i]) for i in (9, 11)) < 1e-6, "the sign of an eigenvector is free"
    assert all(torch.equal(before[k], p) for k, p in model.named_parameters())


def test_few_takes_whole_rows_up_to_the_limit():
    long = Batch(torch.zeros(4, 10).long(), torch.ones(4, 10).long())
    assert [len(b.input_ids) for b in few([long, long], 55)] == [4, 1]
    assert [len(b.input_ids) for b in few([long, long], 3)] == [1], "at least one row"
    assert len(few([torch.zeros(8, 2)] * 5, 20)) == 3
    assert few([], 10) == []
    assert [len(b.input_ids) for b in few([long, long], 75, rows=2)] == [2, 2, 2, 1]
    padded = Batch(torch.zeros(2, 10).long(), torch.tensor([[1] * 4 + [0] * 6, [1] * 10]))
    assert few([padded], 4)[0].input_ids.shape == (1, 4), "and no wider than they are"


def test_unknown_parameters_are_refused():
    with pytest.raises(Refused, match=r"no real parameter '9\.weight'"):
        Hessian(objective(net(), batches()), ["9.weight"])
