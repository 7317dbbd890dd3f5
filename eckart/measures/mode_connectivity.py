"""Linear mode connectivity: the loss barrier between two models, and how much of it is a matter of which unit is which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import Refused, UsageError
from ._live import objective, reasons, settings
from .base import Found, ModelView, OfModel, Record

if TYPE_CHECKING:
    from torch import Tensor

    from ..catalogue.symmetries import Groups
    from ..stats.objective import Objective

TOKENS = 4096
ROWS = 2  # texts of a batch: the scatter over batches is the error of the barrier
POINTS = 11  # of the path, ends included
PROBE = 64  # tokens on which a candidate symmetry is tried
EXACT = 500_000_000  # parameters up to which that is done in float64
# Relative change of the output that still counts as none: rounding of reordered sums. Norms of transformers work in float32 whatever the rest.
TIGHT = {"float64": 1e-5, "float32": 3e-4}
THRESHOLD = 0.1  # of the largest singular value, above which singular vectors are compared


def compute(view: ModelView) -> Iterable[Record]:
    """A record of the path between the two models, and one per matrix on the alignment of its singular vectors."""
    return reasons(_records(view), MEASURE.missing)


def _records(view: ModelView) -> Iterator[Record]:
    from ..spectra.matching import match

    if view.other is None:
        raise Refused("there is no second model to connect to: give other=")
    loss = objective(view, TOKENS, rows=ROWS)
    a, b = loss.state(), loss.state(view.other)
    _comparable(a, b)
    groups, rejected = symmetries(view)
    try:
        found = match(a, b, groups, seed=view.seed) if groups else None
    except UsageError as error:  # no assignment solver: the path itself needs none
        found, rejected = None, [str(error)]
    matched = found.tensors if found else b
    plain, weights = path(loss, a, b, "loss between the models"), loss.weights
    after = path(loss, a, matched, "loss after matching", ends=(plain[0], plain[-1])) if found and any(found.moved.values()) else plain
    height, error = barrier(plain, weights)
    lower, after_error = barrier(after, weights)
    value: dict[str, Any] = {
        "barrier": height,
        "barrier_matched": lower,
        "loss": float((plain[0] * weights).sum() / weights.sum()),
        "loss_other": float((plain[-1] * weights).sum() / weights.sum()),
        "units_moved": sum(found.moved.values()) / len(found.moved) if found else 0.0,
        "distance": found.distance[0] if found else None,
        "distance_matched": found.distance[1] if found else None,
        "at": _steps(),
        "path": _means(plain, weights),
        "path_matched": _means(after, weights),
    }
    notes = []
    if not found:
        notes.append("nothing was matched: " + ("; ".join(rejected) or "no units that may change places were found"))
    elif rejected:
        notes.append(f"not symmetries of this model, so left alone: {', '.join(rejected)}")
    if any(k.endswith("running_mean") for k in a):
        notes.append("running statistics of batch norm are interpolated, not measured anew, which raises the barrier")
    chosen = {**settings(loss), "groups": len(groups), "sweeps": found.sweeps if found else 0, "seed": view.seed}
    yield MEASURE.record("", Found(value, {"barrier": error, "barrier_matched": after_error}, "; ".join(notes), settings=chosen))
    yield from _alignments(view, a, b, matched)


def barrier(losses: Tensor, weights: Tensor) -> tuple[float, float | None]:
    """Largest excess of a path over the straight line between its ends, and its standard error over batches at that point.

    Args:
        losses: (points, batches) at evenly spaced points, ends included.
        weights: (batches,) of each batch.

    Returns:
        (at least 0, error or None for a single batch).

    Example:
        >>> import torch
        >>> barrier(torch.tensor([[1.0], [4.0], [3.0]]).double(), torch.ones(1).double())
        (2.0, None)
    """
    import torch

    t = torch.linspace(0, 1, len(losses), dtype=losses.dtype)[:, None]
    excess = losses - (1 - t) * losses[0] - t * losses[-1]
    share = weights / weights.sum()
    means = (excess * share).sum(1)
    at = int(means.argmax())
    count = len(weights)
    scatter = (share.square() * (excess[at] - means[at]).square()).sum() * count / max(1, count - 1)
    return float(means[at]), float(scatter.sqrt()) if count > 1 else None


def path(
    loss: Objective, a: Mapping[str, Tensor], b: Mapping[str, Tensor], label: str, ends: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(points, batches) losses at (1 - t) a + t b."""
    import torch

    from ..progress import track

    out = []
    for t in track(_steps(), label):
        if ends is not None and t in (0.0, 1.0):
            out.append(ends[int(t)])
        else:
            out.append(loss.losses({k: torch.lerp(a[k], b[k], t) for k in a}))
    return torch.stack(out)


def symmetries(view: ModelView) -> tuple[Groups, list[str]]:
    """(groups of units whose permutation leaves the second model's output as it is, names of candidates for which it does not).

    Tried on the model itself with random permutations: all at once, and one by one when that fails.
    """
    import torch

    from ..catalogue.symmetries import candidates

    found = candidates(view.model, view.catalogue, view.config)
    size = sum(p.numel() for p in view.model.parameters())
    loss = objective(view, PROBE, torch.float64 if size <= EXACT else torch.float32)
    state = loss.state(view.other)
    plain = _output(loss, state)
    if plain is None:
        return {}, ["the model's output is no tensor, so symmetries cannot be tried"]
    limit = TIGHT[str(loss.compute).removeprefix("torch.")]

    def holds(names: Iterable[str]) -> bool:
        moved = dict(state)
        for name in names:
            moved |= _shuffled(moved, found[name], view.seed, name)
        changed = _output(loss, moved)
        return changed is not None and float((changed - plain).norm()) <= limit * float(plain.norm())

    if holds(found):
        return found, []
    good = {name: members for name, members in found.items() if holds([name])}
    return good, [name for name in found if name not in good]


def _shuffled(state: Mapping[str, Tensor], members: Any, seed: int, name: str) -> dict[str, Tensor]:
    """The tensors of a group with its units, and the parts of its units, in a random order."""
    import torch

    from ..seeds import generator
    from ..spectra.matching import permuted

    source = generator(seed, "symmetry", name)
    n = members[0][2].shape[0]
    r = next((p.shape[1] for _, _, p in members if p.ndim == 3), 0)
    parts = torch.stack([torch.randperm(r, generator=source) for _ in range(n)]) if r else None
    return permuted(state, members, torch.randperm(n, generator=source), parts)


def _output(loss: Objective, state: Mapping[str, Tensor]) -> Tensor | None:
    import torch

    with torch.no_grad():
        output = loss.term(state, 0)[1]
    for found in (output, getattr(output, "logits", None), getattr(output, "last_hidden_state", None)):
        if isinstance(found, torch.Tensor):
            return found
    return None


def _alignments(view: ModelView, a: Mapping[str, Tensor], b: Mapping[str, Tensor], matched: Mapping[str, Tensor]) -> Iterator[Record]:
    """Agreement of singular vectors, before and after, for each matrix of the run."""
    from ..catalogue.parts import live_key
    from ..linalg import svd
    from ..progress import track
    from ..spectra.subspaces import singular_alignment

    for site in track(view.sites, "comparing singular vectors"):
        key = live_key(site)
        if key not in a:
            yield MEASURE.missing(site.name, "not a real parameter of the live model")
            continue
        flat = [t[key].T if site.view == "transposed" and t[key].ndim == 2 else t[key].reshape(site.shape) for t in (a, b, matched)]
        if not all(bool(w.any()) for w in flat):
            yield MEASURE.missing(site.name, "the matrix is zero")
            continue
        one, two = svd(flat[0], name=site.name), svd(flat[1], name=site.name)
        before = singular_alignment(one, two, THRESHOLD)
        same = matched[key] is b[key]
        after = before if same else singular_alignment(one, svd(flat[2], name=site.name), THRESHOLD)
        cosines = [float((flat[0] * w).double().sum() / (flat[0].double().norm() * w.double().norm())) for w in flat[1:]]
        value = {"alignment": before, "alignment_matched": after, "cosine": cosines[0], "cosine_matched": cosines[1]}
        yield MEASURE.record(site.name, Found(value))


def _comparable(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    import torch

    for name in sorted({*a} | {*b}):
        if name not in a or name not in b:
            raise Refused(f"{name} is in one of the two models only: there is no line between them")
        if a[name].shape != b[name].shape:
            raise Refused(f"{name} has shapes {tuple(a[name].shape)} and {tuple(b[name].shape)}: there is no line between the models")
        if not bool(torch.isfinite(a[name]).all() & torch.isfinite(b[name]).all()):
            raise Refused(f"{name} holds NaN or Inf")


def _steps() -> list[float]:
    return [i / (POINTS - 1) for i in range(POINTS)]


def _means(losses: Tensor, weights: Tensor) -> list[float]:
    return ((losses * weights).sum(1) / weights.sum()).tolist()


MEASURE = OfModel(
    name="mode_connectivity",
    title="Linear mode connectivity before and after weight matching",
    paper="arXiv:2402.04051",
    estimator="largest excess of L((1 - t) a + t b) over the line between its ends; units matched by assignment on the weights, coordinate ascent",
    compute=compute,
    settings={"tokens": TOKENS, "points": POINTS, "threshold": THRESHOLD},
    note="matching finds a local optimum, so the barrier after it is an upper figure; only units whose permutation was seen to leave the output "
    "unchanged are moved. Alignment: cosine of the polar factors of the leading singular triples",
    fidelity="variant",
    differs="11 points of the path instead of 25; the alignment score's normalisation is ours, the paper's could not be checked; no straight-through "
    "estimator",
)
