"""Factors as a value: products, cuts, balance, edits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eckart.errors import UsageError
from eckart.linalg import Factors, svd
from tests.linalg.spectra import matrix, spectrum

A = matrix(spectrum("power", 40), 40, 70)
F = svd(A, 12, method="full")


def test_dense_is_the_best_approximation():
    u, s, vh = torch.linalg.svd(A.double(), full_matrices=False)
    best = (u[:, :12] * s[:12]) @ vh[:12]
    assert (F.dense().double() - best).norm() < 1e-5
    assert F.rank == 12
    assert F.shape == (40, 70)


def test_transpose():
    torch.testing.assert_close(F.T.dense(), F.dense().T, rtol=1e-6, atol=1e-7)
    assert F.T.certificate.shape == (70, 40)
    assert F.T.T.shape == F.shape


def test_split_is_a_partition():
    top, rest = F.split(5)
    torch.testing.assert_close(top.dense() + rest.dense(), F.dense())
    assert (top.rank, rest.rank) == (5, 7)
    assert rest.certificate is None
    assert (top.U.T @ rest.U).abs().max() < 1e-6
    assert top.certificate.error == pytest.approx(float(torch.linalg.svdvals(A.double())[5:].norm()), rel=1e-5)


@pytest.mark.parametrize("mode", ["even", "left", "right"])
def test_balance(mode):
    left, right = F.balance(mode)
    torch.testing.assert_close(left @ right, F.dense())
    a, b = left.square().sum(0), right.square().sum(1)
    expected = {"even": (F.S, F.S), "left": (F.S**2, torch.ones(12)), "right": (torch.ones(12), F.S**2)}[mode]
    torch.testing.assert_close(a, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b, expected[1], rtol=1e-4, atol=1e-6)


def test_refactor_after_an_edit():
    edited = replace(F, U=F.U * torch.linspace(-2, 3, 40)[:, None], certificate=None)
    again = edited.refactor()
    torch.testing.assert_close(again.dense(), edited.dense(), rtol=1e-4, atol=1e-5)
    assert (again.U.T @ again.U - torch.eye(12)).abs().max() < 1e-5
    expected = torch.linalg.svdvals(edited.dense().double())[:12]
    assert (again.S.double() - expected).abs().max() < 1e-5
    assert again.certificate is None


def test_truncate_equals_a_smaller_factorisation():
    small = svd(A, 4, method="full")
    cut = F.truncate(4)
    torch.testing.assert_close(cut.dense(), small.dense(), rtol=1e-4, atol=1e-5)
    assert cut.certificate.error == pytest.approx(small.certificate.error, rel=1e-5)
    assert cut.certificate.rank == 4
    assert F.truncate(12) is F


def test_bad_cuts():
    for r in (0, 13, -1):
        with pytest.raises(UsageError):
            F.truncate(r)
    for k in (0, 12):
        with pytest.raises(UsageError):
            F.split(k)
    with pytest.raises(UsageError):
        F.balance("middle")


def test_factors_without_certificate():
    bare = Factors(F.U, F.S, F.Vh)
    assert bare.truncate(3).certificate is None
    assert bare.T.certificate is None


def test_certificate_as_plain_values():
    c = F.certificate.as_dict()
    assert c["method"] == "full"
    assert c["driver"] == "gesdd"
    assert c["relative_error"] == pytest.approx(c["error"] / c["norm"])
    assert c["shape"] == [40, 70]
