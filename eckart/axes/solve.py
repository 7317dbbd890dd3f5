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
    """What a rank of this bundle stores, with the biases that are added where its layers have none; and its place in the model."""
    base = recipe.form.cost(bundle)
    added = sum(s.shape[0] for s in bundle.sites if s.bias is None) if adds_bias(recipe) else 0
    first = bundle.sites[0]
    return replace(base, fixed=base.fixed + added, role=base.role or first.role, block=first.block)


def adds_bias(recipe: Recipe) -> bool:
    """Whether the mean of the output is repaired, for which every layer needs a bias."""
    return "bias" in recipe.metric.takes or (recipe.refine is not None and "bias" in recipe.refine.takes)


@dataclass(frozen=True)
class Spectrum:
    """All singular values of the weighted matrix of a bundle, and the value of each rank."""

    values: Tensor
    curve: tuple[float, ...]
    parts: Parts | None


def spectrum(
    recipe: Recipe, bundle: Bundle, read: Read, stats: StatsView, *, cap: int, algorithm: str, seed: int, device: str = "cpu"
) -> Spectrum:
    """Wave one: factorise once, exactly; `parts` holds the leading `cap` triples for the cut that follows.

    The algorithm must be one that knows the whole spectrum ("gram" or "full"): an allocation over a partial one would be blind
    to its tail.
    """
    if recipe.form.solves:  # a form that is no product of two factors has a spectrum of its own
        values = recipe.form.spectrum(bundle, read, stats)
        return Spectrum(values, tuple(recipe.score.curve(bundle, values, stats)), None)
    op = recipe.source.operator(bundle, read, stats)
    found = _factorise(recipe, op, bundle, stats, min(op.shape), algorithm, seed, device)
    parts = recipe.filter.split(found, recipe.filter.cap(cap, min(op.shape)))[0]
    return Spectrum(found.spectrum, tuple(recipe.score.curve(bundle, found.spectrum, stats)), parts)


def _factorise(recipe: Recipe, op: Tensor, bundle: Bundle, stats: StatsView, cap: int, algorithm: str, seed: int, device: str) -> Parts:
    """The factorisation on that device, its result in the memory of the host."""
    found = recipe.factor.factorise(_finite(op.to(device), bundle), recipe.metric.sides(bundle, stats), cap, algorithm, seed)
    return replace(found, left=found.left.cpu(), right=found.right.cpu(), spectrum=found.spectrum.cpu())


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
    recipe: Recipe, bundle: Bundle, read: Read, read_bias: ReadBias, stats: StatsView, *, rank: int, algorithm: str = "auto", seed: int = 0, parts: Parts | None = None, device: str = "cpu",
) -> Edits:  # fmt: skip
    """What a recipe does to one bundle at one rank.

    Args:
        recipe: the choices.
        bundle: the sites that are solved together.
        read: site -> W (out, in) as stored, on the CPU.
        read_bias: key -> tensor, on the CPU.
        stats: the statistics that the recipe needs.
        rank: triples kept, at least 1.
        algorithm: as `linalg.svd` takes it.
        seed: seed of this job.
        parts: factorisation from `spectrum`, to be cut instead of computed again.
        device: where a matrix is factored; all else is done on the CPU.

    Returns:
        `Edits`: new tensors, dropped ones with the reason, the config patch, and a record (rank, loss, certificate).

    Raises:
        Refused: a weight that is not finite, or a statistic that is missing.
    """
    full = recipe.form.cost(bundle).full
    if not 1 <= rank <= full:
        raise Refused(f"{bundle.name}: rank {rank} is outside 1..{full}, its shape being {bundle.shape}.")
    if recipe.form.solves:
        return recipe.form.solve(bundle, read, read_bias, stats, rank=rank, seed=seed)

    refits = recipe.refine is not None and recipe.refine.refits

    def once(op: Any, known: Parts | None = None) -> Edits:
        cap = full if recipe.form.uses_rest else recipe.filter.cap(rank, full)
        found: Parts = known or _factorise(recipe, op, bundle, stats, cap, algorithm, seed, device)
        kept, rest = recipe.filter.split(found, rank)
        kept = _mean_kept(kept, op, bundle, recipe.metric.repair(bundle, stats), read_bias)
        refitted: dict[str, Any] = {}
        if refits:
            kept, refitted = recipe.refine.refit(kept, op, bundle, read_bias, stats)
        edits = recipe.form.build(kept, rest, bundle, read_bias, seed)
        record = {"rank": rank, **_losses(found, rank, full), **thin(found.spectrum), "certificate": dict(found.certificate)}
        return replace(edits, record=record | ({"refit": refitted} if refitted else {}))

    op = recipe.source.operator(bundle, read, stats)
    edits = once(op, parts)
    return edits if recipe.refine is None or refits else recipe.refine(edits, bundle, read, stats, once)


def _mean_kept(kept: Parts, op: Tensor, bundle: Bundle, means: tuple[Tensor, ...] | None, read_bias: ReadBias) -> Parts:
    """With biases under which each site's mean output is what it was."""
    if means is None:
        return kept
    biases: list[Tensor | None] = []
    for (left, right, weight), mean, site in zip(by_site(kept, op, bundle), means, bundle.sites, strict=True):
        lost = weight.to(mean.dtype) @ mean - left.to(mean.dtype) @ (right.to(mean.dtype) @ mean)
        biases.append(lost + read_bias(site.bias).to(mean.dtype) if site.bias else lost)
    return replace(kept, bias=tuple(biases))


def by_site(parts: Parts, op: Tensor, bundle: Bundle) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(left, right, W) of each site: views of the stacked ones."""
    count = len(bundle.sites)
    if bundle.shares == "out":
        sizes = [s.shape[1] for s in bundle.sites]
        return list(zip([parts.left] * count, parts.right.split(sizes, dim=1), op.split(sizes, dim=1), strict=True))
    sizes = [s.shape[0] for s in bundle.sites]
    return list(zip(parts.left.split(sizes), [parts.right] * count, op.split(sizes), strict=True))


def _losses(parts: Parts, rank: int, full: int) -> dict[str, float]:
    """Squared loss left at this rank, and its root relative to the whole, in the metric of the recipe."""
    total = float(parts.certificate["total"])
    lost = float(parts.spectrum[rank:].square().sum()) if len(parts.spectrum) == full else float(parts.certificate["error"]) ** 2
    return {"loss": lost, "relative_error": (lost / total) ** 0.5 if total > 0 else 0.0}
