"""The statement that goes with the factors: what error was achieved, and how far that is from the best.

Free: the achieved error, from norms that were summed in float64 or from the residual itself where they would cancel, and what the
algorithm knows of the energy it missed. Spectral: an upper bound of ‖A - Â‖₂ by Lanczos from one random vector (Kuczynski and Wozniakowski,
SIAM J. Matrix Anal. Appl. 13, 1992). Optimum: the singular values of A from its float64 Gram.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..seeds import generator
from .choose import LANCZOS_STEPS
from .factors import ROUNDING, Certificate, Factors, separated
from .finish import NORM_NOISE, Draft
from .operator import Operator, Transposed, sum_of_squares

# Relative size of the squared error above which ‖A‖² - ‖Â‖² is taken.
CANCELS = {torch.float32: 4e-3, torch.float64: 1e-8}
PLAIN_RESIDUAL = 1e-6  # of ‖A‖²: below it a float32 residual is itself rounding, so it is taken in float64
WIDE_FLOPS = 4e9  # a float64 residual is afforded up to this size
LEAD = 64  # triples that are always taken off in float64
FAILURE = 1e-3  # probability, over the seed, that the spectral bound is too small


def achieved(op: Operator, draft: Draft, total: float) -> tuple[float, float]:
    """(‖A - Â‖², uncertainty of it). `total` is ‖A‖²."""
    error = math.inf
    if draft.projected and draft.S.shape[0] < min(op.shape):
        lengths = torch.linalg.vector_norm(draft.U, dim=0, dtype=torch.float64).square()
        error = total - float((draft.S.square() * (2 - lengths)).sum())
    if math.isfinite(error) and error > CANCELS[op.dtype] * total:
        return error, NORM_NOISE[op.dtype] * total
    flops = 2.0 * op.shape[0] * op.shape[1] * draft.S.shape[0]
    plain = op.dtype == torch.float32 and (error > PLAIN_RESIDUAL * total or flops > WIDE_FLOPS)  # tiny errors go straight to float64
    error = residual(op, draft, torch.float32 if plain else torch.float64)
    if plain and error < PLAIN_RESIDUAL * total and flops <= WIDE_FLOPS:
        error, plain = residual(op, draft, torch.float64), False
    return error, (1e-5 if plain else 1e-12) * error


def residual(op: Operator, draft: Draft, dtype: torch.dtype) -> float:
    """‖A - U S Vh‖² from the difference itself, block by block, products in `dtype`.

    The leading triples are taken off in float64 in any case: a float32 product then only rounds what is left.
    """
    if isinstance(op, Transposed):
        return residual(op.base, draft.turned(), dtype)
    lead = draft.S.shape[0] if dtype == torch.float64 else LEAD
    values = draft.S.to(op.dtype)  # as they are handed out
    left, right = draft.U[:, :lead].to(torch.float64) * values[:lead], draft.Vh[:lead].to(torch.float64)
    others = draft.U[:, lead:] * values[lead:]
    start, total = 0, 0.0
    for block in op.row_blocks():
        stop = start + block.shape[0]
        rest = torch.addmm(block.to(torch.float64), left[start:stop], right, alpha=-1)
        if lead < draft.S.shape[0]:
            rest = torch.addmm(rest.to(dtype), others[start:stop], draft.Vh[lead:], alpha=-1)
        total += sum_of_squares(rest)
        start = stop
    return total


def seal(op: Operator, draft: Draft, total: float, *, certify: str = "free", seed: int = 0) -> Factors:
    """Factors with their certificate.

    Args:
        op: A (m, n).
        draft: triples and what their algorithm knows.
        total: ‖A‖².
        certify: "free", "spectral" or "optimum".
        seed: of the random vector of the spectral bound.
    """
    m, n = op.shape
    rank, size = draft.S.shape[0], min(m, n)
    squared, noise = achieved(op, draft, total)
    if certify == "optimum" and draft.spectrum is None and rank < size and total > 0:
        draft = replace(draft, spectrum=spectrum_of(op), passes=draft.passes + 1)
    missed, kind, optimum = draft.missed, draft.kind, None
    if draft.spectrum is not None:
        tail = float(draft.spectrum[rank:].sum())
        optimum = math.sqrt(min(tail, squared))
        missed, kind = max(0.0, squared - tail) + _spectrum_noise(draft, tail, total), "bound"
    if rank == size or total == 0:
        missed, kind, optimum = 0.0, "exact", 0.0
    certificate = Certificate(
        method=draft.method,
        shape=(m, n),
        rank=rank,
        norm=math.sqrt(total),
        error=math.sqrt(squared),
        shortfall=missed + noise if kind == "bound" else missed,
        gap_kind=kind,  # pyright: ignore[reportArgumentType]
        optimum=optimum,
        identified=_identified(draft, rank, size),
        passes=draft.passes,
        seed=seed,
        compute_dtype=str(op.dtype).removeprefix("torch."),
        driver=draft.driver,
    )
    factors = Factors(draft.U, draft.S.to(op.dtype), draft.Vh, certificate)
    if certify == "spectral":
        bound, failure, passes = spectral_bound(op, factors, certificate.error, seed)
        factors = replace(
            factors, certificate=replace(certificate, spectral=bound, spectral_failure=failure, passes=certificate.passes + passes)
        )
    return factors


def spectrum_of(op: Operator) -> Tensor:
    """Squares of all singular values, float64, descending, by the Gram of the smaller side."""
    gram = op.gram("left" if op.shape[0] <= op.shape[1] else "right")
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def spectral_bound(op: Operator, factors: Factors, error: float, seed: int, steps: int = LANCZOS_STEPS) -> tuple[float, float, int]:
    """(upper bound of ‖A - Â‖₂, probability that it is too small, products with A).

    Lanczos on E E^T from one uniformly random direction: with k steps in dimension m the largest Ritz value is below (1 - x) of the
    largest eigenvalue with probability at most 1.648 sqrt(m) exp(-(2k - 1) sqrt(x)). The Frobenius error bounds it too, surely.
    """
    if error == 0:
        return 0.0, 0.0, 0
    if op.shape[0] > op.shape[1]:
        return spectral_bound(op.T, factors.T, error, seed, steps)
    m = op.shape[0]
    steps = min(steps, m)
    left, right = factors.U * factors.S, factors.Vh
    vector = torch.randn(m, generator=generator(seed, "spectral"), dtype=torch.float64).to(op.device)
    basis = torch.zeros(steps, m, dtype=torch.float64, device=op.device)
    images = torch.zeros(steps, op.shape[1], dtype=torch.float64, device=op.device)
    done = 0
    for i in range(steps):
        length = float(torch.linalg.vector_norm(vector))
        if length <= 1e-14 * error**2:
            break
        basis[i] = vector / length
        y = basis[i].to(op.dtype)[:, None]
        image = op.rmatmat(y) - right.T @ (left.T @ y)
        images[i] = image[:, 0]
        done += 1
        vector = (op.matmat(image) - left @ (right @ image))[:, 0].to(torch.float64)
        for _ in range(2):
            vector = vector - basis[:done].T @ (basis[:done] @ vector)
    found = math.sqrt(float(torch.linalg.eigvalsh(images[:done] @ images[:done].T)[-1].clamp_min(0)))
    root = math.log(1.648 * math.sqrt(m) / FAILURE) / (2 * done - 1)
    noise = ROUNDING[str(op.dtype).removeprefix("torch.")] * float(factors.S[0] if factors.rank else 0)
    if done < steps or done == m:  # the space is exhausted: Lanczos has found the norm itself
        bound = found * (1 + 1e-3) + noise
    else:
        bound = found / math.sqrt(1 - root**2) + noise if root < 1 else math.inf
    return (error, 0.0, 2 * done) if bound >= error else (bound, FAILURE, 2 * done)


def _spectrum_noise(draft: Draft, tail: float, total: float) -> float:
    """How much a computed tail of squares may exceed the true one."""
    rank, size = draft.S.shape[0], draft.spectrum.shape[0] if draft.spectrum is not None else 0
    if draft.method == "full":  # each value is off by rounding of the largest
        delta = ROUNDING[str(draft.U.dtype).removeprefix("torch.")] * math.sqrt(total)
        return 2 * delta * math.sqrt(tail) + delta**2
    eps = torch.finfo(torch.float64).eps
    return eps * (16 * total + 4 * max(0, size - rank) * float(draft.S[0]) ** 2)


def _identified(draft: Draft, rank: int, size: int) -> bool | None:
    here = float(draft.S[-1])
    if rank == size or here == 0:
        return here > 0
    if draft.spectrum is not None:
        return separated(here, math.sqrt(float(draft.spectrum[rank])))
    return None if draft.following is None else separated(here, draft.following)
