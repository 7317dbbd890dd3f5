"""The dense SVD, always on the tall side (LAPACK takes 2.5 times as long on a wide matrix), with a ladder of drivers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import Refused
from .finish import Draft
from .gram import pick
from .operator import Operator
from .rank import Target

# What is tried in turn: (driver, or None for the only one; where: as it is, in float64, or on the host in float64).
# cuSOLVER's Jacobi driver leaves errors of 3e-4 in float32 (1024x4096 on an H100); in float64 it takes 1.6 times as long.
LADDERS: dict[str, tuple[tuple[str | None, str], ...]] = {
    "cpu": ((None, ""), (None, "host")),
    "cuda": (("gesvdj", "wide"), ("gesvd", "wide"), (None, "host")),
}


def full(op: Operator, target: Target, *, name: str = "matrix") -> Draft:
    """All triples of A (m, n), m <= n, cut to the target.

    Raises:
        Refused: no driver gave a finite result.
    """
    matrix = op.to_dense()
    u, s, vh, driver = dense_svd(matrix, name)
    squares = s.to(torch.float64).square()
    rank = pick(target, squares)
    following = math.sqrt(float(squares[rank])) if rank < len(squares) else None
    return Draft(
        "full",
        u[:, :rank].clone(),  # a view would keep all of u alive
        s[:rank].to(torch.float64),
        vh[:rank].clone(),
        missed=0.0,
        kind="bound",
        spectrum=squares,
        following=following,
        passes=1,
        projected=False,
        driver=driver,
    )


def dense_svd(matrix: Tensor, name: str = "matrix") -> tuple[Tensor, Tensor, Tensor, str]:
    """(U, S, Vh, driver) by the first driver that converges to something finite; those that failed are named before it."""
    failed: list[str] = []
    for driver, where in LADDERS.get(matrix.device.type, LADDERS["cpu"]):
        label = "cpu-float64" if where == "host" else driver or "gesdd"
        work = matrix if not where else matrix.to("cpu" if where == "host" else matrix.device, torch.float64)
        try:
            if work.shape[0] < work.shape[1]:
                v, s, uh = torch.linalg.svd(work.T.contiguous(), full_matrices=False, driver=driver)
                u, vh = uh.T, v.T
            else:
                u, s, vh = torch.linalg.svd(work, full_matrices=False, driver=driver)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            failed.append(label)
            continue
        if bool(torch.isfinite(s).all() & torch.isfinite(u).all() & torch.isfinite(vh).all()):
            to = {"device": matrix.device, "dtype": matrix.dtype}
            return u.to(**to), s.to(**to), vh.to(**to), ", ".join([*(f"{d} failed" for d in failed), label])
        failed.append(label)
    raise Refused(f"{name}: no SVD driver converged ({', '.join(failed)}). Look for entries of extreme size; scaling the matrix may help.")
