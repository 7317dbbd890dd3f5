"""The one place where the axes of a recipe meet `linalg`. Pure: equal arguments give equal bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import Refused
from ..spectra.numbers import thin
from .protocols import Bundle, Cost, Edits, Parts, Read, StatsView
from .recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

ReadBias = Callable[[str], "Tensor"]


def cost(recipe: Recipe, bundle: Bundle) -> Cost:
    """What a rank of this bundle stores, with the bias that the metric adds where the layer has none."""
    base = recipe.form.cost(bundle)
    adds = adds_bias(recipe) and all(s.bias is None for s in bundle.sites)
    return replace(base, fixed=base.fixed + bundle.shape[0]) if adds else base


def adds_bias(recipe: Recipe) -> bool:
    """Whether the metric repairs the mean of the output, for which every layer needs a bias."""
    return "bias" in recipe.metric.takes


@dataclass(frozen=True)
class Spectrum:
    """All singular values of the weighted matrix of a bundle, and the value of each rank."""

    values: Tensor
    curve: tuple[float, ...]
    parts: Parts


def spectrum(recipe: Recipe, bundle: Bundle, read: Read, stats: StatsView, *, cap: int, algorithm: str, seed: int) -> Spectrum:
    """Wave one: factorise once, exactly; `parts` holds the leading `cap` triples for the cut that follows.

    The algorithm must be one that knows the whole spectrum ("gram" or "full"): an allocation over a partial one would be blind
    to its tail.
    """
    op = _finite(recipe.source.operator(bundle, read, stats), bundle)
    found = recipe.factor.factorise(op, recipe.metric.sides(bundle, stats), min(op.shape), algorithm, seed)
    parts = recipe.filter.split(found, recipe.filter.cap(cap, min(op.shape)))[0]
    return Spectrum(found.spectrum, tuple(recipe.score.curve(bundle, found.spectrum, stats)), parts)


def _finite(op: Tensor, bundle: Bundle) -> Tensor:
    import torch

    bad = int((~torch.isfinite(op)).sum())
    if bad:
        keys = ", ".join(k for s in bundle.sites for k in s.tensors)
        raise Refused(
            f"{keys}: {bad} of {op.numel()} values are NaN or Inf; nothing can be factorised. Repair or re-download the checkpoint."
        )
    return op


def solve(
    recipe: Recipe, bundle: Bundle, read: Read, read_bias: ReadBias, stats: StatsView, *, rank: int, algorithm: str = "auto", seed: int = 0, parts: Parts | None = None
) -> Edits:  # fmt: skip
    """What a recipe does to one bundle at one rank.

    Args:
        recipe: the choices.
        bundle: the sites that are solved together.
        read: site -> W (out, in) as stored.
        read_bias: key -> tensor.
        stats: the statistics that the recipe needs.
        rank: triples kept, at least 1.
        algorithm: as `linalg.svd` takes it.
        seed: seed of this job.
        parts: factorisation from `spectrum`, to be cut instead of computed again.

    Returns:
        `Edits`: new tensors, dropped ones with the reason, the config patch, and a record (rank, loss, certificate).

    Raises:
        Refused: a weight that is not finite, or a statistic that is missing.
    """
    full = min(bundle.shape)
    if not 1 <= rank <= full:
        raise Refused(f"{bundle.name}: rank {rank} is outside 1..{full}, its shape being {bundle.shape}.")

    def once(op: Any, known: Parts | None = None) -> Edits:
        cap = full if recipe.form.uses_rest else recipe.filter.cap(rank, full)
        found: Parts = known or recipe.factor.factorise(_finite(op, bundle), recipe.metric.sides(bundle, stats), cap, algorithm, seed)
        kept, rest = recipe.filter.split(found, rank)
        mean = recipe.metric.repair(bundle, stats)
        if mean is not None:
            lost = op.to(mean.dtype) @ mean - kept.left.to(mean.dtype) @ (kept.right.to(mean.dtype) @ mean)
            old = bundle.site.bias
            kept = replace(kept, bias=lost + (read_bias(old).to(mean.dtype) if old else 0))
        edits = recipe.form.build(kept, rest, bundle, read_bias, seed)
        return replace(
            edits, record={"rank": rank, **_losses(found, rank, full), **thin(found.spectrum), "certificate": dict(found.certificate)}
        )

    op = recipe.source.operator(bundle, read, stats)
    edits = once(op, parts)
    return recipe.refine(edits, bundle, read, stats, once) if recipe.refine else edits


def _losses(parts: Parts, rank: int, full: int) -> dict[str, float]:
    """Squared loss left at this rank, and its root relative to the whole, in the metric of the recipe."""
    total = float(parts.certificate["total"])
    lost = float(parts.spectrum[rank:].square().sum()) if len(parts.spectrum) == full else float(parts.certificate["error"]) ** 2
    return {"loss": lost, "relative_error": (lost / total) ** 0.5 if total > 0 else 0.0}
