"""Layer-wise relative change: how far a weight moved, as a share of its size."""

from __future__ import annotations

from .base import Found, OfPair, PairView


def compute(view: PairView) -> Found:
    """Norm ratios, cosine and the share of entries that differ."""
    import torch

    before, after = view.base.weight.double(), view.other.weight.double()
    change = after - before
    norm, moved, size = (float(torch.sqrt(x.square().sum())) for x in (before, change, after))
    if norm == 0:
        return Found(None, valid=False, note="the base weight is zero: nothing to be relative to")
    value = {
        "frobenius": moved / norm,
        "cosine": float((before * after).sum()) / (norm * size) if size > 0 else 0.0,
        "norm_ratio": size / norm,
        "entries": float((change != 0).double().mean()),
    }
    return Found(value, note="the weight did not change" if moved == 0 else "")


MEASURE = OfPair(
    name="relative_change",
    title="Layer-wise relative change",
    paper="arXiv:1902.01996",
    estimator="Frobenius norm of W' - W over that of W; cosine of the two; share of entries that differ as stored",
    compute=compute,
    note="of the weights: a small change may matter much, and a large one little",
    fidelity="idea",
    differs="the paper takes the distance from the initial weights; here it is relative to the base weight, with cosine and changed entries beside it",
)
