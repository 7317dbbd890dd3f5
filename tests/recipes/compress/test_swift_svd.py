"""Swift-SVD against its two formulas: the projector of the output's second moment, and the pool of ranks."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import eckart as ek
from eckart.axes import Budget
from eckart.axes.allocate import Pool
from eckart.axes.protocols import Cost

G = torch.Generator().manual_seed(0)


def test_the_cut_is_the_projection_on_the_outputs_leading_directions() -> None:
    net = nn.Sequential(nn.Linear(12, 9, bias=False))
    x = torch.randn(200, 12, generator=G) @ torch.randn(12, 12, generator=G)
    made = ek.compress(net, "swift_svd", calib=[x], settings=["budget.rank=4", "allocate.kind=uniform", "score.kind=predicted_loss"])
    w = net[0].weight.detach().double().numpy()
    y = x.double().numpy() @ w.T
    _, vectors = np.linalg.eigh(y.T @ y)
    u = vectors[:, -4:]
    pair = made.model[0]
    assert np.allclose(pair.dense_weight().detach().double().numpy(), u @ u.T @ w, atol=1e-5)
    up = pair.up.weight.detach().double().numpy()
    assert np.allclose(up.T @ up, np.eye(4), atol=1e-5)  # the basis itself is stored, coefficients on the other side


@pytest.mark.parametrize("keep", [0.4, 0.6])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_pool_is_the_papers_formula_on_stored_shares(keep, alpha) -> None:
    rng = np.random.default_rng(1)
    names = [f"b{i}" for i in range(5)]
    costs = {n: Cost(dense=400 * 300, per_rank=700, full=300, role="q", block=i) for i, n in enumerate(names)}
    influence = rng.uniform(0.05, 0.6, 5)
    spectra = rng.uniform(0.5, 2, 5)[:, None] * np.arange(1, 301) ** -0.8
    curves = {n: [float(b), *(float(v) for v in s**2)] for n, b, s in zip(names, influence, spectra, strict=True)}
    ranks = Pool(alpha=alpha)(curves, costs, Budget(keep=keep))
    beta = 1 + (influence - influence.min()) / (influence.max() - influence.min())
    size = np.sqrt((spectra**2).sum(1))
    weight = beta**alpha * np.log(math.e + size / size.mean()) ** (1 - alpha)
    shares = 0.5 * keep + 0.5 * keep * len(names) * weight / weight.sum()
    assert [ranks[n] for n in names] == pytest.approx(shares * 400 * 300 / 700, abs=1.5)
    assert len({ranks[n] for n in names}) > 1
