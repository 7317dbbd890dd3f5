"""The metric of weight gradients against the quantity it stands for: the mean square of the first-order change of the loss."""

import re
from types import SimpleNamespace

import pytest
import torch

from eckart.axes import Recipe, Site, form, group, metric
from eckart.axes.border import override
from eckart.axes.protocols import Bundle
from eckart.axes.solve import solve, spectrum
from eckart.errors import Refused, UsageError
from eckart.registry import get_recipe

G = torch.Generator().manual_seed(0)
RECIPE = Recipe(name="x", verb="compress", paper="-", metric=metric.WeightGrads(clamp=0.0))
SHARED = RECIPE.with_(form=form.SharedBasis())


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


class Known:
    """Sums over the gradients of each site, formed one by one."""

    def __init__(self, grads: dict[str, torch.Tensor]) -> None:
        self.grads = grads

    def get(self, stat, site):
        each = self.grads[site.name]
        products = [g.T @ g if stat.opts == ("in",) else g @ g.T for g in each]
        return sum(products).reshape(-1) / len(each)


def site(name: str, shape: tuple[int, int], reads: str = "") -> Site:
    return Site(name, shape, (f"{name}.weight",), reads=reads or name)


def outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Every a b^T: gradients whose Fisher matrix is a Kronecker product exactly."""
    return torch.stack([torch.outer(a, b) for a in left for b in right])


def loss(grads: torch.Tensor, gap: torch.Tensor) -> float:
    return float((grads * gap).sum((1, 2)).square().mean())


def test_the_predicted_loss_is_the_mean_squared_change_where_the_fisher_matrix_is_a_product() -> None:
    s, weight = site("a", (6, 8)), draw(6, 8)
    grads = outer(draw(9, 6), draw(11, 8))
    bundle = Bundle("a", (s,))
    edits = solve(RECIPE, bundle, lambda _: weight, lambda k: None, Known({"a": grads}), rank=3, algorithm="gram")
    gap = weight - edits.tensors["a.up.weight"].double() @ edits.tensors["a.down.weight"].double()
    assert edits.record["loss"] == pytest.approx(loss(grads, gap), rel=1e-6)
    for _ in range(20):  # and none of the same rank does better
        near = (weight - gap) + 1e-2 * (draw(6, 3) @ draw(3, 8))
        u, v, w = torch.linalg.svd(near, full_matrices=False)
        assert loss(grads, weight - (u[:, :3] * v[:3]) @ w[:3]) > edits.record["loss"]


@pytest.mark.parametrize("shares", ["in", "out"])
def test_sites_with_one_side_in_common_add_up(shares) -> None:
    shapes = [(6, 8), (4, 8)] if shares == "in" else [(6, 8), (6, 5)]
    sites = [site(n, s, "x" if shares == "in" else "") for n, s in zip("ab", shapes, strict=True)]
    weights = {s.name: draw(*s.shape) for s in sites}
    common = draw(11, 8 if shares == "in" else 6)
    grads = {s.name: outer(draw(9, s.shape[0]), common) if shares == "in" else outer(common, draw(9, s.shape[1])) for s in sites}
    found = spectrum(SHARED, group.bundle_of(sites, shares), lambda s: weights[s.name], Known(grads), cap=4, algorithm="gram", seed=0)
    expected = sum(loss(grads[n], weights[n]) for n in weights)
    assert float(found.values.square().sum()) == pytest.approx(expected, rel=1e-8)


def test_values_are_those_of_shampoos_factors() -> None:
    s, weight = site("a", (6, 8)), draw(6, 8)
    grads = draw(40, 6, 8)  # no product: the factors are an approximation, and these are its numbers
    rows, columns = (sum(g @ g.T for g in grads) / 40, sum(g.T @ g for g in grads) / 40)
    root = lambda a: (lambda v, u: (u * v.sqrt()) @ u.T)(*torch.linalg.eigh(a))
    expected = torch.linalg.svdvals(root(rows) @ weight @ root(columns) / columns.trace() ** 0.5)
    found = spectrum(RECIPE, Bundle("a", (s,)), lambda _: weight, Known({"a": grads}), cap=6, algorithm="gram", seed=0)
    assert torch.allclose(found.values, expected, rtol=1e-7)


def test_a_layer_without_gradient_is_refused() -> None:
    s = site("a", (3, 4))
    zero = Known({"a": torch.zeros(5, 3, 4, dtype=torch.float64)})
    with pytest.raises(Refused, match=r"^a: rows of the gradient: zero on all calibration texts.*--calib.*target\.skip") as caught:
        solve(RECIPE, Bundle("a", (s,)), lambda _: draw(3, 4), lambda k: None, zero, rank=1, algorithm="gram")
    assert "clamp" not in str(caught.value)


class Singular:
    """Statistics that see one direction on either side."""

    def get(self, stat, site):
        size = site.shape[1] if stat.at == "in" or stat.opts == ("in",) else site.shape[0]
        square = torch.diag(torch.tensor([1.0, *[0.0] * (size - 1)]))
        return square.reshape(-1) if stat.kind == "gradient_gram" else SimpleNamespace(second=lambda: square)


@pytest.mark.parametrize(
    ("chosen", "option"),
    [
        (metric.WeightGrads(clamp=0.0), "metric.clamp=1e-4"),
        (metric.Both(out=metric.GradGram(clamp=0.0)), "metric.out.clamp=1e-4"),
    ],
)
def test_a_clamp_is_named_as_the_metric_spells_it(chosen, option) -> None:
    bare = Recipe(name="x", verb="compress", paper="-", metric=chosen)

    def cut(recipe: Recipe) -> None:
        solve(recipe, Bundle("a", (site("a", (3, 4)),)), lambda _: draw(3, 4), lambda k: None, Singular(), rank=1, algorithm="gram")

    with pytest.raises(Refused, match=f"^a: .*both metrics are singular.*--set {re.escape(option)}"):
        cut(bare)
    cut(override(bare, [option]))


def test_a_variant_is_asked_for_by_name() -> None:
    assert get_recipe("two_sided:weight_grads").metric == metric.WeightGrads()
    assert get_recipe("two_sided:moments") == get_recipe("two_sided")
    with pytest.raises(UsageError, match="no variant 'weight'"):
        get_recipe("two_sided:weight")
