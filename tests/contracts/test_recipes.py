"""What every compression recipe must hold to: one table over the registry, nothing to add for a new recipe."""

import json
from importlib import resources

import pytest
import torch

from eckart.axes import Budget, Bundle, Site, metric
from eckart.axes.border import from_yaml, to_dict, to_yaml
from eckart.axes.solve import cost, solve
from eckart.engine import Local
from eckart.errors import UsageError
from eckart.registry import entry, get_recipe, list_entries, list_recipes

NAMES = list_recipes("compress")
PAIRS = [n for n in NAMES if "pair" in get_recipe(n).form.gives]  # the others change whole groups: tests/recipes has theirs
SHAPES = [(24, 40), (40, 24), (32, 32)]


def rows(count: int, size: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=g, dtype=torch.float64) @ torch.randn(size, size, generator=g, dtype=torch.float64) + 1


class Moments:
    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.mean = x, x.mean(0)

    def second(self) -> torch.Tensor:
        return self.x.T @ self.x / len(self.x)

    def covariance(self) -> torch.Tensor:
        return torch.cov(self.x.T, correction=0).reshape(self.x.shape[1], -1)


class Declared:
    """Hands out statistics, and refuses those that the recipe did not declare."""

    def __init__(self, recipe) -> None:
        self.needs = recipe.needs()

    def get(self, stat, site):
        assert stat in self.needs, f"{stat} was never declared"
        m, n = site.shape
        if stat.kind == "moments":
            return Moments(rows(300, m if stat.at == "out" else n, 7))
        return rows(300, n, 7).abs().mean(0)


def site(m: int, n: int, dtype: str = "F32", bias: bool = True) -> Site:
    return Site("layer", (m, n), ("layer.weight",), bias="layer.bias" if bias else None, reads="layer", block=0, dtype=dtype)


def run(recipe, m, n, rank, weight=None, dtype="F32", seed=0):
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(3)) if weight is None else weight
    return w, solve(
        recipe,
        Bundle("layer", (site(m, n, dtype),)),
        lambda s: w,
        lambda k: torch.ones(m),
        Declared(recipe),
        rank=rank,
        algorithm="auto",
        seed=seed,
    )


def dense(edits):
    return edits.tensors["layer.up.weight"].double() @ edits.tensors["layer.down.weight"].double()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_identity_metric_gives_the_eckart_young_error(name, shape) -> None:
    w, edits = run(get_recipe(name).with_(metric=metric.Identity(), refine=None), *shape, 5)
    best = torch.linalg.svdvals(w.double())[5:].square().sum().sqrt()
    assert torch.dist(w.double(), dense(edits)) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_plain_svd_in_its_own_metric(name, shape) -> None:
    recipe = get_recipe(name)
    w, edits = run(recipe, *shape, 5)
    out, into = recipe.metric.sides(Bundle("layer", (site(*shape),)), Declared(recipe))

    def root(weight, size):
        if weight is None:
            return torch.eye(size, dtype=torch.float64)
        matrix = torch.diag(weight.matrix.double()) if weight.matrix.ndim == 1 else weight.matrix
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.clamp_min(max(0.0, weight.clamp * float(values.max()))) ** weight.power) @ vectors.T

    so, si = root(out, shape[0]), root(into, shape[1])
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    plain = (u[:, :5] * s[:5]) @ vh[:5]
    assert (so @ (w.double() - dense(edits)) @ si).norm() <= (so @ (w.double() - plain) @ si).norm() * (1 + 1e-6)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_stored_in_the_type_it_came_in(name, dtype) -> None:
    torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    w = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)).to(torch_dtype)
    _, edits = run(get_recipe(name), 24, 32, 24, w, dtype)
    assert {t.dtype for t in edits.tensors.values()} == {torch_dtype}
    limit = {"F32": 1e-5, "F16": 1e-2, "BF16": 5e-2}[dtype]
    assert torch.dist(dense(edits), w.double()) <= limit * w.double().norm()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("case", ["zero", "rank one", "repeated", "one row", "one column"])
def test_degenerate_matrices_are_defined(name, case) -> None:
    w = {
        "zero": torch.zeros(16, 20),
        "rank one": torch.outer(torch.arange(1.0, 17), torch.ones(20)),
        "repeated": torch.eye(16, 20),
        "one row": torch.arange(1.0, 21)[None],
        "one column": torch.arange(1.0, 17)[:, None],
    }[case]
    rank = min(2, *w.shape)
    _, edits = run(get_recipe(name), *w.shape, rank, w)
    assert all(torch.isfinite(t).all() for t in edits.tensors.values())
    if case not in ("repeated",):
        assert torch.allclose(dense(edits).float(), w, atol=1e-4)


@pytest.mark.parametrize("name", PAIRS)
def test_same_bytes_again_and_beside_others(name) -> None:
    recipe = get_recipe(name)

    def job(seed: int):
        return seed, run(recipe, 24, 32, 6, seed=0)[1].tensors

    one = dict(Local(workers=1).run(job, range(4)))
    four = dict(Local(workers=4).run(job, range(4)))
    for seed in range(4):
        for key, value in one[0].items():
            assert torch.equal(value, one[seed][key])
            assert torch.equal(value, four[seed][key])


@pytest.mark.parametrize("name", NAMES)
def test_yaml_round_trip(name) -> None:
    recipe = get_recipe(name)
    assert from_yaml(to_yaml(recipe)) == recipe
    json.dumps(to_dict(recipe), allow_nan=False)


@pytest.mark.parametrize("name", PAIRS)
def test_allocation_meets_the_budget_and_leaves_nothing_without_a_rank(name) -> None:
    recipe = get_recipe(name).with_(budget=Budget(keep=0.5))
    g = torch.Generator().manual_seed(0)
    bundles = {f"l{i}": Bundle(f"l{i}", (Site(f"l{i}", s, (f"l{i}.weight",), bias=f"l{i}.bias"),)) for i, s in enumerate(SHAPES * 3)}
    costs = {k: cost(recipe, b) for k, b in bundles.items()}
    spectra = {
        k: torch.linspace(1, 0.05, c.full, dtype=torch.float64) ** (1 + 3 * torch.rand(1, generator=g).double()) for k, c in costs.items()
    }
    ranks = recipe.allocate({k: recipe.score.curve(bundles[k], s, Declared(recipe)) for k, s in spectra.items()}, costs, recipe.budget)
    assert ranks.keys() == costs.keys()
    assert sum(costs[k].at(r) for k, r in ranks.items()) <= 0.5 * sum(c.dense for c in costs.values())
    assert all(r is None or 1 <= r <= costs[k].break_even for k, r in ranks.items())


@pytest.mark.parametrize("row", list_entries(), ids=lambda e: e.name)
def test_card_fields_are_filled(row) -> None:
    assert row.title
    assert row.paper.startswith(("arXiv:", "doi:", "https://"))
    assert row.summary.endswith(".")
    assert row.fidelity == "exact" or row.differs
    assert row.name == row.name.lower()
    assert (resources.files("eckart") / (row.module.removeprefix("eckart.").replace(".", "/") + ".py")).is_file()


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"no system 'svdllm'. Did you mean 'svd_llm'"):
        entry("svdllm")
    with pytest.raises(UsageError, match=r"effective_rank is a measure, not a recipe"):
        get_recipe("effective_rank")
    with pytest.raises(UsageError, match=r"no system has the verb 'compres'. Did you mean 'compress'"):
        list_recipes("compres")
