"""Inside block Lanczos: its free residuals, the tridiagonal projection, and what it does when a direction is lost."""

from __future__ import annotations

import pytest
import torch

from eckart.linalg import as_operator, svd
from eckart.linalg.choose import rates
from eckart.linalg.krylov import GIVE_UP, Lanczos, krylov
from eckart.linalg.operator import Operator
from eckart.linalg.rank import Target
from tests.linalg.spectra import matrix, spectrum, truth

SPEED = rates("cpu", "float32")


def grown(A: torch.Tensor, steps: int, block: int = 16) -> Lanczos:
    op = as_operator(A)
    lanczos = Lanczos(op, op.fro2(), block, A.shape[0], seed=0)
    for _ in range(steps):
        lanczos.step()
    return lanczos


class Counting(Operator):
    def __init__(self, matrix):
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)
        self.inner, self.columns, self.calls = as_operator(matrix), 0, 0

    def matmat(self, X):
        self.columns, self.calls = self.columns + X.shape[1], self.calls + 1
        return self.inner.matmat(X)

    def rmatmat(self, Y):
        self.columns, self.calls = self.columns + Y.shape[1], self.calls + 1
        return self.inner.rmatmat(Y)

    def row_blocks(self):
        return self.inner.row_blocks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["flat", "power", "exponential"])
def test_basis_projection_and_residuals(kind, dtype):
    A = matrix(spectrum(kind, 220), 220, 400, dtype=dtype)
    lanczos = grown(A, 5)
    d, eps = lanczos.size, torch.finfo(dtype).eps
    Q, W, T = lanczos.Q[:d].double(), lanczos.W[:d].double(), lanczos.T[:d, :d]
    assert d == 80
    assert (Q @ Q.T - torch.eye(d)).abs().max() < 20 * eps
    assert (W - Q @ A.double()).norm() < 50 * eps * A.norm()
    assert (T - W @ W.T).abs().max() < 50 * eps, "blocks off the tridiagonal are rounding"
    theta, P = torch.linalg.eigh(T)
    u = Q.T @ P
    wide = A.double()
    direct = torch.linalg.vector_norm(wide @ (wide.T @ u) - u * theta, dim=0)
    assert (lanczos._residuals(P) - direct).abs().max() < 200 * eps


def test_products_are_counted_and_none_is_wasted():
    A = matrix(spectrum("power", 300), 300, 700)
    op = Counting(A)
    f = svd(op, 10, tol=1e-5, method="krylov")
    assert f.certificate.passes == op.calls
    assert op.columns == 16 * op.calls


def test_giving_up_costs_a_bounded_share_of_the_exact_route():
    A = matrix(torch.linspace(1, 0.95, 1000, dtype=torch.float64), 1000, 1300)
    op = Counting(A)
    assert krylov(op, Target(rank=60), op.fro2(), tol=1e-8, rates=SPEED, seed=0, give_up=True) is None
    steps = op.calls // 2
    assert SPEED.krylov(1000, 1300, 16, steps - 1) <= 1.2 * GIVE_UP * SPEED.exact_gram(1000, 1300, 60)


@pytest.mark.parametrize("kind", ["identity", "repeated"])
def test_repeated_values_are_not_mistaken_for_convergence(kind):
    A = matrix(spectrum(kind, 420), 420, 520)
    assert grown(A, 4).broken
    for r in (30, 100):
        f = svd(A, r)
        t = truth(A, f)
        assert t.error <= t.best * 1.001
        g = svd(A, r, method="krylov")  # forced: it goes on until nothing can hide
        assert truth(A, g).error <= t.best * 1.001


def test_a_matrix_of_low_rank_is_recognised_without_a_gram():
    values = torch.zeros(600, dtype=torch.float64)
    values[:24] = spectrum("power", 24)
    A = matrix(values, 600, 1200)
    for r in (24, 30):
        f = svd(A, r)
        assert f.certificate.method == "krylov"
        assert f.certificate.gap_kind == "bound"
        assert f.certificate.relative_error < 1e-6
        assert (f.Vh @ f.Vh.T - torch.eye(r)).abs().max() < 1e-5


def test_a_flat_tail_is_left_to_the_gram_and_a_decaying_one_is_not():
    flat, steep = (matrix(spectrum(kind, 400), 400, 1600) for kind in ("flat", "power"))
    assert svd(flat, 40, tol=1e-6).certificate.method == "gram"
    assert svd(steep, 20, tol=1e-6).certificate.method == "krylov"


def test_a_bound_is_stated_where_little_is_left():
    A = matrix(spectrum("exponential", 300), 300, 400) + 1e-3 * matrix(spectrum("power", 300), 300, 400, seed=3)
    c = svd(A, 3, method="krylov", tol=0.05).certificate
    t = truth(A, svd(A, 3, method="krylov", tol=0.05))
    assert c.gap_kind == "bound"
    assert c.floor <= t.best <= t.error
