"""Measures of hidden states against brute force on each text alone: anisotropy, rank, LIM, MNN, dimension, RDP."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from eckart.measures import intrinsic_dimension as dimension_file
from eckart.measures import mnn as mnn_file
from eckart.measures.activation_rank import MEASURE as RANK
from eckart.measures.anisotropy import MEASURE as ANISOTROPY
from eckart.measures.intrinsic_dimension import MEASURE as DIMENSION
from eckart.measures.lim import MEASURE as LIM
from eckart.measures.mnn import MEASURE as MNN
from eckart.measures.mnn import of_text
from eckart.measures.rdp import MEASURE as RDP
from eckart.spectra.dimension import distances, likelihood_dimension, two_nn
from tests.measures.text_models import KINDS, last, make, run, states, texts
from tests.spectra.test_trajectory import recursion

BLOCKS = {
    "llama": ["model.layers.0", "model.layers.1"],
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "bert": ["encoder.layer.0", "encoder.layer.1"],
}
MANY = texts(tuple(90 + 3 * i for i in range(10)))


# ---- anisotropy


@pytest.mark.parametrize("kind", KINDS)
def test_anisotropy_is_the_mean_over_all_pairs(kind) -> None:
    model, ids = make(kind), texts()
    found = run(model, ANISOTROPY, ids)[""]
    rows = last(model, ids)
    unit = nn.functional.normalize(torch.cat(rows), dim=1)
    owner = torch.cat([torch.full((len(r),), i) for i, r in enumerate(rows)])
    cosine, same = unit @ unit.T, owner[:, None] == owner
    apart = ~torch.eye(len(unit), dtype=torch.bool)
    assert found.value["mean_cosine"] == pytest.approx(float(cosine[apart].mean()), abs=1e-9)
    assert found.value["within_texts"] == pytest.approx(float(cosine[apart & same].mean()), abs=1e-9)
    assert found.value["across_texts"] == pytest.approx(float(cosine[~same].mean()), abs=1e-9)
    assert (found.settings["rows"], found.settings["texts"]) == (47, 8)


def test_anisotropy_of_a_block_that_runs_several_times_knows_its_texts() -> None:
    model, ids = make("albert"), texts((3, 5, 2))
    found = run(model, ANISOTROPY, ids, size=2)
    (block,) = [k for k in found if k]
    calls = states(model, ids, block)
    rows = nn.functional.normalize(torch.cat(calls), dim=1)
    owner = torch.cat([torch.full((len(c),), i // 3) for i, c in enumerate(calls)])  # three layers share the block
    apart = owner[:, None] != owner
    assert found[block].value["across_texts"] == pytest.approx(float((rows @ rows.T)[apart].mean()), abs=1e-9)


def test_anisotropy_of_rows_without_pairs() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
    found = run(net, ANISOTROPY, rows=[torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])], ids=[[0]] * 3)["0"]
    assert found.value["mean_cosine"] == pytest.approx(0.6)
    assert "within_texts" not in found.value
    assert "1 rows are zero and left out" in found.note
    alone = run(net, ANISOTROPY, rows=[torch.tensor([[1.0, 0.0]])], ids=[[0]])["0"]
    assert (alone.valid, alone.note) == (False, "expected at least two rows that are not zero, found 1")
    one = run(make("bert"), ANISOTROPY, [[1, 2, 3]])[""]
    assert one.valid
    assert "a single text" in one.note
    assert "across_texts" not in one.value


# ---- rank of activations


@pytest.mark.parametrize("kind", KINDS)
def test_rank_of_activations_is_that_of_the_centred_rows(kind) -> None:
    model, ids = make(kind), texts()
    found = run(model, RANK, ids)[""].value
    x = torch.cat(last(model, ids)).numpy()
    s = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p, square = s / s.sum(), s**2
    assert found["effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert found["participation_rank"] == pytest.approx(square.sum() ** 2 / (square**2).sum(), rel=1e-9)
    assert found["rank90"] == int(np.searchsorted(np.cumsum(square) / square.sum(), 0.9) + 1)
    assert found["mean_share"] == pytest.approx(len(x) * (x.mean(0) ** 2).sum() / (x**2).sum(), rel=1e-9)


def test_rank_of_rows_that_do_not_vary_and_of_few_rows() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    same = run(net, RANK, rows=[torch.ones(5, 3)], ids=[[0]] * 5)
    assert (same["0"].valid, same["0"].note) == (False, "every row is the same")
    assert run(net, RANK, rows=[torch.ones(1, 3)], ids=[[0]])["0"].note == "a single row"
    few = run(net, RANK, rows=[torch.eye(3)[:2]], ids=[[0]] * 2)["0"]
    assert few.value["effective_rank"] == pytest.approx(1.0)
    assert "2 rows span at most 1 directions" in few.note


def test_rank_of_a_planted_subspace_under_a_huge_mean() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=g, dtype=torch.float64) @ torch.linalg.qr(torch.randn(30, 5, generator=g, dtype=torch.float64))[0].T
    net = nn.Sequential(nn.Linear(30, 30, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(30))
    found = run(net, RANK, rows=list((x + 1000).split(500)), ids=[[0]] * 4000)["0"].value
    assert found["effective_rank"] == pytest.approx(5, rel=0.01)
    assert found["mean_share"] > 0.99999


# ---- LIM


@pytest.mark.parametrize("kind", BLOCKS)
def test_lim_is_minus_the_cosine_of_what_enters_and_leaves(kind) -> None:
    model, ids = make(kind), texts()
    found = run(model, LIM, ids)
    assert list(found) == BLOCKS[kind]
    for block, record in found.items():
        x, y = states(model, ids, block, "in"), states(model, ids, block)
        flat = nn.functional.cosine_similarity(torch.cat(x).flatten(), torch.cat(y).flatten(), dim=0)
        each = [nn.functional.cosine_similarity(a, b, dim=1) for a, b in zip(x, y, strict=True)]
        assert record.value["lim"] == pytest.approx(-float(flat), abs=1e-9)
        assert record.value["per_token"] == pytest.approx(-float(torch.cat(each).mean()), abs=1e-9)
        means = np.array([float(e.mean()) for e in each])
        assert record.uncertainty["per_token"] == pytest.approx(means.std(ddof=1) / math.sqrt(8), rel=1e-6)


class Blocks(nn.Module):
    """Two blocks that change the state as told."""

    class Block(nn.Module):
        def __init__(self, act) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))
            self.act = act

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(x)

    def __init__(self, *acts) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Block(a) for a in acts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_lim_of_blocks_that_scale_turn_write_in_place_or_change_shape() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = run(Blocks(lambda x: 3 * x, lambda x: x.neg_()), LIM, rows=[x.clone()], ids=[[0]] * 6)
    assert found["layers.0"].value["lim"] == pytest.approx(-1)
    assert found["layers.1"].value == {"lim": pytest.approx(1), "per_token": pytest.approx(1)}
    odd = run(Blocks(lambda x: x[:, :2], lambda x: x * 0), LIM, rows=[x], ids=[[0]] * 6)
    assert "cannot be compared" in odd["layers.0"].note
    assert odd["layers.1"].note == "every row that enters it or leaves it is zero"
    none = run(nn.Sequential(nn.Linear(4, 4)), LIM, rows=[x], ids=[[0]] * 6)
    assert none[""].note == "the model has no repeated blocks"


# ---- MNN


def test_mnn_is_the_card_s_formula_with_the_true_norm_beside_it() -> None:
    x = np.random.default_rng(0).standard_normal((20, 6)) + 3
    z = x - x.mean(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    s = np.linalg.svd(z, compute_uv=False)
    values = np.linalg.eigvalsh(z.T @ z / 20)
    found = of_text(torch.from_numpy(x))
    assert found["mnn"] == pytest.approx(np.sort(np.linalg.norm(z, axis=0))[::-1][:6].sum() / 20)
    assert found["nuclear_norm"] == pytest.approx(s.sum() / 20)
    assert found["entropy"] == pytest.approx(-(values * np.log(values)).sum() / np.log(6))
    wide = of_text(torch.from_numpy(x.T.copy()))  # fewer rows than columns: only min(T, d) column norms count
    w = x.T - x.T.mean(0)
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    assert wide["mnn"] == pytest.approx(np.sort(np.linalg.norm(w, axis=0))[::-1][:6].sum() / 6)


def test_mnn_orders_ranks_backwards_and_the_note_says_so() -> None:
    found = []
    for rank in (1, 2, 8, 32, 64):
        draw = np.random.default_rng(rank)
        found.append(of_text(torch.from_numpy(draw.standard_normal((64, rank)) @ draw.standard_normal((rank, 256)))))
    for name in ("nuclear_norm", "entropy", "effective_rank"):
        assert all(a[name] < b[name] for a, b in pairwise(found))
    assert all(a["mnn"] > b["mnn"] for a, b in pairwise(found))
    assert "does not order by rank" in MNN.note


def test_mnn_changes_under_rotation_the_true_norm_does_not() -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((40, 12)) * np.linspace(5, 0.1, 12)
    turn = np.linalg.qr(draw.standard_normal((12, 12)))[0]
    one, two = of_text(torch.from_numpy(x)), of_text(torch.from_numpy(x @ turn))
    assert two["nuclear_norm"] == pytest.approx(one["nuclear_norm"])
    assert abs(two["mnn"] - one["mnn"]) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_mnn_of_a_run_is_the_mean_over_its_texts(kind, monkeypatch) -> None:
    model, ids = make(kind), texts()
    found = run(model, MNN, ids)[""]
    each = [of_text(h) for h in last(model, ids) if len(h) > 1]
    assert found.settings["texts"] == len(each) == 7
    for name in each[0]:
        values = np.array([e[name] for e in each])
        assert found.value[name] == pytest.approx(values.mean(), rel=1e-6)
        assert found.uncertainty[name] == pytest.approx(values.std(ddof=1) / math.sqrt(7), rel=1e-5)
    assert "1 texts have a single token" in found.note
    monkeypatch.setattr(mnn_file, "TEXTS", 3)
    few = run(model, MNN, ids)[""]
    assert few.settings["texts"] <= 3
    assert few.value["mnn"] == pytest.approx(run(model, MNN, ids, size=8)[""].value["mnn"], rel=1e-9)


def test_mnn_of_texts_without_directions() -> None:
    assert of_text(torch.ones(5, 3)) is None
    assert of_text(torch.ones(1, 3)) is None
    assert of_text(torch.tensor([[1.0], [2.0]]))["entropy"] == 0.0
    assert "no text can be measured: 2 texts have a single token" in run(make("bert"), MNN, [[1], [2]])[""].note


# ---- intrinsic dimension of texts


def test_texts_that_are_too_short_have_no_dimension() -> None:
    record = run(make("gpt2"), DIMENSION, [[1, 2, 3], [4] * 30])[""]
    assert not record.valid
    assert record.note == "no text is long enough: 2 texts have fewer than 80 distinct tokens and are left out"


@pytest.fixture(scope="module")
def long_model():
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=256
        )
        model = BertModel(config).double().eval()
        for p in model.parameters():
            p.data.add_(0.3 * torch.randn(p.shape, dtype=torch.float64))
    return model


def test_dimension_equals_the_estimators_on_each_text(long_model) -> None:
    found = run(long_model, DIMENSION, [*MANY, [1, 2, 3]], specials=(2, 3), size=4)[""]
    clouds = [distances(h[2:-3]) for h in last(long_model, MANY)]
    assert found.settings["texts"] == 10
    assert found.settings["mean_tokens"] == pytest.approx(np.mean([len(m) - 5 for m in MANY]))
    for name, estimate in (("mle", likelihood_dimension), ("twonn", two_nn)):
        values = np.array([estimate(d) for d in clouds])
        assert found.value[name] == pytest.approx(values.mean(), rel=1e-6)
        assert found.uncertainty[name] == pytest.approx(values.std(ddof=1) / math.sqrt(10), rel=1e-4)
    assert found.value["phd"] == pytest.approx(found.value["mle"], rel=0.5)
    assert "1 texts have fewer than 80 distinct tokens" in found.note
    assert "correlate with r =" in found.note


def test_dimension_draws_texts_by_the_seed_whatever_the_batches(long_model, monkeypatch) -> None:
    monkeypatch.setattr(dimension_file, "TEXTS", 4)
    one, two = (run(long_model, DIMENSION, MANY, size=size)[""] for size in (1, 5))
    assert one.settings["texts"] == 4
    assert one.settings["texts_long_enough"] == 10
    assert one.value["mle"] == pytest.approx(two.value["mle"], rel=1e-9)
    assert run(long_model, DIMENSION, MANY, seed=1)[""].value["mle"] != pytest.approx(one.value["mle"], rel=1e-3)


# ---- RDP


@pytest.mark.parametrize("kind", BLOCKS)
def test_rdp_splits_the_path_of_the_mean_states(kind) -> None:
    model, ids = make(kind), texts()
    found = run(model, RDP, ids)
    home = BLOCKS[kind][0].rpartition(".")[0]
    each = [states(model, ids, BLOCKS[kind][0], "in"), *(states(model, ids, b) for b in BLOCKS[kind])]
    points = torch.stack([torch.stack([h.mean(0) for h in layer]).mean(0) for layer in each])
    points = (points / points.norm(dim=1, keepdim=True)).numpy()
    widest = max(np.linalg.norm(a - b) for a in points for b in points)
    reach = found[BLOCKS[kind][0]].value
    for factor, kept in ((1 - 1e-9, {0, 1, 2}), (1 + 1e-9, {0, 2})):
        assert recursion(points, reach * widest * factor) == kept
    assert found[home].value["breakpoints"] == [0]
    assert found[home].value["agreement"] == [1.0]
    assert found[BLOCKS[kind][1]].note == "the end of the path, which is always kept"


def test_rdp_finds_the_block_that_turns() -> None:
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2)))[0]

    def grow(x: torch.Tensor) -> torch.Tensor:
        return x + 0.01 * torch.ones(4)

    acts = [grow, grow, lambda x: x @ turn, grow, grow]
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)) + torch.tensor([4.0, 0, 0, 0])
    found = run(Blocks(*acts), RDP, rows=[x], ids=[[0]] * 5)
    assert set(found["layers"].value["breakpoints"]) <= {1, 2}  # before and after the turn
    assert found["layers"].value["order"][0] in (1, 2)
    assert found["layers"].settings["texts"] == 5


def test_rdp_of_paths_that_are_none() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    still = run(Blocks(*[lambda x: x] * 4), RDP, rows=[x], ids=[[0]] * 2)["layers"]
    assert (still.value["breakpoints"], still.value["reach"]) == ([], [0.0, 0.0, 0.0])
    wide = run(Blocks(lambda x: x[..., :2], lambda x: x), RDP, rows=[x], ids=[[0]] * 2)
    assert all("states of different widths" in r.note for r in wide.values())
    shared = run(make("albert"), RDP)
    assert all(not r.valid and "runs several times per text" in r.note for r in shared.values())
    assert run(nn.Sequential(nn.Linear(4, 4)), RDP, rows=[x], ids=[[0]] * 2)[""].note == "the model has no repeated blocks"
