"""Entropy, best error, numbers without rounding, and the trace-log walk."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eckart.spectra.numbers import effective_rank, entropy, relative_error, squares
from eckart.spectra.volume import trace_log


def test_entropy_of_known_spectra() -> None:
    assert entropy(torch.ones(7)) == pytest.approx(math.log(7))
    assert entropy(torch.tensor([3.0, 0.0, 0.0])) == 0
    assert entropy(torch.zeros(3)) == 0
    p = 0.75
    assert entropy(torch.tensor([math.sqrt(p), math.sqrt(1 - p)])) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    s = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert math.exp(entropy(s)) == pytest.approx(effective_rank(s.double().square()), rel=1e-6)  # the same functional, on squares


@pytest.mark.parametrize("rank", [0, 1, 7, 20, 30])
def test_relative_error_is_that_of_the_truncation(rank) -> None:
    w = np.random.default_rng(0).normal(size=(20, 30))
    u, s, v = np.linalg.svd(w, full_matrices=False)
    want = np.linalg.norm(w - (u[:, :rank] * s[:rank]) @ v[:rank]) / np.linalg.norm(w)
    assert relative_error(torch.from_numpy(s), rank) == pytest.approx(want, abs=1e-12)
    assert relative_error(torch.zeros(3), rank) == 0


def test_rounding_is_left_out() -> None:
    w = torch.outer(torch.arange(1.0, 301), torch.ones(400)) + torch.outer(torch.ones(300), torch.linspace(-1, 1, 400))
    from eckart.linalg import svdvals

    assert len(squares(svdvals(w, wide=True))) == 2
    assert len(squares(torch.zeros(4))) == len(squares(torch.zeros(0))) == 0


def product(values: np.ndarray) -> tuple[int, float]:
    """WeightWatcher's walk: products of the values themselves, scaled to mean 1."""
    x = np.sort(values) * len(values) / values.sum()
    for start in range(len(x) - 1, 0, -1):
        if np.prod(x[start:]) < 1:
            return len(x) - start, float(np.sort(values)[start])
    return len(x), float(values.min())


@pytest.mark.parametrize("seed", range(6))
def test_the_walk_stops_where_the_product_does(seed) -> None:
    g = np.random.default_rng(seed)
    for x in (g.pareto(1.5, 200) + 1, g.chisquare(2, 120), np.linspace(1, 3, 50), g.lognormal(0, 2, 100)):
        found = trace_log(torch.from_numpy(x))
        assert (found.count, found.smallest) == (product(x)[0], pytest.approx(product(x)[1]))
        assert trace_log(torch.from_numpy(x * 1e-12)).count == found.count


def test_a_walk_on_which_products_overflow() -> None:
    x = np.concatenate([np.full(3000, 1e3), np.full(3000, 1e-3)])
    scaled = np.log(x / x.mean())
    assert trace_log(torch.from_numpy(x)).count == 3000 + math.floor(3000 * scaled[0] / -scaled[-1]) + 1


@pytest.mark.parametrize("x", [[], [2.0], [1.0, 1.0, 1.0], [0.0, 0.0]])
def test_flat_spectra_have_no_walk(x) -> None:
    assert trace_log(torch.tensor(x)) is None


def test_zeros_end_the_walk() -> None:
    assert trace_log(torch.tensor([4.0, 0.0, 0.0])).count == 2
