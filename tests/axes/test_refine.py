"""Least-squares refits against numpy's least squares on the rows themselves, and the promise that they never raise the loss."""

import numpy as np
import pytest
import torch

from eckart.axes import Bundle, Recipe, Site, form, group, metric, refine
from eckart.axes.protocols import Stat
from eckart.axes.solve import solve
from eckart.errors import UsageError
from eckart.stats.moments import moments

G = torch.Generator().manual_seed(3)
N, M, T = 14, 10, 120
W = torch.randn(M, N, generator=G, dtype=torch.float64)
B = torch.randn(M, generator=G, dtype=torch.float64)
X = torch.randn(T, N, generator=G, dtype=torch.float64) @ torch.randn(N, N, generator=G, dtype=torch.float64) + 1
MOVED = X + 0.5 * torch.randn(T, N, generator=G, dtype=torch.float64) @ torch.randn(N, N, generator=G, dtype=torch.float64)
BASE = Recipe(name="r", verb="compress", paper="-", metric=metric.InputGram())


class Two:
    """Original and propagated inputs."""

    def get(self, stat, site):
        return moments(MOVED if stat.inputs == "propagated" else X)


def run(how, bias=True, recipe=BASE, rank=4):
    site = Site("a", (M, N), ("a.weight",), bias="a.bias" if bias else None, dtype="F64")
    return solve(recipe.with_(refine=how), Bundle("a", (site,)), lambda s: W, lambda k: B, Two(), rank=rank, algorithm="gram")


def measured(edits, rows, bias=True) -> float:
    y = rows @ W.T + (B if bias else 0)
    found = rows @ (edits.tensors["a.up.weight"] @ edits.tensors["a.down.weight"]).T
    if "a.up.bias" in edits.tensors:
        found = found + edits.tensors["a.up.bias"]
    return float((y - found).square().sum() / T)


def test_up_is_the_least_squares_solution_on_propagated_inputs() -> None:
    edits = run(refine.LeastSquares(inputs="propagated", bias="never"), bias=False)
    hidden = MOVED @ edits.tensors["a.down.weight"].T
    fit = np.linalg.lstsq(hidden.numpy(), (MOVED @ W.T).numpy(), rcond=None)[0].T
    assert np.allclose(edits.tensors["a.up.weight"].numpy(), fit, atol=1e-7)


def test_up_and_bias_together_are_least_squares_with_an_intercept() -> None:
    edits = run(refine.LeastSquares(inputs="propagated"))
    hidden = np.concatenate([(MOVED @ edits.tensors["a.down.weight"].T).numpy(), np.ones((T, 1))], axis=1)
    fit = np.linalg.lstsq(hidden, (MOVED @ W.T + B).numpy(), rcond=None)[0].T
    assert np.allclose(edits.tensors["a.up.weight"].numpy(), fit[:, :-1], atol=1e-6)
    assert np.allclose(edits.tensors["a.up.bias"].numpy(), fit[:, -1], atol=1e-6)


def test_down_is_the_least_squares_solution_for_its_up() -> None:
    before = run(None, bias=False)
    edits = run(refine.LeastSquares(update=("down",), inputs="propagated", bias="never"), bias=False)
    up = edits.tensors["a.up.weight"].numpy()
    fit = np.linalg.lstsq(up, (W @ MOVED.T).numpy(), rcond=None)[0] @ np.linalg.pinv(MOVED.T.numpy())
    assert np.allclose(edits.tensors["a.down.weight"].numpy(), fit, atol=1e-6)
    assert measured(edits, MOVED, False) <= measured(before, MOVED, False) * (1 + 1e-9)


@pytest.mark.parametrize("update", [("up",), ("down",), ("up", "down"), ("down", "up")])
@pytest.mark.parametrize("inputs", ["original", "propagated"])
@pytest.mark.parametrize("bias", ["existing", "never", "add"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("into", [metric.Identity(), metric.InputGram(), metric.InputGram(centred=True, keep_mean=True)])
def test_refit_never_raises_the_calibration_loss(update, inputs, bias, has_bias, into) -> None:
    recipe = BASE.with_(metric=into)
    rows = MOVED if inputs == "propagated" else X
    before = run(None, has_bias, recipe)
    after = run(refine.LeastSquares(update=update, inputs=inputs, bias=bias, rounds=2), has_bias, recipe)
    assert measured(after, rows, has_bias) <= measured(before, rows, has_bias) * (1 + 1e-7)
    assert after.record["refit"]["loss"] == pytest.approx(measured(after, rows, has_bias), rel=1e-6)
    assert after.record["refit"]["loss_before"] == pytest.approx(measured(before, rows, has_bias), rel=1e-6)


def test_on_its_own_metric_a_pair_is_optimal_already() -> None:
    before, after = run(None, bias=False), run(refine.LeastSquares(update=("up", "down"), bias="never"), bias=False)
    assert measured(after, X, False) == pytest.approx(measured(before, X, False), rel=1e-9)


def test_adding_a_bias_is_counted_and_needs_a_form_that_has_one() -> None:
    edits = run(refine.LeastSquares(bias="add"), bias=False)
    assert "a.up.bias" in edits.tensors
    y, found = X @ W.T, X @ (edits.tensors["a.up.weight"] @ edits.tensors["a.down.weight"]).T + edits.tensors["a.up.bias"]
    assert torch.allclose(y.mean(0), found.mean(0), atol=1e-9)
    with pytest.raises(UsageError, match="'pair'|bias"):
        Recipe(name="x", verb="compress", paper="-", group=group.Channels(), form=form.Smaller(), refine=refine.LeastSquares())


@pytest.mark.parametrize("shares", ["in", "out"])
@pytest.mark.parametrize("update", [("up",), ("down",), ("up", "down")])
def test_shared_factors_are_fitted_to_all_sites_together(shares, update) -> None:
    shapes = [(10, 14), (6, 14)] if shares == "in" else [(10, 14), (10, 8)]
    sites = [Site(n, s, (f"{n}.weight",), reads=n, dtype="F64") for n, s in zip("ab", shapes, strict=True)]
    weights = {s.name: torch.randn(*s.shape, generator=G, dtype=torch.float64) for s in sites}
    rows = {s.name: torch.randn(90, s.shape[1], generator=G, dtype=torch.float64) * (1 + i) for i, s in enumerate(sites)}
    bundle = group.bundle_of(sites, shares)

    class Rows:
        def get(self, stat, site):
            return moments(rows[site.name])

    def loss(how):
        recipe = BASE.with_(form=form.SharedBasis(), metric=metric.Identity(), refine=how)
        edits = solve(recipe, bundle, lambda s: weights[s.name], lambda k: B, Rows(), rank=4, algorithm="gram")
        t = edits.tensors
        total = 0.0
        for s in sites:
            up, down = t.get(f"{s.name}.up.weight", t["a.up.weight"]), t.get(f"{s.name}.down.weight", t["a.down.weight"])
            total += float((rows[s.name] @ (weights[s.name] - up @ down).T).square().sum() / 90)
        return total, edits

    (before, _), (after, edits) = loss(None), loss(refine.LeastSquares(update=update, bias="never"))
    assert after <= before * (1 + 1e-12)
    assert edits.record["refit"]["loss"] == pytest.approx(after, rel=1e-7)
    if update == ("down",) and shares == "in":  # the shared factor solves its normal equations
        t = edits.tensors
        gradient = sum(
            t[f"{s.name}.up.weight"].T
            @ (weights[s.name] - t[f"{s.name}.up.weight"] @ t["a.down.weight"])
            @ (rows[s.name].T @ rows[s.name])
            / 90
            for s in sites
        )
        scale = sum((t[f"{s.name}.up.weight"].T @ weights[s.name] @ rows[s.name].T @ rows[s.name] / 90).norm() for s in sites)
        assert float(gradient.norm()) < 1e-6 * float(scale)


def test_zero_inputs_and_singular_factors_are_defined() -> None:
    class Zero:
        def get(self, stat, site):
            return moments(torch.zeros(5, N))

    site = Site("a", (M, N), ("a.weight",), dtype="F64")
    edits = solve(
        BASE.with_(metric=metric.Identity(), refine=refine.LeastSquares()),
        Bundle("a", (site,)), lambda s: W, lambda k: B, Zero(), rank=3, algorithm="gram",
    )  # fmt: skip
    assert all(bool(torch.isfinite(t).all()) for t in edits.tensors.values())


def test_needs_say_which_inputs() -> None:
    assert refine.LeastSquares(inputs="propagated").needs == {Stat("moments", at="in", inputs="propagated")}
    with pytest.raises(UsageError, match="something to update"):
        refine.LeastSquares(update=())
