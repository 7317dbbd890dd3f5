"""Operators against the dense matrices they stand for."""

from __future__ import annotations

import pytest
import torch

from eckart.errors import Refused, UsageError
from eckart.linalg import as_operator, concat, dense, difference, row_stream, sum_of, svd, weighted_operator
from eckart.linalg.operator import Operator, gram_of, sum_of_squares


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


A, B = numbers(30, 50, seed=1), numbers(30, 50, seed=2)
LEFT, RIGHT = numbers(20, 30, seed=3), numbers(50, 40, seed=4)


class Bare(Operator):
    """Only products, as a Jacobian would have: everything else comes from the base class."""

    def __init__(self, matrix):
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)
        self.hidden = matrix

    def matmat(self, X):
        return self.hidden @ X

    def rmatmat(self, Y):
        return self.hidden.T @ Y


CASES = {
    "dense": (dense(A), A),
    "transposed view": (dense(A.T), A.T),
    "column-major": (dense(A.T.contiguous().T), A),
    "sum": (sum_of(A, B, A), 2 * A + B),
    "difference": (difference(A, B), A - B),
    "sum of operators": (sum_of(dense(A).T, B.T), A.T + B.T),
    "below": (concat([A, B], 0), torch.cat([A, B])),
    "beside": (concat([A, B], 1), torch.cat([A, B], 1)),
    "unequal": (concat([A, A[:7]], 0), torch.cat([A, A[:7]])),
    "weighted": (weighted_operator(A, LEFT, RIGHT), LEFT @ A @ RIGHT),
    "diagonals": (weighted_operator(A, LEFT[0], RIGHT[:, 0]), LEFT[0][:, None] * A * RIGHT[:, 0]),
    "one side": (weighted_operator(A, right=RIGHT), A @ RIGHT),
    "stream": (row_stream(lambda: A.split(7), (30, 50)), A),
    "listed stream": (row_stream(list(A.split(11)), (30, 50)), A),
    "bare": (Bare(A), A),
    "nested": (difference(concat([A, B], 0), weighted_operator(torch.cat([A, B]), LEFT.new_ones(60))), torch.zeros(60, 50)),
}


@pytest.mark.parametrize("turn", [False, True], ids=["", "T"])
@pytest.mark.parametrize("case", CASES)
def test_an_operator_is_its_matrix(case, turn):
    op, matrix = CASES[case]
    if turn:
        op, matrix = op.T, matrix.T
    m, n = matrix.shape
    assert op.shape == (m, n)
    assert op.dtype == torch.float32
    X, Y = numbers(n, 5, seed=8), numbers(m, 3, seed=9)
    size = float(matrix.norm()) + 1
    close = {"rtol": 1e-4, "atol": 1e-5 * size}
    torch.testing.assert_close(op.matmat(X), matrix @ X, **close)
    torch.testing.assert_close(op.rmatmat(Y), matrix.T @ Y, **close)
    torch.testing.assert_close(op.to_dense(), matrix, **close)
    torch.testing.assert_close(torch.cat(list(op.row_blocks())), matrix, **close)
    wide = matrix.double()
    assert op.fro2() == pytest.approx(float(wide.square().sum()), rel=1e-5, abs=1e-9)
    for side, expected in (("left", wide @ wide.T), ("right", wide.T @ wide)):
        gram = op.gram(side)
        assert gram.dtype == torch.float64
        torch.testing.assert_close(gram, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("case", ["sum", "beside", "weighted", "stream", "bare"])
@pytest.mark.parametrize("method", ["full", "gram", "krylov", "subspace"])
def test_every_algorithm_takes_every_operator(case, method):
    op, matrix = CASES[case]
    expected = torch.linalg.svdvals(matrix.double())[:4]
    got = svd(op, 4, method=method, tol=1e-6, certify="spectral").S.double()
    assert (got - expected).abs().max() < (1e-4 if method != "subspace" else 0.2) * expected[0]


def test_joint_decomposition_without_concatenating():
    parts = [numbers(300, 100, seed=s) * (s + 1) for s in range(4)]
    joined = torch.cat(parts, 1)
    one, two = svd(concat(parts, 1), 6, tol=1e-6), svd(joined, 6, tol=1e-6)
    assert (one.S - two.S).abs().max() < 1e-4 * two.S[0]


def test_a_stream_holds_one_block_at_a_time():
    alive, most = 0, 0

    def blocks():
        nonlocal alive, most
        for part in A.split(10):
            alive += 1
            most = max(most, alive)
            yield part
            alive -= 1

    op = row_stream(blocks, (30, 50))
    op.rmatmat(numbers(30, 2))
    op.gram("right")
    op.fro2()
    assert most == 1


def test_a_float32_sum_of_squares_is_float64():
    x = torch.full((3000, 1000), 0.1)
    assert sum_of_squares(x) == pytest.approx(float(x.double().square().sum()), rel=1e-12)
    assert sum_of_squares(x[:, ::3]) == pytest.approx(float(x[:, ::3].double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("k", [1, 40, 300])
def test_gram_by_blocks(k):
    rows = numbers(k, 2500)
    expected = rows.double() @ rows.double().T
    assert (gram_of(rows) - expected).abs().max() < 1e-11 * expected.abs().max()


def test_refusals():
    with pytest.raises(UsageError, match="only once"):
        row_stream((x for x in A.split(5)), (30, 50))
    with pytest.raises(Refused, match="31 rows"):
        row_stream(lambda: A.split(5), (31, 50)).fro2()
    with pytest.raises(Refused, match="blocks of shape"):
        row_stream(lambda: A.split(5), (30, 49)).fro2()
    with pytest.raises(Refused, match="do not fit"):
        sum_of(A, B[:, :3])
    with pytest.raises(Refused, match="do not fit"):
        concat([A, B[:, :3]], 0)
    with pytest.raises(Refused, match="one dtype"):
        sum_of(A, B.double())
    with pytest.raises(UsageError, match="at least one"):
        concat([], 0)
    with pytest.raises(UsageError, match="dim is 0"):
        concat([A], 2)
    with pytest.raises(Refused, match="30 rows"):
        weighted_operator(A, left=torch.ones(31))
    with pytest.raises(Refused, match="50 columns"):
        weighted_operator(A, right=torch.ones(51, 3))


def test_a_stream_that_ends_early_is_caught_on_the_second_pass():
    once = iter(A.split(10))
    op = row_stream(lambda: once, (30, 50))
    op.fro2()
    with pytest.raises(Refused, match="every pass"):
        op.fro2()


def test_as_operator_copies_nothing():
    assert as_operator(A).to_dense().data_ptr() == A.data_ptr()
    assert as_operator(A.T).to_dense().data_ptr() == A.data_ptr()
