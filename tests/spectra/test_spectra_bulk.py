"""Random-matrix bulk: the law against its integral, noise of known size, planted spikes at the places theory gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from eckart.spectra import bulk


def noise(m: int, n: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(m: int, n: int, strengths: list[float], seed: int) -> torch.Tensor:
    """Unit noise plus orthogonal rank-one terms of these singular values."""
    g = torch.Generator().manual_seed(1000 + seed)
    u = torch.linalg.qr(torch.randn(m, len(strengths), generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, len(strengths), generator=g, dtype=torch.float64))[0]
    return noise(m, n, seed) + (u * torch.tensor(strengths, dtype=torch.float64)) @ v.T


def values(w: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(w.double())


def fit(w: torch.Tensor) -> bulk.Bulk:
    return bulk.fit(values(w), tuple(w.shape))


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.5, 0.03])
def test_the_law_is_the_integral_of_its_density(ratio) -> None:
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    x = np.linspace(low, high, 9)
    for at, above in zip(x, bulk.survival(torch.from_numpy(x), ratio).tolist(), strict=True):
        area = quad(lambda t: math.sqrt(max(0.0, (high - t) * (t - low))) / (2 * math.pi * ratio * t), at, high, limit=200)[0]
        assert above == pytest.approx(area, abs=2e-6)
    assert bulk.survival(torch.tensor([0.0, 10.0]), ratio).tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
    shares = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    assert bulk.survival(bulk.quantile(shares, ratio), ratio).tolist() == pytest.approx((1 - shares).tolist(), abs=1e-5)


@pytest.mark.parametrize("shape", [(150, 150), (100, 400), (400, 100)])
def test_noise_of_known_size(shape) -> None:
    for seed in range(5):
        found, s = fit(noise(*shape, seed, 0.3)), values(noise(*shape, seed, 0.3))
        assert found.noise == pytest.approx(0.3, rel=0.02)
        assert found.edge == pytest.approx(0.3 * (math.sqrt(shape[0]) + math.sqrt(shape[1])), rel=0.02)
        assert found.lower == pytest.approx(0.3 * abs(math.sqrt(shape[0]) - math.sqrt(shape[1])), abs=0.2)
        assert float(s[0]) == pytest.approx(found.edge, rel=0.05)
        assert found.doubt() == ""


def test_false_outliers_are_as_rare_as_stated() -> None:
    found = [fit(noise(60, 90, seed)).outliers for seed in range(200)]
    assert 0 < sum(k > 0 for k in found) <= 10
    assert max(found) <= 2


def test_the_margin_is_the_99_percent_point_of_the_largest_value() -> None:
    limit = math.sqrt(bulk.largest(40, 60))
    above = sum(float(values(noise(40, 60, seed))[0]) > limit for seed in range(600))
    assert 1 <= above <= 14  # 6 expected


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (200, 200)])
def test_planted_spikes_stand_where_theory_puts_them(shape) -> None:
    """Baik, Ben Arous and Peche; for additive noise Benaych-Georges and Nadakuditi: theta goes to sqrt((theta^2 + m)(theta^2 + n)) / theta."""
    m, n = shape
    seen = (m * n) ** 0.25  # below this strength no value leaves the bulk
    strengths = [3 * seen, 2.5 * seen, 2 * seen]
    for seed in range(3):
        w = planted(m, n, strengths, seed)
        found = fit(w)
        assert (found.outliers, found.detached) == (3, 3)
        assert fit(planted(m, n, [0.5 * seen] * 3, seed)).outliers == 0
    theta = 2 * seen
    tops = [float(values(planted(m, n, [theta], seed))[0]) for seed in range(12)]  # each scatters by about 1, the noise of an entry
    assert np.mean(tops) == pytest.approx(math.sqrt((theta**2 + m) * (theta**2 + n)) / theta, rel=0.025)


def test_equal_spikes_are_detached_together_and_what_touches_the_bulk_is_not() -> None:
    assert fit(planted(200, 300, [3 * (200 * 300) ** 0.25] * 4, 0)).detached == 4
    below, s = fit(noise(197, 297, 0)), values(noise(197, 297, 0))
    margin = below.threshold**2 - below.edge**2
    steps = margin * torch.tensor([5.0, 1.7, 0.9], dtype=torch.float64)  # above the edge: far, within a margin of the last, noise
    found = bulk.fit(torch.cat([(below.edge**2 + steps).sqrt(), s]), (200, 300))
    assert float(s[0]) < below.edge
    assert (found.outliers, found.detached) == (2, 1)


def test_many_spikes_do_not_move_the_noise() -> None:
    strengths = torch.linspace(60, 200, 40).tolist()
    found = fit(planted(200, 300, strengths, 1))
    assert found.outliers == pytest.approx(40, abs=1)
    assert found.noise == pytest.approx(1, rel=0.03)
    assert found.doubt() == ""


def test_spectra_that_noise_does_not_explain() -> None:
    ranks = torch.arange(1, 201, dtype=torch.float64)
    assert "no bulk" in bulk.fit(1 / ranks, (200, 800)).doubt()
    assert "not that of noise" in bulk.fit(torch.linspace(1.05, 1, 200, dtype=torch.float64), (200, 200)).doubt()


@pytest.mark.parametrize("s", [[], [1.0], [1.0] * 19, [1.0] + [0.0] * 60, [1.0] + [1e-9] * 200, [0.0] * 50])
def test_too_little_for_a_bulk(s) -> None:
    assert bulk.fit(torch.tensor(s, dtype=torch.float64), (max(1, len(s)), 300)) is None
