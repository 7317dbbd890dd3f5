"""Weight matching: permute the units of one network until its weights are nearest to another's (git re-basin, arXiv:2209.04836).

A group of units is a list of members, each `(tensor, dimension, positions)`: which positions along a dimension belong to which unit.
`positions` (n, k) moves n units of k positions; `positions` (n, r, k) also lets the r parts of a unit change places among themselves, which
query heads do inside the group that shares a key head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Refused, UsageError
from ..progress import track
from ..seeds import generator

Member = tuple[str, int, Tensor]
Groups = Mapping[str, Sequence[Member]]


@dataclass(frozen=True, eq=False)
class Matched:
    """The outcome of `match`.

    Args:
        tensors: those of the second network, its units in the order of the first one; tensors of no group are as they were.
        moved: for each group, the share of its units (of their parts, where they have some) that changed places.
        sweeps: over all groups, the last one without a change.
        settled: whether the last sweep changed nothing.
        distance: (before, after) Frobenius distance of all tensors, relative to the first network's norm.
    """

    tensors: dict[str, Tensor]
    moved: dict[str, float]
    sweeps: int
    settled: bool
    distance: tuple[float, float]


@torch.no_grad()
def match(a: Mapping[str, Tensor], b: Mapping[str, Tensor], groups: Groups, *, sweeps: int = 100, seed: int = 0) -> Matched:
    """Permute the units of `b`, group by group, so that the inner product with `a` grows; each step is an assignment problem solved exactly.

    Coordinate ascent: every step is optimal given the others, the whole is a local optimum that depends on the order, hence the seed. It sees
    weights only, no data, and leaves the function of the network as it was if the groups are symmetries of it.

    Args:
        a: tensors of the first network.
        b: of the second one, the same names and shapes.
        groups: units that may change places.
        sweeps: most passes over all groups.
        seed: of the order of the groups in each pass.

    Returns:
        `Matched`.

    Raises:
        UsageError: scipy is not installed.
        Refused: a tensor of a group is missing, of another shape, or not finite.

    Example:
        >>> w, v = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> hidden = torch.arange(2)[:, None]
        >>> found = match({"w": w, "v": v}, {"w": w.flip(0), "v": v.flip(1)}, {"hidden": [("w", 0, hidden), ("v", 1, hidden)]})
        >>> found.tensors["v"].tolist(), found.distance[1]
        ([[3.0, 4.0]], 0.0)
    """
    assign = assignment()
    _check(a, b, groups)
    now = dict(b)
    labels = {name: _labels(members) for name, members in groups.items()}
    names, source = sorted(groups), generator(seed, "weight matching")
    before, done, settled = _distance(a, now), 0, not groups
    for _ in track(range(sweeps if groups else 0), "matching weights"):
        done, settled = done + 1, True
        for at in torch.randperm(len(names), generator=source).tolist():
            name = names[at]
            order, parts, gain = _best(a, now, groups[name], assign)
            if gain:
                now |= permuted(now, groups[name], order, parts)
                labels[name] = labels[name][order] if parts is None else labels[name][order].gather(1, parts)
                settled = False
        if settled:
            break
    moved = {n: float((labels[n] != _labels(groups[n])).double().mean()) for n in names}
    return Matched(now, moved, done, settled, (before, _distance(a, now)))


def permuted(tensors: Mapping[str, Tensor], members: Sequence[Member], order: Tensor, parts: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a group with its units in another order: unit i becomes what unit order[i] was.

    Args:
        tensors: by name; only those of the group are returned.
        members: the group.
        order: (n,) permutation.
        parts: (n, r) for members with parts: part s of the new unit i is what part parts[i, s] of unit order[i] was.
    """
    out: dict[str, Tensor] = {}
    for name, dim, positions in members:
        tensor = out.get(name, tensors[name])
        source = positions[order.to(positions.device)]
        if positions.ndim == 3 and parts is not None:
            source = source.gather(1, parts.to(source.device)[:, :, None].expand(source.shape))
        index = torch.arange(tensor.shape[dim])
        index[positions.reshape(-1)] = source.reshape(-1)
        out[name] = tensor.index_select(dim, index.to(tensor.device))
    return out


def _best(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], members: Sequence[Member], assign: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | None, bool]:
    """(order, parts, whether they are better than what is there) of one group."""
    n, r = _units(members), _parts(members)
    score = torch.zeros(n, n, dtype=torch.float64)
    inner = torch.zeros(n * r, n * r, dtype=torch.float64) if r else None
    for name, dim, positions in members:
        rows = n if positions.ndim == 2 else n * r
        x, y = (_rows(t[name], dim, positions, rows) for t in (a, b))
        target = score if positions.ndim == 2 else inner
        assert target is not None
        target += (x @ y.T).cpu()
    held = score.diagonal().sum()
    choice: Tensor | None = None
    if inner is not None:
        blocks = inner.reshape(n, r, n, r).transpose(1, 2)
        held = held + inner.diagonal().sum()
        choice = torch.empty(n, n, r, dtype=torch.long)
        for i in range(n):
            for j in range(n):
                choice[i, j] = assign(blocks[i, j])
                score[i, j] += blocks[i, j].gather(1, choice[i, j][:, None]).sum()
    order = assign(score)
    reached = score.gather(1, order[:, None]).sum()
    parts = None if choice is None else choice[torch.arange(n), order]
    scale = score.abs().max() if n else 0.0
    return order, parts, bool(reached - held > 1e-12 * scale * max(n, 1))


def _rows(tensor: Tensor, dim: int, positions: Tensor, rows: int) -> Tensor:
    moved = tensor.movedim(dim, 0)
    return moved[positions.reshape(-1).to(moved.device)].reshape(rows, -1).to(torch.float64)


def _units(members: Sequence[Member]) -> int:
    return members[0][2].shape[0]


def _parts(members: Sequence[Member]) -> int:
    return next((p.shape[1] for _, _, p in members if p.ndim == 3), 0)


def _labels(members: Sequence[Member]) -> Tensor:
    n, r = _units(members), max(_parts(members), 1)
    return torch.arange(n * r).reshape(n, r)


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    gap = sum(float((a[k].to(torch.float64) - b[k].to(torch.float64)).square().sum()) for k in a if k in b)
    norm = sum(float(a[k].to(torch.float64).square().sum()) for k in a if k in b)
    return math.sqrt(gap / norm) if norm > 0 else 0.0


def _check(a: Mapping[str, Tensor], b: Mapping[str, Tensor], groups: Groups) -> None:
    for group, members in groups.items():
        for name, dim, positions in members:
            if name not in a or name not in b:
                raise Refused(
                    f"weight matching: {group} moves {name}, which {'the first' if name not in a else 'the second'} network lacks."
                )
            if a[name].shape != b[name].shape:
                raise Refused(f"weight matching: {name} has shapes {tuple(a[name].shape)} and {tuple(b[name].shape)}.")
            if len(positions) and int(positions.max()) >= a[name].shape[dim]:
                raise Refused(
                    f"weight matching: {group} names position {int(positions.max())} of dimension {dim} of {name}, which has fewer."
                )
            if not bool(torch.isfinite(a[name]).all() & torch.isfinite(b[name]).all()):
                raise Refused(f"weight matching: {name} holds NaN or Inf.")


def assignment() -> Callable[[Tensor], Tensor]:
    """(n, n) gains -> (n,) the column of each row, of largest sum."""
    try:
        from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise UsageError("assignment problems are solved by scipy, which is not installed: pip install 'eckart[match]'.") from error
    return lambda gains: torch.from_numpy(linear_sum_assignment(gains.numpy(), maximize=True)[1]).long()
