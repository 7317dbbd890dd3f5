"""`solve` against closed forms: what each recipe promises, on layers small enough for brute force."""

from dataclasses import dataclass, field

import pytest
import torch

from eckart.axes import Budget, Bundle, Recipe, Site, form, metric
from eckart.axes.form import balance
from eckart.axes.solve import cost, solve, spectrum
from eckart.errors import Refused
from eckart.registry import get_recipe, list_recipes

SITE = Site("layer", (24, 32), ("layer.weight",), bias="layer.bias", reads="layer", block=0)
BUNDLE = Bundle("layer", (SITE,))
G = torch.Generator().manual_seed(0)
W = torch.randn(24, 32, generator=G)
B = torch.randn(24, generator=G)
X = torch.randn(400, 32, generator=G, dtype=torch.float64) @ torch.randn(32, 32, generator=G, dtype=torch.float64) + torch.randn(
    32, generator=G, dtype=torch.float64
)
PAIRS = [n for n in list_recipes("compress") if "pair" in get_recipe(n).form.gives]
D = torch.randn(400, 24, generator=G, dtype=torch.float64) * torch.logspace(0, -1, 24, dtype=torch.float64)  # gradients at the output


@dataclass
class Moments:
    rows: torch.Tensor
    mean: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean = self.rows.mean(0)

    def second(self):
        return self.rows.T @ self.rows / len(self.rows)

    def covariance(self):
        return torch.cov(self.rows.T, correction=0)


class Known:
    """Statistics computed here from the rows, not by the library."""

    def get(self, stat, site):
        if stat.kind == "moments":
            return Moments(D if stat.via == "backward" else X)
        if stat.kind == "absmean":
            return X.abs().mean(0)
        return X.square().mean(0) + 0.1  # any positive vector will do for fisher


def run(recipe, rank, site=SITE):
    return solve(recipe, Bundle(site.name, (site,)), lambda s: W, lambda k: B, Known(), rank=rank, algorithm="auto", seed=0)


def dense(edits):
    return edits.tensors["layer.up.weight"].double() @ edits.tensors["layer.down.weight"].double()


@pytest.mark.parametrize("name", PAIRS)
def test_full_rank_returns_the_layer(name) -> None:
    edits = run(get_recipe(name), 24)
    assert torch.allclose(dense(edits), W.double(), atol=1e-4)
    assert torch.allclose(edits.tensors["layer.up.bias"], B, atol=1e-4)
    assert edits.tensors["layer.weight"].shape == (1,)
    assert edits.dropped == {"layer.bias": "moved to layer.up.bias"}


@pytest.mark.parametrize("name", PAIRS)
def test_recorded_loss_equals_the_measured_loss_in_the_recipes_own_metric(name) -> None:
    recipe = get_recipe(name)
    edits = run(recipe, 6)
    gap = W.double() - dense(edits)
    if recipe.metric.kind == "input_gram" and recipe.metric.centred:
        x = X - X.mean(0)
        measured = float((x @ gap.T).square().sum() / len(x))
    elif recipe.metric.kind == "input_gram":
        measured = float((X @ gap.T).square().sum() / len(X))
    elif recipe.metric.kind == "input_scale":
        scale = {"absmean": X.abs().mean(0).sqrt() + 1e-6, "fisher": (X.square().mean(0) + 0.1).sqrt()}[recipe.metric.of]
        measured = float((gap * scale).square().sum())
    elif recipe.metric.kind == "both":
        values, vectors = torch.linalg.eigh(D.T @ D / len(D))
        root = (vectors * values.clamp_min(1e-4 * values.max()).sqrt()) @ vectors.T
        measured = float((root @ gap @ X.T).square().sum() / len(X))
    else:
        measured = float(gap.square().sum())
    assert edits.record["loss"] == pytest.approx(measured, rel=1e-3)


def test_svd_llm_is_the_best_rank_r_map_of_the_outputs() -> None:
    y = X @ W.double().T
    tail = torch.linalg.svdvals(y)[6:].square().sum() / len(X)
    assert run(get_recipe("svd_llm"), 6).record["loss"] == pytest.approx(float(tail), rel=1e-6)


def test_afm_keeps_the_mean_and_beats_the_uncentred_form() -> None:
    edits = run(get_recipe("afm"), 6)
    y = X @ W.double().T + B.double()
    mean, vectors = y.mean(0), torch.linalg.eigh(torch.cov(y.T))[1].flip(1)[:, :6]
    expected = (y - mean) @ vectors @ vectors.T + mean  # the card's formula on the features themselves
    found = X @ dense(edits).T + edits.tensors["layer.up.bias"].double()
    assert torch.allclose(found, expected, atol=1e-3)
    plain = run(get_recipe("svd_llm"), 6)
    other = X @ dense(plain).T + B.double()
    assert (found - y).square().sum() < (other - y).square().sum()


def test_afm_adds_a_bias_where_there_is_none_and_counts_it() -> None:
    bare = Site("layer", (24, 32), ("layer.weight",), reads="layer", block=0)
    edits = run(get_recipe("afm"), 6, bare)
    assert "layer.up.bias" in edits.tensors
    assert edits.dropped == {}
    assert cost(get_recipe("afm"), Bundle("layer", (bare,))).at(6) == 6 * 56 + 24
    assert cost(get_recipe("svd"), Bundle("layer", (bare,))).at(6) == 6 * 56


def test_two_sided_without_an_out_metric_is_svd_llm() -> None:
    one = get_recipe("two_sided").with_(metric=metric.Both(into=metric.InputGram(), out=metric.Identity()))
    assert torch.allclose(dense(run(one, 5)), dense(run(get_recipe("svd_llm"), 5)), atol=1e-6)


def test_asvd_with_power_zero_is_svd() -> None:
    flat = get_recipe("asvd").with_(metric=metric.InputScale(of="absmean", power=0.0))
    assert torch.allclose(dense(run(flat, 5)), dense(run(get_recipe("svd"), 5)), atol=5e-6)  # svd computes in float32


def test_each_metric_wins_in_its_own_sense() -> None:
    def output_error(name):
        return float((X @ (W.double() - dense(run(get_recipe(name), 6))).T).norm())

    def weight_error(name):
        return float((W.double() - dense(run(get_recipe(name), 6))).norm())

    assert output_error("svd_llm") < output_error("asvd")
    assert output_error("svd_llm") < output_error("svd")
    assert weight_error("svd") < weight_error("svd_llm")


def test_transposed_storage_gives_the_same_pair() -> None:
    turned = Site("layer", (24, 32), ("layer.weight",), bias="layer.bias", view="transposed", block=0)
    assert torch.equal(dense(run(get_recipe("svd"), 4, turned)), dense(run(get_recipe("svd"), 4)))
    back = run(get_recipe("svd").with_(form=form.Pair(layout="dense")), 4, turned)
    assert back.tensors["layer.weight"].shape == (32, 24)


def test_wave_one_then_cut_equals_one_solve() -> None:
    recipe = get_recipe("two_sided")
    seen = spectrum(recipe, BUNDLE, lambda s: W, Known(), cap=13, algorithm="gram", seed=0)
    assert len(seen.values) == 24
    cut = solve(recipe, BUNDLE, lambda s: W, lambda k: B, Known(), rank=7, algorithm="gram", seed=0, parts=seen.parts)
    again = solve(recipe, BUNDLE, lambda s: W, lambda k: B, Known(), rank=7, algorithm="gram", seed=0)
    assert torch.allclose(dense(cut), dense(again), atol=1e-6)
    assert cut.record["loss"] == pytest.approx(float(seen.values[7:].square().sum()), rel=1e-9)


@pytest.mark.parametrize("how", ["even", "left", "right"])
def test_balance_keeps_the_product_and_places_the_norm(how) -> None:
    left, right = balance(torch.randn(5, 3, generator=G), torch.randn(3, 7, generator=G), how)
    norms = left.norm(dim=0), right.norm(dim=1)
    if how == "even":
        assert torch.allclose(*norms)
    else:
        assert torch.allclose(norms[1 if how == "left" else 0], torch.ones(3))


def test_even_balance_of_a_plain_svd_is_the_square_root() -> None:
    edits = run(get_recipe("svd"), 4)
    s = torch.linalg.svdvals(W)[:4]
    assert torch.allclose(edits.tensors["layer.up.weight"].norm(dim=0), s.sqrt(), rtol=1e-4)
    assert torch.allclose(edits.tensors["layer.down.weight"].norm(dim=1), s.sqrt(), rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value) -> None:
    bad = W.clone()
    bad[3, 4] = value
    with pytest.raises(Refused, match=r"layer\.weight: 1 of 768 values are NaN or Inf"):
        solve(get_recipe("svd"), BUNDLE, lambda s: bad, lambda k: B, Known(), rank=3, algorithm="auto", seed=0)


@pytest.mark.parametrize("rank", [0, 25])
def test_ranks_outside_the_matrix_are_refused(rank) -> None:
    with pytest.raises(Refused, match=f"rank {rank} is outside 1..24"):
        run(get_recipe("svd"), rank)


def test_zero_matrix_is_defined() -> None:
    edits = solve(get_recipe("svd"), BUNDLE, lambda s: torch.zeros(24, 32), lambda k: B, Known(), rank=3, algorithm="auto", seed=0)
    assert torch.equal(dense(edits), torch.zeros(24, 32, dtype=torch.float64))
    assert edits.record["relative_error"] == 0


def test_a_recipe_is_a_value() -> None:
    recipe = Recipe(name="a", verb="compress", paper="-", budget=Budget(keep=0.5))
    assert recipe == recipe.with_()
    assert hash(recipe.metric) == hash(metric.Identity())
