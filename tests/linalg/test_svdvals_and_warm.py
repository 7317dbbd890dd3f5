"""All singular values, and factorisations that start from an older one."""

from __future__ import annotations

import pytest
import torch

from eckart.errors import Refused, UsageError
from eckart.linalg import as_operator, svd, svdvals
from tests.linalg.spectra import KINDS, matrix, spectrum, truth


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(200, 450), (450, 200), (60, 90), (200, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_singular_values(kind, shape, dtype):
    A = matrix(spectrum(kind, min(shape)), *shape, dtype=dtype)
    reference = torch.linalg.svdvals(A.double())
    got = svdvals(A)
    assert got.dtype == dtype
    assert bool((got[:-1] >= got[1:]).all())
    limit = 1e-6 if dtype == torch.float32 else 1e-12
    assert (got.double() - reference).abs().max() <= limit * reference[0]
    assert torch.equal(svdvals(as_operator(A)), got)


def test_a_loose_tolerance_takes_the_gram_in_float64_too():
    A = matrix(spectrum("power", 200), 200, 300, dtype=torch.float64)
    loose, tight = svdvals(A, tol=1e-6), svdvals(A)
    assert not torch.equal(loose, tight)
    assert (loose - tight).abs().max() < 1e-7


def stale(A: torch.Tensor, share: float, seed: int = 5) -> torch.Tensor:
    noise = torch.randn(A.shape, generator=torch.Generator().manual_seed(seed))
    return A + share * A.norm() / noise.norm() * noise


@pytest.mark.parametrize("shape", [(200, 500), (500, 200)])
@pytest.mark.parametrize("kind", ["flat", "power", "exponential"])
def test_one_pass_from_a_stale_basis(kind, shape):
    A = matrix(spectrum(kind, 200), *shape)
    old = svd(stale(A, 0.01), 24, method="full")
    for warm in (old, old.Vh.T):
        f = svd(A, 24, warm=warm)
        t = truth(A, f)
        c = f.certificate
        if kind != "exponential":  # there the tail is below the perturbation, so one pass does not do
            assert c.method == "warm"
        if kind == "flat":
            assert c.passes == 2
        if kind != "flat":  # nearly equal values: the energy there moves at the first order of the perturbation
            assert t.norm**2 - t.error**2 >= (t.norm**2 - t.best**2) * (1 - 1e-4)
        assert t.error <= t.best * (1 + 1e-3) + 1e-6 * t.norm
        assert abs(c.error - t.error) < 1e-5 * t.error + 1e-8 * t.norm


def test_a_basis_of_something_else_is_not_believed():
    A = matrix(spectrum("power", 300), 300, 400)
    other = svd(matrix(spectrum("power", 300), 300, 400, seed=9), 16, method="full")
    f = svd(A, 16, warm=other)
    t = truth(A, f)
    assert t.error <= t.best * 1.001


def test_an_invariant_but_wrong_basis_is_found_out():
    A = matrix(spectrum("power", 300), 300, 400)
    everything = svd(A, 32, method="full")
    f = svd(A, 16, warm=everything.Vh[16:].T)
    t = truth(A, f)
    assert t.error <= t.best * 1.001


def test_a_basis_that_is_not_orthonormal_or_of_another_rank():
    A = matrix(spectrum("power", 150), 150, 220)
    V = svd(stale(A, 0.001), 20, method="full").Vh.T
    mixed = V @ torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    for basis in (mixed, V[:, :7], V):
        for r in (10, 20):
            t = truth(A, svd(A, r, warm=basis, method="warm"))
            assert t.error <= t.best * 1.001


def test_warm_start_of_a_small_matrix():
    A = matrix(spectrum("power", 9), 12, 9)
    f = svd(A, 9, warm=svd(A, 9))
    assert (f.dense() - A).norm() < 1e-5


def test_bad_warm_starts():
    A = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Refused, match=r"\(30, k\)"):
        svd(A, 3, warm=torch.ones(20, 3))
    with pytest.raises(Refused, match="shape"):
        svd(A, 3, warm=svd(A.T, 3))
    with pytest.raises(Refused, match="NaN"):
        svd(A, 3, warm=torch.full((30, 3), float("nan")))
    with pytest.raises(UsageError, match="needs a rank"):
        svd(A, energy=0.5, warm=torch.eye(30)[:, :3])
