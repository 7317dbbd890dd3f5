"""LDU, Nyström and Kronecker layouts against scipy and numpy."""

import numpy as np
import pytest
import scipy.linalg
import torch

from eckart.errors import Refused
from eckart.linalg.kronecker import laid_out, split_shape, terms
from eckart.linalg.ldu import ldu, nystrom

SHAPES = [(12, 20), (20, 12), (16, 16), (1, 7), (7, 1), (1, 1)]


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestLDU:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_against_scipy(self, shape) -> None:
        w = matrix(*shape)
        left, d, right = ldu(w)
        p, lower, upper = scipy.linalg.lu(w.numpy())
        assert np.allclose(left.numpy(), p @ lower)
        assert np.allclose(d.numpy(), np.diag(upper))
        assert np.allclose((left * d @ right).numpy(), w.numpy())

    @pytest.mark.parametrize(
        "w",
        [
            torch.zeros(4, 6), torch.ones(5, 3), torch.outer(torch.arange(1.0, 5), torch.arange(3.0)), torch.tensor([[0.0, 1.0], [0.0, 2.0]]),
            torch.tensor([[1e-20, 1.0], [1e-21, 1.0]]), torch.eye(4).flip(0),
        ],
    )  # fmt: skip
    def test_pivots_that_vanish_leave_a_product(self, w) -> None:
        left, d, right = ldu(w)
        assert torch.allclose(left * d @ right, w, atol=1e-6)
        assert all(bool(torch.isfinite(t).all()) for t in (left, d, right))
        assert float(right.abs().max()) <= 1e6

    def test_half_precision_comes_back_in_float32_and_damage_is_refused(self) -> None:
        w = matrix(6, 9).half()
        left, d, right = ldu(w)
        assert left.dtype == torch.float32
        assert torch.allclose(left * d @ right, w.float(), atol=1e-5)
        with pytest.raises(Refused, match="w: expected a finite matrix"):
            ldu(torch.full((2, 2), torch.nan), "w")


class TestNystrom:
    @pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
    def test_against_numpy(self, shape) -> None:
        w = matrix(*shape)
        c, middle, r = nystrom(w, 6)
        assert np.allclose(middle.numpy(), np.linalg.pinv(w[:6, :6].numpy()))
        assert torch.allclose((c @ middle @ r)[:6], w[:6])
        assert torch.allclose((c @ middle @ r)[:, :6], w[:, :6])

    def test_of_a_matrix_of_low_rank_it_is_the_matrix(self) -> None:
        w = matrix(12, 3) @ matrix(3, 20, 1)
        c, middle, r = nystrom(w.float(), 5)  # the block has rank 3 only
        assert torch.allclose(c @ middle @ r, w.float(), atol=1e-3)

    def test_zero(self) -> None:
        assert not any(t.any() for t in nystrom(torch.zeros(4, 5), 2, 0.1))


class TestKronecker:
    def test_shapes_divide(self) -> None:
        for m, n in [(4096, 4096), (2048, 5504), (12, 24), (23, 29), (1, 1), (1, 24)]:
            (m1, n1), (m2, n2) = split_shape(m, n)
            assert (m1 * m2, n1 * n2) == (m, n)
        assert split_shape(4096, 4096) == ((64, 64), (64, 64))
        assert split_shape(23, 29) == ((1, 29), (23, 1))  # of primes: outer products, and the ordinary SVD
        assert terms(23, 29) == 23

    @pytest.mark.parametrize("shape", [(12, 24), (24, 12), (16, 16), (1, 24), (23, 6)])
    def test_sums_of_products_are_products_of_sums(self, shape) -> None:
        (m1, n1), (m2, n2) = split_shape(*shape)
        a, b = np.random.default_rng(0).standard_normal((3, m1, n1)), np.random.default_rng(1).standard_normal((3, m2, n2))
        w = sum(np.kron(x, y) for x, y in zip(a, b, strict=True))
        assert np.allclose(laid_out(torch.tensor(w)).numpy(), a.reshape(3, -1).T @ b.reshape(3, -1))
