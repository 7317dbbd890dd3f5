"""Matrices with a known spectrum, and the figures every factorisation is held against: float64, from torch.linalg alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def rotation(rows: int, cols: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, cols, generator=g, dtype=torch.float64))[0]


def matrix(values: Tensor, m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(m, n) with these singular values and random singular vectors."""
    k = min(m, n)
    return ((rotation(m, k, 2 * seed + 1) * values.to(torch.float64)) @ rotation(n, k, 2 * seed + 2).T).to(dtype)


def spectrum(kind: str, k: int) -> Tensor:
    """k singular values of a named shape, the hard cases of a truncated SVD among them."""
    i = torch.arange(1, k + 1, dtype=torch.float64)
    if kind == "flat":
        return torch.linspace(1.0, 0.9, k, dtype=torch.float64)
    if kind == "power":
        return 1 / i
    if kind == "exponential":
        return 0.5**i
    if kind == "clustered":
        return torch.where(i <= k // 4, 1.0, 0.1) * (1 + 1e-7 * i.flip(0))
    if kind == "repeated":
        return torch.where(i <= k // 3, 1.0, torch.where(i <= k // 2, 0.5, 0.25)).to(torch.float64)
    if kind == "identity":
        return torch.ones(k, dtype=torch.float64)
    if kind == "tail":
        return torch.where(i <= 5, 1.0 / i, 1e-12)
    if kind == "deficient":
        return torch.where(i <= max(1, k // 5), 1.0 / i, 0.0)
    if kind == "rank one":
        return torch.where(i <= 1, 1.0, 0.0).to(torch.float64)
    if kind == "zero":
        return torch.zeros(k, dtype=torch.float64)
    if kind == "condition 1e12":
        return torch.logspace(0, -12, k, dtype=torch.float64)
    if kind == "step":
        return torch.where(i <= 8, 1.0, 1e-4).to(torch.float64)
    if kind == "outlier":
        return torch.where(i <= 1, 1e4, 1.0 / i.sqrt())
    raise ValueError(kind)


KINDS = (
    "flat", "power", "exponential", "clustered", "repeated", "identity", "tail", "deficient", "rank one", "zero", "condition 1e12", "step", "outlier",
)  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """Figures of one result in float64: achieved error, best error at its rank, norm."""

    error: float
    best: float
    norm: float
    spectral: float


def truth(A: Tensor, factors: object) -> Truth:
    wide = A.to(torch.float64)
    f = factors
    left = wide - (f.U.to(torch.float64) * f.S.to(torch.float64)) @ f.Vh.to(torch.float64)  # type: ignore[attr-defined]
    values = torch.linalg.svdvals(wide)
    r = f.S.shape[0]  # type: ignore[attr-defined]
    return Truth(
        float(left.norm()), math.sqrt(float(values[r:].square().sum())), float(wide.norm()), float(torch.linalg.matrix_norm(left, 2))
    )
