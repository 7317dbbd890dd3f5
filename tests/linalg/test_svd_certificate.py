"""What a certificate says is true, on spectra made to break it. The oracle is torch.linalg in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eckart.linalg import svd
from tests.linalg.spectra import KINDS, matrix, spectrum, truth

SHAPES = ((40, 90), (70, 70), (90, 40), (1, 30), (30, 1), (1, 1))
ROUND = {torch.float32: 1e-6, torch.float64: 1e-13}  # of the norm


def check(A: torch.Tensor, f: object) -> None:
    c, t = f.certificate, truth(A, f)
    rounding = ROUND[f.S.dtype] * t.norm
    assert c.norm == pytest.approx(t.norm, rel=1e-9, abs=1e-300)
    assert abs(c.error - t.error) <= 1e-5 * t.error + rounding / 100 + 1e-300, "the achieved error is exact to rounding"
    assert c.floor <= c.error
    assert c.excess >= 0
    assert c.gap >= 0
    if c.optimum is not None:
        assert abs(c.optimum - t.best) <= 1e-5 * t.best + max(rounding, 1e-7 * t.norm)
    if c.gap_kind == "bound":
        assert c.error - c.excess <= t.best * (1 + 1e-9) + 1e-300, "a bound never puts the optimum too high"
        if math.isfinite(c.gap):
            assert t.error <= t.best * (1 + c.gap) * (1 + 1e-5) + rounding / 100
    if c.gap_kind == "exact":
        assert t.norm == 0 or len(f.S) == min(A.shape)
    if c.spectral is not None:
        assert t.spectral <= c.spectral * (1 + 1e-9) + rounding
    json.dumps(c.as_dict(), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("method", ["auto", "full", "gram", "krylov", "subspace"])
@pytest.mark.parametrize("kind", KINDS)
def test_certificates_hold_on_hard_spectra(kind, method, dtype):
    for m, n in SHAPES:
        k = min(m, n)
        A = matrix(spectrum(kind, k), m, n, dtype=dtype)
        for r in sorted({1, min(6, k), min(k, k // 2 + 1), k}):
            f = svd(A, r, method=method, certify="spectral")
            check(A, f)
            assert f.rank == r


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["krylov", "subspace", "gram"])
def test_the_optimum_is_the_optimum(kind, method):
    A = matrix(spectrum(kind, 60), 60, 150)
    f = svd(A, 7, method=method, certify="optimum")
    c, t = f.certificate, truth(A, f)
    check(A, f)
    assert c.optimum == pytest.approx(t.best, rel=1e-6, abs=1e-7 * t.norm)
    assert c.gap_kind in ("bound", "exact")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    exponents=st.lists(st.floats(-12, 0), min_size=1, max_size=40),
    copies=st.integers(1, 4),
    stretch=st.integers(0, 50),
    tall=st.booleans(),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e9, 1e30]),
    share=st.floats(0.02, 1.0),
    method=st.sampled_from(["auto", "full", "gram", "krylov", "subspace"]),
    wide=st.booleans(),
)
def test_a_bound_never_claims_less_error_than_there_is(exponents, copies, stretch, tall, scale, share, method, wide):
    values = torch.tensor(sorted(exponents * copies, reverse=True), dtype=torch.float64)
    values = 10.0**values * scale
    k = len(values)
    m, n = (k + stretch, k) if tall else (k, k + stretch)
    A = matrix(values, m, n, seed=k, dtype=torch.float64 if wide else torch.float32)
    check(A, svd(A, max(1, int(share * k)), method=method))


@pytest.mark.parametrize("kind", ["flat", "power", "clustered", "exponential", "repeated"])
@pytest.mark.parametrize("method", ["krylov", "subspace", "gram", "full"])
def test_tolerance_is_met(kind, method):
    """An estimate is not a proof, but on honest spectra it has to be right."""
    A = matrix(spectrum(kind, 200), 200, 500)
    for tol in (1e-2, 1e-4):
        if method == "subspace" and tol < 1e-2:
            continue
        f = svd(A, 12, method=method, tol=tol)
        t = truth(A, f)
        assert t.error <= t.best * (1 + tol) + 1e-6 * t.norm


def test_truncating_keeps_the_certificate_true():
    for kind in ("power", "flat", "deficient", "repeated"):
        A = matrix(spectrum(kind, 50), 50, 120)
        for method in ("full", "gram", "krylov"):
            whole = svd(A, 20, method=method, certify="spectral")
            for r in (1, 5, 19):
                check(A, whole.truncate(r))
        check(A, svd(A).truncate(9))


def test_subspace_that_is_not_determined_is_called_so():
    A = matrix(spectrum("repeated", 60), 60, 100)
    for method in ("full", "gram", "krylov"):
        assert svd(A, 25, method=method).certificate.identified is False
        assert svd(A, 20, method=method).certificate.identified is True


def test_spectral_bound_is_sharp_and_says_how_sure_it_is():
    A = matrix(spectrum("power", 300), 300, 700)
    c = svd(A, 16, method="krylov", tol=1e-6, certify="spectral").certificate
    assert 1 / 17 <= c.spectral < 1.15 / 17
    assert 0 < c.spectral_failure <= 1e-3


def test_passes_and_precisions_are_stated():
    A = matrix(spectrum("power", 300), 300, 700)
    free, spectral = (svd(A, 8, method="krylov", certify=c).certificate for c in ("free", "spectral"))
    assert free.passes % 2 == 1
    assert spectral.passes > free.passes
    assert free.method == "krylov"
    assert free.compute_dtype == "float32"
    assert free.accumulate_dtype == "float64"
