"""Fixed-aspect windows: the released program's grid by a plain loop, and the bias that they take away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eckart.errors import Refused, UsageError
from eckart.linalg.stack import stack_squares
from eckart.spectra.tails import hill
from eckart.spectra.windows import farms, starts


def noise(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


# Hill exponents at the median of one Gaussian matrix each, whole and by 5 x 5 windows of 64: measured independently, to two digits.
CARD = {(256, 256): (2.10, 2.10), (256, 512): (2.71, 2.13), (256, 1024): (3.50, 2.13), (128, 1024): (4.51, 2.12), (1024, 128): (4.49, 2.11)}


@pytest.mark.parametrize("shape", CARD)
def test_the_aspect_no_longer_matters(shape) -> None:
    raw, windowed = CARD[shape]
    assert np.mean([hill(torch.linalg.svdvals(noise(*shape, s)).square()).alpha for s in range(2)]) == pytest.approx(raw, abs=0.12)
    for seed in range(3):
        assert farms(noise(*shape, seed)).tail.alpha == pytest.approx(windowed, abs=0.05)


@pytest.mark.parametrize("shape", [(100, 150), (64, 64), (70, 300), (40, 90), (200, 65)])
def test_windows_are_those_of_the_released_program(shape) -> None:
    """Grid, pooling and fit written out, windows by numpy's SVD."""
    w = noise(*shape).double().numpy()
    rows, cols = shape
    a = min(64, rows, cols)
    step = [max(1, (size - a) // 4) for size in shape]
    count = [min(5, max(1, (size - a) // st + 1)) for size, st in zip(shape, step, strict=True)]
    pool = []
    for i in range(count[0]):
        for j in range(count[1]):
            top, left = min(i * step[0], rows - a), min(j * step[1], cols - a)
            pool.append(np.linalg.svd(w[top : top + a, left : left + a], compute_uv=False) ** 2)
    x = np.sort(np.concatenate(pool))
    upper = x[len(x) // 2 :]
    found = farms(torch.from_numpy(w))
    assert found.tail.alpha == pytest.approx(1 + len(upper) / np.log(upper / upper[0]).sum(), rel=1e-10)
    assert (found.side, found.across, found.windows) == (a, a, count[0] * count[1])


@pytest.mark.parametrize("aspect", [1.0, 2.0, 3.5])
def test_transposing_changes_nothing_and_the_aspect_holds(aspect) -> None:
    w = noise(90, 200)
    one, other = farms(w, aspect=aspect), farms(w.T, aspect=aspect)
    assert one.tail.alpha == pytest.approx(other.tail.alpha, rel=1e-12)
    assert one.across / one.side == pytest.approx(aspect, abs=0.02)
    assert farms(noise(100, 120), aspect=aspect, side=100).across <= 120


def test_one_window_over_all_is_plain_hill() -> None:
    w = noise(80, 80).double()
    assert farms(w, side=80, positions=1).tail.alpha == pytest.approx(hill(torch.linalg.svdvals(w).square()).alpha, rel=1e-9)


def test_grids() -> None:
    assert starts(2000, 64, 5) == [0, 484, 968, 1452, 1936]
    assert starts(66, 64, 5) == [0, 1, 2]
    assert starts(64, 64, 1) == starts(100, 64, 1) == [0]


@pytest.mark.parametrize("w", [torch.zeros(70, 80), torch.outer(torch.ones(80), torch.ones(70)), torch.ones(1, 50), torch.ones(50, 1)])
def test_windows_without_a_tail(w) -> None:
    found = farms(w)
    assert found is None or found.tail.doubt(1.0)
    assert farms(noise(4, 100), aspect=200.0) is None


def test_half_precision_windows() -> None:
    w = noise(128, 256)
    assert farms(w.bfloat16()).tail.alpha == pytest.approx(farms(w).tail.alpha, abs=0.03)


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"side": 0}, {"positions": 0}, {"aspect": 0.5}, {"aspect": float("nan")}):
        with pytest.raises(UsageError, match="farms"):
            farms(noise(10, 10), **wrong)


def test_a_stack_equals_the_dense_driver() -> None:
    for shape in ((5, 30, 30), (4, 20, 50), (4, 50, 20), (1, 1, 7)):
        A = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        want = torch.linalg.svdvals(A.double()).square()
        assert (stack_squares(A) - want).abs().max() < 1e-12 * want.max()
    for wrong in (torch.ones(2, 3), torch.ones(0, 3, 3), torch.ones(2, 3, 3, dtype=torch.int8), torch.full((1, 2, 2), float("inf"))):
        with pytest.raises(Refused, match="stack_squares"):
            stack_squares(wrong)
