"""Weight matching and linear mode connectivity: permuted copies come back exactly, barriers against loops written out."""

import copy
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from eckart.catalogue import from_model
from eckart.catalogue.symmetries import candidates
from eckart.data.batches import Batch
from eckart.errors import Refused, UsageError
from eckart.measures.base import ModelView
from eckart.measures.mode_connectivity import MEASURE, _shuffled, barrier, symmetries
from eckart.spectra.matching import match, permuted
from tests.stats.stats_models import make


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(seed=0, widths=(5, 8, 7, 3), norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = []
        for i, (n, m) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Linear(n, m)]
            if i + 2 < len(widths):
                layers += [*([nn.BatchNorm1d(m)] if norm else []), nn.ReLU()]
        net = nn.Sequential(*layers).double()
        for module in net:
            if isinstance(module, nn.BatchNorm1d):
                for t in (module.weight, module.bias, module.running_mean):
                    t.data.normal_()
                module.running_var.data.uniform_(0.5, 2)
    return net


def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])


def points(count=3, size=20, width=5, classes=3):
    g = torch.Generator().manual_seed(7)
    return [
        (torch.randn(size, width, generator=g, dtype=torch.float64), torch.randint(0, classes, (size,), generator=g)) for _ in range(count)
    ]


def view(model, other, data, **options):
    example = options.pop("example", None)
    catalogue = from_model(model, example)
    config = model.config.to_dict() if hasattr(model, "config") else {}
    given = {"config": config, "causal": False, "loss": loss, "sites": [s for s in catalogue.sites if s.kind in ("linear", "conv")]}
    return ModelView(model, catalogue, batches=data, other=other, **{**given, **options})


def shuffle(model, groups, seed=1):
    """The model with all its groups in a random order."""
    other = copy.deepcopy(model)
    state = {k: t.detach() for k, t in (*other.named_parameters(), *other.named_buffers())}
    for name, members in groups.items():
        state |= _shuffled(state, members, seed, name)
    with torch.no_grad():
        for k, t in (*other.named_parameters(), *other.named_buffers()):
            t.copy_(state[k])
    return other


def test_one_hidden_layer_is_matched_by_brute_force():
    """All 120 permutations of five units: the assignment finds the best of them."""
    a, b = mlp(0, (3, 5, 2)), mlp(1, (3, 5, 2))
    wa, wb = ({k: p.detach() for k, p in m.named_parameters()} for m in (a, b))
    groups = candidates(a, from_model(a), {})
    found = match(wa, wb, groups)
    best = min(
        sum(float((wa[k] - v).square().sum()) for k, v in {**wb, **permuted(wb, groups["0"], torch.tensor(order))}.items())
        for order in itertools.permutations(range(5))
    )
    norm = sum(float(p.square().sum()) for p in wa.values())
    assert found.distance[1] == pytest.approx(math.sqrt(best / norm))
    assert found.sweeps == 2, "one hidden layer: one sweep, and one that changes nothing"


@pytest.mark.parametrize("norm", [False, True])
def test_a_permuted_network_comes_back_exactly_and_has_no_barrier(norm):
    a = mlp(norm=norm)
    with torch.no_grad():
        for p in a.parameters():
            p.mul_(3)
    groups = candidates(a, from_model(a), {})
    b = shuffle(a, groups)
    x = points()[0][0]
    data = [(z, a.eval()(z).argmax(1)) for z, _ in points()]  # it is right on its own labels, as after training
    assert torch.allclose(a(x), b.eval()(x), atol=1e-12), "its function is the same"
    assert not torch.equal(a[0].weight, b[0].weight)
    records = list(MEASURE.compute(view(a, b, data)))
    value = records[0].value
    assert value["barrier"] > 1e-3
    assert value["barrier_matched"] == pytest.approx(0, abs=1e-12)
    assert value["distance_matched"] == 0
    assert value["units_moved"] > 0.5
    for record in records[1:]:
        assert record.value["alignment_matched"] == pytest.approx(1, abs=1e-9)
        assert record.value["alignment"] < 0.9
        assert record.value["cosine_matched"] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_permuted_transformers_come_back_exactly(kind):
    """Grouped queries with biases and rotary positions; fused projections stored transposed, learned positions, layer norms."""
    a = make(kind).eval()
    ids = {"input_ids": torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))}
    catalogue = from_model(a, ids)
    groups = candidates(a, catalogue, a.config.to_dict())
    assert {n.rpartition(".")[2] for n in groups} >= {"mlp", "attn heads" if kind == "gpt2" else "self_attn heads", "residual stream"}
    b = shuffle(a, groups)
    assert torch.allclose(a(**ids).logits, b(**ids).logits, rtol=1e-4, atol=1e-4)
    data = [Batch(ids["input_ids"], torch.ones(2, 9).long())]
    records = list(MEASURE.compute(view(a, b, data, loss=None, causal=True, example=ids)))
    value = records[0].value
    assert records[0].settings["groups"] == len(groups), "all of them proved to be symmetries"
    assert value["loss_other"] == pytest.approx(value["loss"], rel=1e-5)
    assert abs(value["path"][5] - value["path"][0]) > 1e-3
    assert value["distance"] > 0.5
    assert value["distance_matched"] == 0
    assert value["barrier_matched"] < 1e-6


def test_encoders_keep_their_exposed_residual_stream():
    a = make("bert").eval()
    ids = torch.randint(0, 40, (1, 6), generator=torch.Generator().manual_seed(0))
    found = view(a, a, [{"input_ids": ids}], example={"input_ids": ids}, loss=lambda y, _: y.last_hidden_state.sum())
    good, rejected = symmetries(found)
    assert rejected == ["residual stream"], "its channels are the output itself"
    assert len(good) == 4
    (record, *_) = MEASURE.compute(found)
    assert record.note.startswith("not symmetries of this model, so left alone: residual stream")


def test_units_that_are_told_apart_elsewhere_are_left_alone():
    class Marked(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("mark", torch.arange(6.0) / 3)

        def forward(self, x):
            return self.two(torch.relu(self.one(x) * self.mark.to(x)))

    model = Marked()
    good, rejected = symmetries(view(model, model, points(width=4)))
    assert (good, rejected) == ({}, ["one"])
    (record, *_) = MEASURE.compute(view(model, copy.deepcopy(model), points(width=4)))
    assert record.valid
    assert "nothing was matched: one" in record.note


def test_barrier_equals_the_path_written_out():
    a, b, data = mlp(0), mlp(1), points()
    record = next(iter(MEASURE.compute(view(a, b, data))))
    wa, wb = ({k: p.detach() for k, p in m.named_parameters()} for m in (a, b))
    path = []
    for i in range(11):
        mid = {k: (1 - i / 10) * wa[k] + i / 10 * wb[k] for k in wa}
        path.append(float(np.mean([float(loss(torch.func.functional_call(a, mid, (x,)), (x, y))) for x, y in data])))
    assert record.value["path"] == pytest.approx(path, abs=1e-12)
    expected = max(v - (1 - i / 10) * path[0] - i / 10 * path[-1] for i, v in enumerate(path))
    assert record.value["barrier"] == pytest.approx(max(expected, 0), abs=1e-12)
    assert record.value["distance_matched"] < record.value["distance"]


def test_barrier_and_its_error():
    losses = torch.tensor([[1.0, 2.0], [4.0, 3.0], [1.0, 2.0]], dtype=torch.float64)
    value, error = barrier(losses, torch.ones(2).double())
    assert value == 2
    assert error == pytest.approx(np.std([3, 1], ddof=1) / math.sqrt(2))
    assert barrier(losses[:, :1] * 0 + torch.tensor([[3.0], [1.0], [3.0]]), torch.ones(1).double()) == (0.0, None)


def test_grouped_queries_change_places_inside_their_group():
    heads, kv, width, d = 4, 2, 3, 5
    a = {"q": gaussian(heads * width, d), "k": gaussian(kv * width, d, seed=1), "o": gaussian(d, heads * width, seed=2)}
    q = torch.arange(heads * width).reshape(kv, heads // kv, width)
    members = [("q", 0, q), ("k", 0, torch.arange(kv * width).reshape(kv, width)), ("o", 1, q)]
    order, parts = torch.tensor([1, 0]), torch.tensor([[0, 1], [1, 0]])
    b = {**a, **permuted(a, members, order, parts)}
    explicit = torch.cat([a["q"].reshape(kv, 2, width, d)[i, j] for i, j in ((1, 0), (1, 1), (0, 1), (0, 0))])
    assert torch.equal(b["q"], explicit)
    found = match(a, b, {"heads": members})
    assert all(torch.equal(found.tensors[k], a[k]) for k in a)


def test_convolutions_and_flattened_images():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3)).double()
    groups = candidates(a, from_model(a), {})
    assert list(groups) == ["0", "2"]
    b = shuffle(a, groups)
    x = gaussian(2, 2, 5, 5)
    assert torch.allclose(a(x), b(x), atol=1e-12)
    data = [(x, torch.tensor([0, 2]))]
    record = next(iter(MEASURE.compute(view(a, b, data))))
    assert record.value["distance_matched"] == 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: nn.Sequential(*m, nn.Linear(3, 3)).double(), "in one of the two models only"),
        (lambda m: mlp(0, (5, 9, 7, 3)), r"has shapes \(8,\) and \(9,\)|has shapes \(8, 5\) and \(9, 5\)"),
        (lambda m: [m[0].weight.data.fill_(math.nan), m][1], "holds NaN or Inf"),
    ],
)
def test_models_that_do_not_fit_give_a_reason(spoil, reason):
    import re

    (record,) = MEASURE.compute(view(mlp(), spoil(copy.deepcopy(mlp())), points()))
    assert not record.valid
    assert re.search(reason, record.note)


def test_no_second_model_and_no_loss_give_a_reason():
    (record,) = MEASURE.compute(view(mlp(), None, points()))
    assert "no second model" in record.note
    (record,) = MEASURE.compute(view(mlp(), mlp(1), points(), loss=None))
    assert "no loss of its own" in record.note


def test_equal_models_have_no_barrier():
    a = mlp()
    records = list(MEASURE.compute(view(a, copy.deepcopy(a), points())))
    assert records[0].value["barrier"] == pytest.approx(0, abs=1e-12)
    assert records[0].value["units_moved"] == 0
    with torch.no_grad():
        a[2].weight.zero_()
    reasons = {r.module: r.note for r in MEASURE.compute(view(a, copy.deepcopy(a), points())) if not r.valid}
    assert reasons == {"2": "the matrix is zero"}


def test_without_scipy_the_path_is_measured_and_the_rest_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    a, b = mlp(0), mlp(1)
    with pytest.raises(UsageError, match=r"pip install 'eckart\[match\]'"):
        match(dict(a.named_parameters()), dict(b.named_parameters()), candidates(a, from_model(a), {}))
    record = next(iter(MEASURE.compute(view(a, b, points()))))
    assert record.valid
    assert record.value["barrier_matched"] == record.value["barrier"]
    assert "pip install 'eckart[match]'" in record.note


def test_tensors_that_do_not_fit_a_group_are_refused():
    hidden = torch.arange(3)[:, None]
    w = gaussian(3, 2)
    for a, b, reason in (
        ({"w": w}, {}, "the second network lacks"),
        ({"w": w}, {"w": gaussian(4, 2)}, "has shapes"),
        ({"w": w[:2]}, {"w": w[:2]}, "which has fewer"),
        ({"w": w * math.inf}, {"w": w}, "NaN or Inf"),
    ):
        with pytest.raises(Refused, match=reason):
            match(a, b, {"hidden": [("w", 0, hidden)]})
