"""Numerical rank: singular values above the rounding of a float32 factorisation."""

import torch

from ..spectra.numbers import numerical_rank
from .base import OfSpectrum

EPS = torch.finfo(torch.float32).eps

MEASURE = OfSpectrum(
    name="numerical_rank",
    title="Numerical rank",
    paper="doi:10.1137/1.9780898719604",
    estimator="count of s > max(m, n) eps max(s)",
    compute=lambda s, shape: numerical_rank(s, shape, EPS),
    settings={"eps": EPS},
    note="storing a weight in half precision adds noise far above this threshold: a rounded matrix of low rank counts as full",
)
