"""Metrics that are never formed: block diagonal ones and the covariance of one-hot rows."""

import numpy as np
import pytest
import torch

from eckart.errors import Refused
from eckart.linalg import weighted
from eckart.linalg.psd import Weight, root

G = torch.Generator().manual_seed(1)


def gram(n):
    x = torch.randn(3 * n, n, generator=G, dtype=torch.float64)
    return x.T @ x


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_blocks_equal_the_block_diagonal_matrix(power) -> None:
    blocks = (gram(4), gram(3).diagonal(), gram(2))
    full = torch.block_diag(blocks[0], torch.diag(blocks[1]), blocks[2])
    parts, whole = root(Weight(blocks, power)), root(Weight(full, power))
    x = torch.randn(9, 5, generator=G, dtype=torch.float64)
    assert Weight(blocks).size == 9
    assert torch.allclose(parts.apply(x), whole.apply(x), atol=1e-9)
    assert torch.allclose(parts.solve(x), whole.solve(x), atol=1e-6)
    assert parts.condition == pytest.approx(whole.condition)


def test_weighted_solution_with_blocks() -> None:
    w = torch.randn(5, 7, generator=G)
    blocks = (gram(4), gram(3))
    a = weighted.solve(w, into=Weight(blocks), rank=2)
    b = weighted.solve(w, into=Weight(torch.block_diag(*blocks)), rank=2)
    assert torch.allclose(a.left @ a.right, b.left @ b.right, atol=1e-8)


@pytest.mark.parametrize("counts", [[3, 0, 1, 2, 5, 1], [1, 1, 1, 1, 1, 1], [0, 0, 4, 0, 0, 0]])
def test_one_hot_covariance(counts) -> None:
    p = torch.tensor(counts, dtype=torch.float64)
    rows = np.repeat(np.eye(len(counts)), counts, axis=0)
    covariance = np.cov(rows.T, bias=True) if len(rows) > 1 else np.zeros((6, 6))
    s = root(Weight(p, one_hot=True)).apply(torch.eye(6, dtype=torch.float64)).T  # S, of which apply takes the transpose
    assert np.allclose((s @ s.T).numpy(), covariance, atol=1e-12)
    with pytest.raises(Refused, match="singular"):
        root(Weight(p, one_hot=True)).solve(torch.eye(6))


@pytest.mark.parametrize("bad", [[-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_frequencies_are_checked(bad) -> None:
    with pytest.raises(Refused, match="frequencies"):
        root(Weight(torch.tensor(bad), one_hot=True))
