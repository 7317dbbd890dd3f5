"""Which algorithm, from counted flops and shipped rates. A clock never decides: the same call gives the same choice on every run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from ..errors import UsageError, did_you_mean

Method = Literal["auto", "full", "gram", "krylov", "subspace", "warm"]
Certify = Literal["free", "spectral", "optimum"]
METHODS = ("auto", "full", "gram", "krylov", "subspace", "warm")
CERTIFY = ("free", "spectral", "optimum")
DIRECT = 128  # up to this size of the smaller side everything but a dense SVD is overhead
TRY = 0.5  # block Lanczos is tried when it is expected to cost at most this share of the best exact route
ROUGH = 1e-2  # from this tolerance on a few passes of subspace iteration are tried first
PROBES = 16  # extra columns of subspace and warm starts
LANCZOS_STEPS = 16  # of the spectral certificate


@dataclass(frozen=True)
class Choice:
    """An algorithm with what it is expected to cost. Not a promise: `seconds` is from the shipped rates of one machine.

    Args:
        method: "full", "gram", "krylov" or "subspace".
        flops: floating-point operations expected.
        seconds: flops at the shipped rates.
    """

    method: str
    flops: float
    seconds: float


@dataclass(frozen=True)
class Rates:
    """Speeds of one (device type, dtype), read from thresholds.json. All times in seconds; s is the smaller side, l the larger."""

    gemm: Mapping[int, float]
    gram_rate: float
    eigh_times: Mapping[int, float]
    eigvalsh_times: Mapping[int, float]
    svd_times: Mapping[int, float]
    svd4_times: Mapping[int, float]
    step: float
    measured: bool

    def product(self, s: int, l: int, width: int) -> float:
        """A times a block of that width."""
        return 2.0 * s * l * width / (_rate(self.gemm, width) * 1e9)

    def gram(self, s: int, l: int) -> float:
        """The float64 Gram of the smaller side, by its upper blocks."""
        return gram_flops(s, l) / (self.gram_rate * 1e9)

    def eigh(self, s: int) -> float:
        """Eigenvalues and vectors, float64."""
        return _time(self.eigh_times, s)

    def eigvalsh(self, s: int) -> float:
        """Eigenvalues alone, float64."""
        return _time(self.eigvalsh_times, s)

    def svd(self, s: int, l: int) -> float:
        """The dense driver on the tall side."""
        square, tall = _time(self.svd_times, s), _time(self.svd4_times, s)
        return square + (tall - square) * max(0.0, l / s - 1) / 3

    def exact_gram(self, s: int, l: int, rank: int) -> float:
        """Gram, eigenvectors, and the other factor."""
        return self.gram(s, l) + self.eigh(s) + self.product(s, l, rank)

    def subspace(self, s: int, l: int, rank: int, passes: int) -> float:
        """That many passes over A and over its transpose."""
        width = min(s, rank + PROBES)
        return passes * (2 * self.product(s, l, width) + self.eigh(width) + self.step + 2.0 * l * width**2 / (self.gram_rate * 1e9))

    def krylov(self, s: int, l: int, block: int, steps: int) -> float:
        """Block Lanczos of that many steps, its eigenproblems adding up to 2.4 of the final size."""
        d = block * steps
        small = (2.0 * s * d**2 + 6.0 * l * d * block) / (self.gram_rate * 1e9)
        return (2 * steps + 1) * self.product(s, l, block) + steps * self.step + small + 2.4 * self.eigh(d)


def rates(device: str, dtype: str) -> Rates:
    """The shipped rates; an unknown device type takes the CPU's."""
    table = _table()
    entry = table.get(f"{device}/{dtype}") or table[f"cpu/{dtype}"]

    def sizes(name: str) -> dict[int, float]:
        return {int(k): float(v) for k, v in entry[name].items()}

    return Rates(
        gemm=sizes("gemm"),
        gram_rate=float(entry["gram"]),
        eigh_times=sizes("eigh"),
        eigvalsh_times=sizes("eigvalsh"),
        svd_times=sizes("svd"),
        svd4_times=sizes("svd4"),
        step=float(entry["step"]),
        measured=bool(entry["measured"]),
    )


def choose(
    m: int, n: int, rank: int | None, *, dtype: str = "float32", device: str = "cpu", tol: float = 1e-3, certify: Certify = "free"
) -> Choice:
    """What `svd` with method "auto" starts with for a matrix of that shape, and what it should cost.

    Not what it ends with: block Lanczos gives up on spectra that are too flat for it, and then costs at most about 1.4 times the Gram route.

    Args:
        m: rows.
        n: columns.
        rank: number of triples; None for all, or when the spectrum decides.
        dtype: "float32" (half precision computes in it too) or "float64".
        device: device type, "cpu" or "cuda".
        tol: allowed relative excess of the Frobenius error over the optimum.
        certify: "free", "spectral" or "optimum".

    Returns:
        The method, its flops and predicted seconds.

    Raises:
        UsageError: a size, rank or option out of range.

    Example:
        >>> choose(4096, 4096, 16).method, choose(4096, 11008, 2000).method, choose(64, 64, 8).method
        ('krylov', 'gram', 'full')
    """
    s, l = min(m, n), max(m, n)
    if s < 1 or (rank is not None and not 1 <= rank <= s):
        raise UsageError(f"choose: expected a rank from 1 to {s} for a matrix of {m} x {n}, found {rank}.")
    if certify not in CERTIFY:
        raise UsageError(f"choose: unknown certify={certify!r}.{did_you_mean(certify, CERTIFY)}")
    r = s if rank is None else rank
    wide = dtype == "float64"
    speed = rates(device, "float64" if wide else "float32")
    full = Choice("full", svd_flops(s, l), speed.svd(s, l) + _residual(speed, s, l, r))
    gram = Choice("gram", exact_gram_flops(s, l, r), speed.exact_gram(s, l, r) + (_residual(speed, s, l, r) if r == s else 0.0))
    if s <= DIRECT or (wide and (r == s or tol < 1e-7)):
        best = full
    else:
        best = min(full, gram, key=lambda c: c.seconds)
    if rank is not None and s > DIRECT and tol > 0:
        extra_flops, extra = _certificate_cost(speed, s, l, certify)
        tries: list[Choice] = []
        if tol >= ROUGH:
            tries.append(Choice("subspace", subspace_flops(s, l, r, 3), speed.subspace(s, l, r, 3)))
        block = block_width(r, s)
        steps = math.ceil(expected_dimension(r, block, tol) / block)
        if block * steps < s // 2:
            tries.append(Choice("krylov", krylov_flops(s, l, block, steps), speed.krylov(s, l, block, steps)))
        for one in tries:
            if one.seconds + extra <= TRY * best.seconds:
                return Choice(one.method, one.flops + extra_flops, one.seconds + extra)
    return best


def block_width(rank: int, s: int) -> int:
    """Columns of a block: 16, 32 or 64. Blocks of 2 to 8 columns cost more than blocks of 16 in common BLAS libraries."""
    return min(s, 16 if rank <= 64 else 32 if rank <= 256 else 64)


def expected_dimension(rank: int, block: int, tol: float) -> float:
    """Size of the Krylov space that spectra with some decay need; a guess that only decides whether to try."""
    return 1.5 * rank + block * (2 + 0.5 * max(0.0, -math.log10(tol)))


def gram_flops(s: int, l: int) -> float:
    """Of the upper blocks of a Gram."""
    return 2.0 * s * s * l * (0.5625 if s >= 256 else 1.0)


def exact_gram_flops(s: int, l: int, rank: int) -> float:
    """Gram, eigenvectors (9 s³) and the other factor."""
    return gram_flops(s, l) + 9.0 * s**3 + 2.0 * s * l * rank


def svd_flops(s: int, l: int) -> float:
    """Tall QR, then a square divide-and-conquer SVD, then the product (Golub and Van Loan's counts, rounded)."""
    return 4.0 * s * s * l + 22.0 * s**3


def subspace_flops(s: int, l: int, rank: int, passes: int) -> float:
    """Products, orthogonalisation, Rayleigh-Ritz."""
    width = min(s, rank + PROBES)
    return passes * (4.0 * s * l * width + (4.0 * s + 4.0 * l) * width**2)


def krylov_flops(s: int, l: int, block: int, steps: int) -> float:
    """Products, one full orthogonalisation, the projected matrix, its eigenproblems."""
    d = block * steps
    return 2.0 * s * l * block * (2 * steps + 1) + 2.0 * s * d**2 + 6.0 * l * d * block + 22.0 * d**3


def _certificate_cost(speed: Rates, s: int, l: int, certify: str) -> tuple[float, float]:
    """(flops, seconds) that a certificate adds to an algorithm that does not see the whole spectrum."""
    if certify == "spectral":
        return 4.0 * LANCZOS_STEPS * s * l, 2 * LANCZOS_STEPS * speed.product(s, l, 1)
    if certify == "optimum":
        return gram_flops(s, l) + 4.0 * s**3 / 3, speed.gram(s, l) + speed.eigvalsh(s)
    return 0.0, 0.0


def _residual(speed: Rates, s: int, l: int, rank: int) -> float:
    return speed.product(s, l, rank)


def _rate(points: Mapping[int, float], at: int) -> float:
    """Between two sizes by a power law, outside them the nearest figure."""
    return _between(points, min(max(at, min(points)), max(points)))


def _time(points: Mapping[int, float], at: int) -> float:
    """Between two sizes by a power law, above the largest by its cube, below the smallest the smallest's."""
    top = max(points)
    return points[top] * (at / top) ** 3 if at > top else _between(points, max(at, min(points)))


def _between(points: Mapping[int, float], at: int) -> float:
    low = max(k for k in points if k <= at)
    high = min(k for k in points if k >= at)
    return points[low] if low == high else points[low] * (points[high] / points[low]) ** (math.log(at / low) / math.log(high / low))


@cache
def _table() -> dict[str, Any]:
    return json.loads(files("eckart.linalg").joinpath("thresholds.json").read_text(encoding="utf-8"))
