"""Lanczos, quadrature and trace against dense float64 eigenvalues."""

import math

import pytest
import torch

from eckart.errors import Refused, UsageError
from eckart.linalg import as_operator
from eckart.linalg.operator import Operator
from eckart.linalg.symmetric import Quadrature, eigsh, hutchinson, hutchpp, lanczos, signs, slq


def symmetric(n: int, seed: int = 0) -> torch.Tensor:
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a + a.T) / 2


def decaying(n: int) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    values = torch.cat([torch.tensor([50.0, 20.0, -30.0]), 1.0 / torch.arange(1, n - 2) ** 2]).double()
    return (q * values) @ q.T


class Products(Operator):
    """Only products, no matrix to look at."""

    def __init__(self, matrix):
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)
        self._matrix, self.columns = matrix, 0

    def matmat(self, X):
        self.columns += X.shape[1]
        return self._matrix @ X

    def row_blocks(self):
        raise AssertionError("the matrix was formed")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_eigenvalues_and_vectors(dtype):
    A = symmetric(150)
    true = torch.linalg.eigvalsh(A).flip(0)
    op = Products(A.to(dtype))
    found = eigsh(op, top=3, bottom=2, vectors=True, tol=1e-5)
    expected = torch.cat([true[:3], true.flip(0)[:2]])
    assert found.converged
    assert found.steps == op.columns < 150
    assert torch.allclose(found.values, expected, atol=1e-12 if dtype == torch.float64 else 1e-4)
    residuals = torch.linalg.vector_norm(A @ found.vectors.double() - found.vectors.double() * found.values, dim=0)
    eps = torch.finfo(dtype).eps
    assert bool((residuals <= found.residuals * 1.01 + 100 * eps * true.abs().max()).all())
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(5, dtype=dtype), atol=50 * eps)


def test_residuals_bound_the_error_when_the_steps_do_not_suffice():
    A = symmetric(200)
    true = torch.linalg.eigvalsh(A)
    found = eigsh(A, top=4, bottom=0, steps=12)
    assert not found.converged
    nearest = (found.values[:, None] - true).abs().amin(1)
    assert bool((nearest <= found.residuals).all())


@pytest.mark.parametrize(
    ("matrix", "top", "bottom", "expected"),
    [
        (torch.zeros(4, 4), 2, 1, [0, 0, 0]),
        (torch.eye(5), 3, 0, [1, 1, 1]),
        (torch.diag(torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0])), 3, 2, [2, 2, 2, -1, -1]),
        (torch.tensor([[7.0]]), 1, 0, [7]),
        (torch.outer(torch.ones(40), torch.ones(40)), 2, 0, [40, 0]),
    ],
)
def test_bases_that_close_early(matrix, top, bottom, expected):
    found = eigsh(matrix.double(), top, bottom)
    assert found.values.tolist() == pytest.approx(expected, abs=1e-10)
    assert found.converged


def test_quadrature_is_exact_when_it_runs_to_the_end():
    A = symmetric(30)
    start = signs(30, 1, 3)[:, 0].double()
    theta, P = lanczos(A, start, 30).ritz()
    values, vectors = torch.linalg.eigh(A)
    for power in (0, 1, 2, 7):
        exact = float(((vectors.T @ start).square() / 30 * values**power).sum())
        assert float((P[0].square() * theta**power).sum()) == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_density_integrates_to_one(steps):
    for matrix in (symmetric(80), decaying(80), torch.eye(6).double(), torch.zeros(3, 3).double()):
        q = slq(matrix, steps=min(steps, len(matrix)), runs=3)
        assert torch.allclose(q.weights.sum(1), torch.ones(3, dtype=torch.float64), atol=1e-12)
        for width in (None, 0.0, 2.0):
            grid, density = q.density(points=400, width=width)
            assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-6)


def test_moments_match_the_dense_spectrum_within_their_errors():
    A = decaying(200)
    q = slq(A, steps=20, runs=40)
    values = torch.linalg.eigvalsh(A)
    for power in (1, 2, 3):
        found = q.moment(power)
        assert abs(found.value - float((values**power).sum())) < 4 * found.error
    below = float((q.weights * (q.nodes < -1)).sum(1).mean())
    assert below == pytest.approx(1 / 200, abs=0.004), "one eigenvalue in 200 is below -1"


def test_traces_lie_within_their_standard_errors():
    A = decaying(150)
    trace = float(A.trace())
    misses = 0
    for seed in range(30):
        h, hpp = hutchinson(A, 24, seed=seed), hutchpp(A, 24, seed=seed)
        misses += abs(h.value - trace) > 2 * h.error
        assert hpp.error < h.error / 3, "the spectrum decays: the sketch holds most of it"
        assert abs(hpp.value - trace) < 6 * hpp.error
    assert misses <= 6, "two standard errors hold in about 95% of the runs"
    theory = math.sqrt(2 * float(A.square().sum() - A.diagonal().square().sum())) / math.sqrt(2000)
    assert hutchinson(A, 2000, block=500).error == pytest.approx(theory, rel=0.1)


def test_hutchpp_is_exact_for_low_rank_and_for_small_matrices():
    u = torch.linalg.qr(torch.randn(90, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    A = (u * torch.tensor([3.0, -2.0, 5.0])) @ u.T
    assert hutchpp(A, 30).value == pytest.approx(6, abs=1e-10)
    assert hutchpp(torch.diag(torch.tensor([1.0, 2.0])).double(), 12).error == 0


def test_same_seed_same_numbers():
    A = symmetric(60)
    assert torch.equal(slq(A, 10, 2, seed=5).nodes, slq(A, 10, 2, seed=5).nodes)
    assert not torch.equal(slq(A, 10, 2, seed=5).nodes, slq(A, 10, 2, seed=6).nodes)


def test_wrong_calls_are_refused():
    with pytest.raises(Refused, match="square"):
        eigsh(torch.ones(2, 3))
    with pytest.raises(UsageError, match="1 to 3"):
        eigsh(torch.eye(3), top=2, bottom=2)
    with pytest.raises(UsageError, match="at least one step"):
        slq(torch.eye(3), steps=0)
    with pytest.raises(UsageError, match="at least 6"):
        hutchpp(torch.eye(3), 3)
    with pytest.raises(UsageError, match="positive length"):
        lanczos(torch.eye(3), torch.zeros(3), 2)
    with pytest.raises(Refused, match="not finite"):
        eigsh(as_operator(torch.full((3, 3), math.inf)))


def test_one_run_has_no_error():
    nodes = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert Quadrature(nodes, torch.full((1, 2), 0.5, dtype=torch.float64), 10).moment(1).error is None
