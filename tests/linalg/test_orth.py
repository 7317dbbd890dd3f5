"""Orthonormal bases, in conditions where Cholesky holds and where it does not."""

from __future__ import annotations

import pytest
import torch

from eckart.errors import Refused, UsageError
from eckart.linalg import orth
from eckart.linalg.orth import cholesky_qr2, complete, whiten
from tests.linalg.spectra import matrix


def block(condition: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return matrix(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 12, dtype=torch.float64), 200, 12, dtype=dtype)


@pytest.mark.parametrize("method", ["auto", "qr", "cholesky"])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal_whatever_the_condition(condition, method, dtype):
    A = torch.ones(200, 12, dtype=dtype) if condition == float("inf") else block(condition, dtype)
    Q = orth(A, method)
    limit = 1e-5 if dtype == torch.float32 else 1e-11
    assert Q.dtype == dtype
    assert (Q.T @ Q - torch.eye(12, dtype=dtype)).abs().max() < limit
    assert (A - Q @ (Q.T @ A)).norm() < 5 * limit * A.norm()


def test_cholesky_says_when_it_cannot():
    assert cholesky_qr2(block(1e4)) is not None
    assert cholesky_qr2(torch.ones(30, 3)) is None
    assert cholesky_qr2(block(1e12, torch.float64)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whiten_drops_what_is_not_there(dtype):
    rows = matrix(torch.tensor([1.0, 0.5, 1e-3, 0.0, 0.0]), 5, 80, dtype=dtype)
    Q, B = whiten(rows, 1e-5)
    assert Q.shape == (3, 80)
    assert (Q @ Q.T - torch.eye(3, dtype=dtype)).abs().max() < 1e-5
    assert (B.to(dtype) @ Q - rows).norm() < 1e-5


def test_whiten_resolves_small_directions_in_float64():
    rows = matrix(torch.tensor([1.0, 1e-11]), 2, 80, dtype=torch.float64)
    Q, B = whiten(rows, 1e-13)
    assert Q.shape[0] == 2
    assert (Q @ Q.T - torch.eye(2)).abs().max() < 1e-12
    assert (B @ Q - rows).norm() < 1e-14


def test_complete_fills_the_complement():
    g = torch.Generator().manual_seed(0)
    rows = torch.zeros(6, 6)
    rows[:4] = torch.eye(6)[:4]
    weak = torch.tensor([False] * 4 + [True] * 2)
    out = complete(rows, weak, g)
    assert (out @ out.T - torch.eye(6)).abs().max() < 1e-12
    assert torch.equal(out[:4], torch.eye(6, dtype=torch.float64)[:4])


def test_refusals():
    with pytest.raises(Refused, match="at least as many rows"):
        orth(torch.ones(3, 4))
    with pytest.raises(UsageError):
        orth(torch.ones(4, 3), "svd")
