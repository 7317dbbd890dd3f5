"""Moments against numpy in float64, and against exact rational arithmetic where that is the point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eckart.stats import Moments
from eckart.stats import moments as module
from eckart.stats.moments import centred, combine, moments

ROWS = arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 5)), elements=st.floats(-100, 100))


@settings(max_examples=100, deadline=None)
@given(ROWS, st.booleans(), st.data())
def test_against_numpy(x, weighted, data):
    w = data.draw(arrays(np.float64, len(x), elements=st.floats(0.125, 4))) if weighted else np.ones(len(x))
    found = moments(torch.tensor(x), torch.tensor(w) if weighted else None)
    np.testing.assert_allclose(found.count, w.sum(), rtol=1e-12)
    np.testing.assert_allclose(found.total, w @ x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.gram, (x * w[:, None]).T @ x, rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(found.second(), (x * w[:, None]).T @ x / w.sum(), rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(found.mean, np.average(x, axis=0, weights=w), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.covariance(), np.cov(x.T, aweights=w, bias=True).reshape(x.shape[1], -1), rtol=1e-7, atol=1e-8)
    assert torch.equal(found.gram, found.gram.T)
    assert {t.dtype for t in (found.total, found.gram, found.mean, found.covariance())} == {torch.float64}


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 11))
def test_parts_combine_to_the_whole(x, cut):
    cut = min(cut, len(x))
    parts = [centred(torch.tensor(p)) for p in (x[:cut], x[cut:]) if len(p)]
    both = parts[0] if len(parts) == 1 else combine(*parts)
    np.testing.assert_allclose(both.moments().gram, x.T @ x, rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(both.moments().total, x.sum(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_the_covariance_survives_a_large_mean(width, offset):
    """A Gram of uncentred rows would lose the covariance. Oracle: numpy in float64, which centres first."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(9000, width, generator=g) + offset).float()
    expected = np.cov(x.numpy().astype(np.float64).T, bias=True)
    found = moments(x).covariance().numpy()
    assert np.abs(found - expected).max() < 1e-15 * offset**2 * 20
    if offset == 1e6:
        naive = (x.T @ x).double().numpy() / len(x) - np.outer(x.mean(0).double(), x.mean(0).double())
        assert np.abs(naive - expected).max() > 1e3 * np.abs(found - expected).max()


def test_float32_products_above_the_threshold(monkeypatch):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5000, 300, generator=g) + 3
    exact = x.double().T @ x.double()
    fine = moments(x).gram
    monkeypatch.setattr(module, "WIDTH_OF_F64_PRODUCTS", 100)
    coarse = moments(x).gram
    assert (fine - exact).norm() / exact.norm() < 1e-14
    assert 1e-12 < (coarse - exact).norm() / exact.norm() < 1e-6
    assert torch.equal(coarse, coarse.T)


@pytest.mark.parametrize("n", [511, 512, 513, 517, 601])
def test_panels_cover_everything(n):
    x = torch.randn(7, n, dtype=torch.float64)
    torch.testing.assert_close(module._gram(x), x.T @ x)


def test_low_precision_rows_are_taken_exactly():
    x = torch.randn(50, 6).bfloat16()
    torch.testing.assert_close(moments(x).gram, x.double().T @ x.double(), rtol=1e-13, atol=1e-13)


def test_chunks_do_not_change_the_value(monkeypatch):
    x = torch.randn(101, 7)
    whole = moments(x)
    monkeypatch.setattr(module, "ROWS", 10)
    torch.testing.assert_close(moments(x).gram, whole.gram, rtol=1e-12, atol=1e-12)


def test_nothing_to_sum():
    assert centred(torch.zeros(0, 3)) is None
    assert centred(torch.ones(2, 3), torch.zeros(2)) is None
    with pytest.raises(ValueError, match="at least one row"):
        moments(torch.zeros(0, 3))


def test_variances_are_never_negative():
    x = torch.full((1000, 3), 1e8 + 1 / 3, dtype=torch.float64)
    assert (moments(x).covariance().diagonal() >= 0).all()
    assert isinstance(moments(x), Moments)
