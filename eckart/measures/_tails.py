"""What the measures of tails say of a fit."""

from ..spectra.tails import EDGE, Tail
from .base import Found

NO_TAIL = "fewer than two distinct values that are not zero"
ERROR = "the error counts the values as independent and xmin as given"


def found(tail: Tail | None, far: float = EDGE) -> Found:
    """The exponent of a tail, with the reason where it says nothing."""
    if tail is None:
        return Found(None, note=NO_TAIL, valid=False)
    doubt = tail.doubt(far)
    note = doubt or (f"a score of shape, no exponent: Kolmogorov-Smirnov distance {tail.distance:.3f}" if tail.distance > EDGE else "")
    return Found(tail.alpha, tail.error, note, not doubt, fitted(tail))


def fitted(tail: Tail) -> dict[str, float]:
    """What was chosen for a matrix."""
    return {"xmin": tail.xmin, "tail": tail.count, "values": tail.total, "distance": tail.distance}
