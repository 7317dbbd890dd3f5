"""Directions through a loss surface, normalised so that slices of different models compare, and the surface along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import UsageError
from ..progress import track
from ..seeds import generator
from .objective import Objective

How = Literal["none", "weight", "filter", "layer", "model"]
NORMS = ("none", "weight", "filter", "layer", "model")
Direction = Mapping[str, Tensor]


def random_direction(weights: Direction, seed: int, *names: str) -> dict[str, Tensor]:
    """Independent standard normal numbers in the shape of every tensor, drawn on the CPU by the tensor's name."""
    return {
        k: torch.randn(w.shape, generator=generator(seed, "direction", *names, k), dtype=torch.float32).to(w) for k, w in weights.items()
    }


def normalise(
    direction: Direction, weights: Direction, how: How = "filter", *, turned: Sequence[str] = (), vectors: bool = False
) -> dict[str, Tensor]:
    """A direction scaled to the size of the weights (Li et al., arXiv:1712.09913).

    - "filter": every filter of the direction gets the norm of that filter of the weights; a filter is what makes one output.
    - "layer": every tensor gets the norm of that tensor. "model": the whole direction gets the norm of all weights, by one factor.
    - "weight": every number is multiplied by its weight. "none": as it is.

    Args:
        direction: by name, as the weights.
        weights: the point.
        how: which of these.
        turned: names of tensors stored (in, out), whose filters are columns.
        vectors: whether biases and norm scales move too; by default they stay, as in the paper's own plots.

    Returns:
        A new direction; zero where the weights are zero.

    Raises:
        UsageError: an unknown `how`.

    Example:
        >>> w = {"w": torch.tensor([[3.0, 4.0], [0.0, 1.0]])}
        >>> normalise({"w": torch.tensor([[0.0, 2.0], [5.0, 0.0]])}, w)["w"].tolist()
        [[0.0, 5.0], [1.0, 0.0]]
    """
    if how not in NORMS:
        raise UsageError(f"normalise: expected one of {', '.join(NORMS)}, found {how!r}.")
    moving = {k: d if vectors or d.ndim > 1 else torch.zeros_like(d) for k, d in direction.items()}
    if how == "none":
        return moving
    if how == "weight":
        return {k: d * weights[k] for k, d in moving.items()}
    if how == "model":
        size = [_norm(torch.stack([_norm(t) for t in side])) for side in (moving.values(), [weights[k] for k in moving])]
        factor = float(size[1] / size[0]) if size[0] > 0 else 0.0
        return {k: d * factor for k, d in moving.items()}
    out: dict[str, Tensor] = {}
    for k, d in moving.items():
        kept = None if how == "layer" or d.ndim < 2 else 1 if k in turned else 0
        have, want = _norm(d, kept), _norm(weights[k], kept)
        out[k] = d * torch.where(have > 0, want / have, 0.0).to(d.dtype)
    return out


def _norm(x: Tensor, kept: int | None = None) -> Tensor:
    """Norm over all dimensions but `kept`, float64, in a shape that broadcasts."""
    square = x.to(torch.float64).square()
    return square.sum().sqrt() if kept is None else square.sum([d for d in range(x.ndim) if d != kept], keepdim=True).sqrt()


def length(direction: Direction) -> float:
    """Euclidean norm of a whole direction."""
    return float(sum(d.to(torch.float64).square().sum() for d in direction.values())) ** 0.5


def surface(objective: Objective, axes: Sequence[Direction], at: Sequence[Sequence[float]], label: str = "loss surface") -> Tensor:
    """L(w + sum of steps times axes) on a grid; the model's own weights are w.

    Args:
        objective: the loss.
        axes: one or two directions.
        at: the steps along each of them.
        label: of the progress bar.

    Returns:
        The losses, one dimension per axis, float64; NaN or infinite where the loss is.

    Raises:
        UsageError: not as many lists of steps as axes.

    Example:
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> L = Objective(net, [torch.ones(1, 1)], loss=lambda y, x: y.square().sum())
        >>> step = {"weight": torch.ones(1, 1)}
        >>> w = net.weight.item()
        >>> [abs(v - (w + t) ** 2) < 1e-6 for t, v in zip((0.0, 1.0), surface(L, [step], [(0.0, 1.0)]).tolist())]
        [True, True]
    """
    if not 1 <= len(axes) == len(at):
        raise UsageError(f"surface: expected a list of steps for each axis, found {len(at)} for {len(axes)}.")
    base = objective.state()
    grids = torch.cartesian_prod(*(torch.tensor(list(a), dtype=torch.float64) for a in at)).reshape(-1, len(axes))
    found: list[float] = []
    for steps in track(grids.tolist(), label):
        moved = dict(base)
        for step, axis in zip(steps, axes, strict=True):
            for k, d in axis.items():
                moved[k] = moved[k] + step * d.to(moved[k])
        found.append(objective.mean(moved))
    return torch.tensor(found, dtype=torch.float64).reshape([len(a) for a in at])
