"""Spectra of products that are not formed, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eckart.errors import Refused
from eckart.linalg.product import eigvals_psd, product_svdvals


def noise(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 30, 20), (1, 8, 3), (20, 20, 20), (40, 9, 30), (40, 30, 1), (7, 1, 1)])
def test_values_are_those_of_the_product(shape) -> None:
    t, m, n = shape
    left, right = noise(t, m), noise(t, n, 1)
    expected = np.linalg.svd((left.T @ right).numpy(), compute_uv=False)[: min(t, m, n)]
    assert np.allclose(product_svdvals(left, right), expected, rtol=1e-9)
    assert np.allclose(product_svdvals(left * 1e-30, right.float()), expected * 1e-30, rtol=1e-5)


def test_small_values_keep_their_digits_where_the_product_is_thin() -> None:
    s = torch.tensor([1.0, 1e-6, 1e-10], dtype=torch.float64)
    left = torch.diag(s) @ torch.linalg.qr(noise(20, 3))[0].T
    right = torch.linalg.qr(noise(15, 3, 1))[0].T
    assert np.allclose(product_svdvals(left, right), s, rtol=1e-5)


def test_zero_half_and_what_is_refused() -> None:
    assert product_svdvals(torch.zeros(2, 5), noise(2, 4)).tolist() == [0.0, 0.0]
    assert product_svdvals(torch.ones(2, 5, dtype=torch.float16), torch.ones(2, 4, dtype=torch.bfloat16))[0] == pytest.approx(2 * 20**0.5)
    for left, right in ((noise(2, 3), noise(3, 3)), (noise(0, 3), noise(0, 3)), (noise(2, 0), noise(2, 3)), (noise(2, 3)[0], noise(2, 3))):
        with pytest.raises(Refused, match="equally many rows"):
            product_svdvals(left, right)
    with pytest.raises(Refused, match="layer: holds NaN or Inf"):
        product_svdvals(torch.full((2, 3), float("nan")), noise(2, 3), "layer")


def test_eigenvalues_of_a_gram() -> None:
    x = noise(4, 9)
    assert np.allclose(eigvals_psd(x.T @ x)[:4], np.linalg.svd(x.numpy(), compute_uv=False) ** 2)
    assert bool((eigvals_psd(x.T @ x) >= 0).all())
    assert eigvals_psd(torch.zeros(1, 1)).tolist() == [0.0]
    for bad in (noise(2, 3), noise(0, 0)):
        with pytest.raises(Refused, match="square matrix"):
            eigvals_psd(bad)
    with pytest.raises(Refused, match="gram: holds NaN or Inf"):
        eigvals_psd(torch.full((2, 2), float("inf")), "gram")
