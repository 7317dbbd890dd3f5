"""How much memory a factorisation takes at most, from its shape alone: what a plan promises before the first byte is read.

The factors below are upper figures of the peak resident memory that `bench/memory.py` measures; they are not tight.
"""

from __future__ import annotations

SLACK = 24 << 20  # bytes: buffers of products, whose size does not depend on the shape
EIGH = 5  # matrices that an eigendecomposition holds: input, copy, vectors, and twice its size of workspace
KRYLOV_ROWS = 8  # rows of the two Krylov bases per triple that is wanted ...
KRYLOV_LEAST = 256  # ... and their number for few triples


def peak_bytes(m: int, n: int, rank: int | None, *, method: str = "gram", itemsize: int = 4, into: bool = False, out: bool = False) -> int:
    """Most bytes that `weighted.solve` holds beyond the metrics that it is given.

    Args:
        m, n: shape of W.
        rank: triples; None for all.
        method: as `choose` names it.
        itemsize: bytes per stored value of W.
        into, out: whether there is a full metric on that side.

    Returns:
        Bytes, W as read included.

    Example:
        >>> peak_bytes(4096, 11008, 8, method="krylov", itemsize=2) < 1 << 30
        True
    """
    s, l = min(m, n), max(m, n)
    r = s if rank is None else rank
    read = itemsize * m * n
    factors = 2 * 8 * r * (m + n)
    if not (into or out):
        work = 2 * 4 * m * n if itemsize < 8 else 2 * 8 * m * n
        if method == "krylov":
            rows = min(s, max(KRYLOV_LEAST, KRYLOV_ROWS * r))
            return read + work + factors + 4 * rows * (s + l) + 8 * rows * l + SLACK
        dense = EIGH * 8 * s * s if method == "gram" else 3 * work
        return read + work + dense + factors + SLACK
    sides = [size for size, there in ((n, into), (m, out)) if there]
    held = sum(8 * size * size for size in sides)  # the eigenvectors of the metrics, as long as W is weighed
    rooting = (EIGH - 1) * 8 * max(sides) ** 2
    solving = 4 * 8 * m * n + (EIGH * 8 * s * s if method != "krylov" else 0) + factors
    return read + held + max(rooting, solving) + SLACK
