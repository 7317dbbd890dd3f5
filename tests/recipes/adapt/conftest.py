"""A linear layer with a decaying spectrum, its float64 decomposition by numpy, and an adapter on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import eckart as ek


@pytest.fixture(params=[(20, 32), (32, 20), (24, 24)], ids=["wide", "tall", "square"])
def world(request: Any) -> Any:
    """`.layer` (a module with one linear layer "0"), `.W`, `.U`, `.S`, `.Vh` of its weight in float64, `.x` inputs; fresh for every test."""
    m, n = request.param
    g = torch.Generator().manual_seed(m)
    weight = torch.randn(m, n, generator=g) @ torch.diag(torch.logspace(0, -1, n))
    bias = torch.randn(m, generator=g)

    def make() -> nn.Module:
        out = nn.Sequential(nn.Linear(n, m))
        with torch.no_grad():
            out[0].weight.copy_(weight)
            out[0].bias.copy_(bias)
        return out

    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    parts = {"U": torch.tensor(u), "S": torch.tensor(s), "Vh": torch.tensor(vh)}
    return SimpleNamespace(make=make, W=weight.double(), bias=bias, x=torch.randn(50, n, generator=g), k=min(m, n), shape=(m, n), **parts)


@pytest.fixture
def adapted() -> Any:
    """adapted(model, recipe, ...) -> (PeftModel in evaluation mode, the branch of its first layer)."""

    def run(model: nn.Module, recipe: Any, rank: Any = None, **how: Any) -> Any:
        found = ek.adapt(model, recipe, rank=rank, **how)
        layer = next(m for m in found.modules() if hasattr(m, "eckart_branch"))
        return found.eval(), layer.branch("default")

    return run


def angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sines of the principal angles between two column spaces, the largest first."""
    qa, qb = (torch.linalg.qr(t.double())[0] for t in (a, b))
    return (1 - torch.linalg.svdvals(qa.T @ qb).clamp(max=1) ** 2).clamp(min=0).sqrt().flip(0)


@pytest.fixture(name="angles")
def _angles() -> Any:
    return angles
