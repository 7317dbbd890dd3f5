"""What every route promises: shapes, order, orthonormality, signs, dtypes, refusals, determinism."""

from __future__ import annotations

import pytest
import torch

from eckart.errors import EckartError, Refused, UsageError
from eckart.linalg import Factors, as_operator, svd, svdvals
from tests.linalg.spectra import KINDS, matrix, spectrum, truth

METHODS = ("auto", "full", "gram", "krylov", "subspace")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_factors_are_a_singular_value_decomposition(kind, shape, method):
    k = min(shape)
    A = matrix(spectrum(kind, k), *shape)
    for r in (3, k):
        f = svd(A, r, method=method, tol=1e-6)
        assert f.U.shape == (shape[0], r)
        assert f.Vh.shape == (r, shape[1])
        eye = torch.eye(r)
        assert (f.U.T @ f.U - eye).abs().max() < 1e-5
        assert (f.Vh @ f.Vh.T - eye).abs().max() < 1e-5
        assert bool((f.S[:-1] >= f.S[1:]).all())
        assert bool((f.S >= 0).all())
        peak = f.U.gather(0, f.U.abs().argmax(0, keepdim=True))
        assert bool((peak > 0).all())


@pytest.mark.parametrize("method", ["auto", "full", "gram", "krylov"])
@pytest.mark.parametrize("kind", ["flat", "power", "exponential", "clustered"])
def test_values_agree_with_float64(kind, method):
    A = matrix(spectrum(kind, 150), 150, 400)
    reference = torch.linalg.svdvals(A.double())
    f = svd(A, 10, method=method, tol=1e-6)
    assert (f.S.double() - reference[:10]).abs().max() < 1e-4 * reference[0]
    if method in ("full", "gram"):
        assert (f.S.double() - reference[:10]).abs().max() < 1e-6 * reference[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(200, 500), (500, 200), (200, 210)])
def test_full_rank_returns_the_matrix(kind, shape):
    A = matrix(spectrum(kind, min(shape)), *shape)
    f = svd(A)
    assert f.rank == min(shape)
    assert (f.dense() - A).norm() <= 2e-6 * A.norm()
    assert (f.Vh @ f.Vh.T - torch.eye(f.rank)).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["auto", "gram", "full"])
def test_float64_keeps_its_precision(method):
    A = matrix(spectrum("condition 1e12", 140), 140, 400, dtype=torch.float64)
    f = svd(A, 20, method=method, tol=1e-6)
    t = truth(A, f)
    assert f.S.dtype == torch.float64
    assert t.error <= t.best * (1 + 1e-6)
    assert (f.U.T @ f.U - torch.eye(20)).abs().max() < 1e-11
    assert (f.Vh @ f.Vh.T - torch.eye(20)).abs().max() < 1e-11


def test_float64_falls_back_where_a_gram_is_too_coarse():
    A = matrix(spectrum("condition 1e12", 150), 150, 600, dtype=torch.float64)
    f = svd(A, 120, tol=1e-6)  # the tail is 1e-9 of the norm: its squares are lost in a float64 Gram
    t = truth(A, f)
    assert f.certificate.method == "full"
    assert t.error <= t.best * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast_once(dtype):
    A = matrix(spectrum("power", 50), 50, 80).to(dtype)
    f, g = svd(A, 5), svd(A.float(), 5)
    assert f.S.dtype == torch.float32
    assert torch.equal(f.dense(), g.dense())


def test_the_input_is_not_touched_nor_tracked():
    A = matrix(spectrum("flat", 40), 40, 60).requires_grad_()
    before = A.detach().clone()
    for method in METHODS:
        assert not svd(A, 4, method=method).U.requires_grad
    assert torch.equal(A.detach(), before)


def test_equal_calls_give_equal_bytes_and_leave_the_global_generator_alone():
    A = matrix(spectrum("power", 300), 300, 400)
    torch.random.manual_seed(7)
    state = torch.random.get_rng_state()
    for method in METHODS:
        one, two = svd(A, 9, method=method, seed=3), svd(A, 9, method=method, seed=3)
        assert all(torch.equal(getattr(one, k), getattr(two, k)) for k in ("U", "S", "Vh"))
        assert one.certificate == two.certificate
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(svd(A, 9, method="krylov", seed=4).U, svd(A, 9, method="krylov", seed=3).U)


def test_transposed_and_strided_views():
    A = matrix(spectrum("power", 60), 60, 90)
    wide = torch.zeros(60, 180)
    wide[:, ::2] = A
    for view in (A.T.contiguous().T, wide[:, ::2]):
        assert (svd(view, 6).dense() - svd(A, 6).dense()).norm() < 1e-5
    assert (svd(A.T, 6).dense().T - svd(A, 6).dense()).norm() < 1e-5


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-12, 1e15, 1e34])
@pytest.mark.parametrize("method", ["auto", "krylov", "gram", "subspace"])
def test_extreme_scales(scale, method):
    values = spectrum("power", 150)
    A = (matrix(values, 150, 200, dtype=torch.float64) * scale).float()
    f = svd(A, 4, method=method)
    assert f.S.double().tolist() == pytest.approx((values[:4] * scale).tolist(), rel=1e-3 if scale > 1e-38 else 1e-2)
    assert f.certificate.relative_error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-3)
    assert svdvals(A)[0].item() == pytest.approx(scale, rel=1e-3)


def test_values_beyond_the_dtype_are_refused():
    with pytest.raises(Refused, match="float64"):
        svd(torch.full((300, 400), 3e38), 2)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("method", ["auto", "full", "gram", "krylov"])
def test_energy_takes_the_fewest_triples(energy, method):
    A = matrix(spectrum("power", 150), 150, 300)
    share = torch.linalg.svdvals(A.double()).square().cumsum(0)
    f = svd(A, energy=energy, method=method, tol=1e-6)
    assert f.rank == int((share < energy * share[-1]).sum()) + 1
    assert f.S.double().square().sum() >= energy * share[-1] * (1 - 1e-6)


def test_all_the_energy_is_all_that_is_there():
    values = torch.zeros(150, dtype=torch.float64)
    values[:9] = spectrum("power", 9)
    A = matrix(values, 150, 300, dtype=torch.float64)
    for method in ("auto", "full"):
        assert svd(A, energy=1.0, method=method).rank >= 9
        assert svd(A, energy=1 - 1e-9, method=method).rank == 9


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01])
def test_error_takes_the_fewest_triples(error):
    A = matrix(spectrum("exponential", 140), 140, 200)
    values = torch.linalg.svdvals(A.double())
    f = svd(A, error=error)
    assert values[f.rank :].norm() <= error * values.norm() * (1 + 1e-6)
    assert values[f.rank - 1 :].norm() > error * values.norm()
    assert f.certificate.relative_error <= error * (1 + 1e-6)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (torch.zeros(0, 5), "at least one row"),
        (torch.zeros(5), "two dimensions"),
        (torch.zeros(2, 3, 4), "once per matrix"),
        (torch.ones(3, 3, dtype=torch.int64), "floating-point"),
        (torch.ones(3, 3, dtype=torch.complex64), "floating-point"),
        (torch.full((3, 4), float("nan")), "NaN or Inf"),
        (torch.tensor([[1.0, float("inf")], [0.0, 1.0]]), r"\[0, 1\]"),
        (torch.ones(2, 2, device="meta"), "meta"),
    ],
)
def test_bad_matrices_are_refused_by_name(bad, says):
    for call in (lambda: svd(bad, 1, name="layers.3.q_proj"), lambda: svdvals(bad, name="layers.3.q_proj")):
        with pytest.raises(Refused, match=says) as caught:
            call()
        assert "layers.3.q_proj" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0}, {"rank": 5}, {"rank": -1}, {"rank": 2.5}, {"rank": True}, {"rank": 2, "energy": 0.5}, {"energy": 0.0}, {"energy": 1.5},
        {"error": 1.0}, {"error": -0.1}, {"rank": 2, "method": "svd"}, {"rank": 2, "certify": "yes"}, {"rank": 2, "tol": -1.0},
        {"rank": 2, "tol": float("nan")}, {"rank": 2, "method": "warm"}, {"energy": 0.5, "method": "subspace"},
    ],
)  # fmt: skip
def test_bad_calls_are_refused(options):
    with pytest.raises(UsageError):
        svd(torch.ones(4, 6), **options)


def test_a_close_name_is_suggested():
    with pytest.raises(UsageError, match="krylov"):
        svd(torch.ones(4, 6), 1, method="kryloff")


def test_not_a_tensor():
    with pytest.raises(EckartError):
        svd([[1.0]], 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 300), (300, 2), (5, 5)])
@pytest.mark.parametrize("method", METHODS)
def test_thin_and_tiny(shape, method):
    g = torch.Generator().manual_seed(1)
    A = torch.randn(*shape, generator=g)
    f = svd(A, method=method) if method != "subspace" else svd(A, min(shape), method=method)
    assert (f.dense() - A).norm() < 1e-5 * A.norm()


@pytest.mark.parametrize("shape", [(3, 5), (200, 300), (1, 1)])
def test_zero_matrix(shape):
    for method in METHODS:
        f = svd(torch.zeros(shape), 1, method=method)
        assert f.S.item() == 0
        assert f.certificate.error == 0
        assert f.certificate.gap == 0
        assert f.certificate.identified is False or min(shape) == 1
    assert svdvals(torch.zeros(shape)).tolist() == [0.0] * min(shape)


def test_an_operator_gives_the_same_as_its_matrix():
    A = matrix(spectrum("power", 200), 200, 300)
    for method in METHODS:
        assert torch.equal(svd(as_operator(A), 5, method=method).dense(), svd(A, 5, method=method).dense())


def test_a_failing_driver_is_replaced_and_named(monkeypatch):
    real = torch.linalg.svd

    def svd_that_fails_in_float32(x, **options):
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(x, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd_that_fails_in_float32)
    A = matrix(spectrum("power", 30), 30, 50)
    f = svd(A, 4, method="full")
    assert f.certificate.driver == "gesdd failed, cpu-float64"
    assert f.S.dtype == torch.float32
    assert f.S.tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=1e-5)
    monkeypatch.setattr(torch.linalg, "svd", lambda x, **options: (_ for _ in ()).throw(torch.linalg.LinAlgError("no")))
    with pytest.raises(Refused, match="no SVD driver converged"):
        svd(A, 4, method="full", name="w")


def test_a_metric_is_handed_on():
    from eckart.linalg.psd import Weight

    g = torch.Generator().manual_seed(0)
    W, X = torch.randn(20, 30, generator=g), torch.randn(100, 30, generator=g)
    f = svd(W, 5, metric=(None, Weight(X.T @ X)))
    expected = torch.linalg.svdvals(X.double() @ W.double().T)[:5]
    assert f.S.double().tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_result_is_a_value():
    f = svd(torch.eye(3), 2)
    assert isinstance(f, Factors)
    with pytest.raises(AttributeError):
        f.S = torch.ones(2)
