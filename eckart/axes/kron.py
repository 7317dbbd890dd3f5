"""A trained sum of Kronecker products beside a layer, and the ranks that a spectrum's knee suggests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .base import AdapterChoice, Choice
from .branch import Material
from .budgets import Allocation, Costs, Curves, Ranks, bounded, one_rank
from .draw import Draw
from .protocols import Budget, Bundle, Cost, Decides

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.action import Action
    from ..nn.branch import Branch as Module


@dataclass(frozen=True)
class Kron(AdapterChoice):
    """y = base(x) + s sum_k (A_k (x) B_k) x, less what the sum begins with; half of each singular value in either factor.

    A rank counts products. A matrix that needs fewer of them than its rank says gets no more than it needs.

    Args:
        base: "subtract" leaves the weight alone, "mutate" takes the initial sum out of it.
        scale: s.
    """

    kind: ClassVar[str] = "kron"
    takes: ClassVar[frozenset[str]] = frozenset({"kept", "kronecker"})
    gives: ClassVar[frozenset[str]] = frozenset({"kron"})
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"penalty.orth", "refresh.refactor", "refresh.allocate", "gradient.project", "roles.protect"}
    )

    base: Literal["subtract", "mutate"] = "subtract"
    scale: float = 1.0

    @property
    def mutates(self) -> bool:
        return self.base == "mutate"

    @property
    def uses_triples(self) -> bool:
        return True

    @property
    def parts(self) -> tuple[str, ...]:
        return ("outer", "inner", "base")

    def width(self, rank: int, full: int) -> int:
        return rank

    def cost(self, bundle: Bundle) -> Cost:
        from ..linalg.kronecker import split_shape

        m, n = bundle.shape
        each = sum(map(prod, split_shape(m, n)))
        return Cost(dense=each * min(m, n) + 1, per_rank=each, full=min(m, n))

    def trainable(self, shape: tuple[int, int], rank: int, roles: Mapping[str, Choice], bias: bool) -> int:
        from ..linalg.kronecker import split_shape, terms

        outer, inner = map(prod, split_shape(*shape))
        sizes = {"outer": outer, "inner": inner}
        return min(rank, terms(*shape)) * sum(sizes[n] for n in self._trained(roles))

    def _trained(self, roles: Mapping[str, Choice]) -> tuple[Literal["outer", "inner"], ...]:
        names: tuple[Literal["outer", "inner"], ...] = ("outer", "inner")
        return tuple(n for n in names if n not in roles or roles[n].kind == "train")

    def module(
        self, action: Action, rank: int, roles: Mapping[str, Choice], *, asked: int, alpha: float, dropout: float = 0.0, bias: bool = True
    ) -> Module:
        from ..linalg.kronecker import split_shape, terms
        from ..nn.kron import Kron as Sum

        m, n = action.out, action.into
        return Sum(action, min(rank, terms(m, n)), split_shape(m, n), self._trained(roles), self.scale, self.base, dropout)

    def begin(self, made: Material, empty: Module, draw: Draw) -> dict[str, Tensor]:
        module: Any = empty
        kept = made.kept
        assert kept is not None
        assert kept.values is not None
        root = (kept.values / self.scale).sqrt()
        out = {"outer": (kept.left * root).T.reshape(module.outer.shape), "inner": (kept.right * root[:, None]).reshape(module.inner.shape)}
        return out | {f"initial_{n}": out[n] for n in module.copied}


@dataclass(frozen=True)
class Elbow(Allocation):
    """Under a budget of energy, each matrix's own rank up to the knee of its spectrum, where that is less than the energy asks for.

    The knee is the singular value farthest below the straight line from the first to the last one; a spectrum that never falls below the line
    has none, and the energy decides alone. Under a budget of rank it is uniform.
    """

    kind: ClassVar[str] = "elbow"
    decides: ClassVar[Decides] = "shape"
    takes: ClassVar[frozenset[str]] = frozenset({"additive"})

    def ranks(self, curves: Curves, costs: Costs, budget: Budget) -> Ranks:
        found: Ranks = {}
        for name, cost in costs.items():
            rank = one_rank(cost, budget, curves.get(name))
            knee = elbow([v**0.5 for v in curves[name]]) if budget.kind in ("energy", "error") else None
            found[name] = rank if knee is None else bounded(min(knee, cost.full if rank is None else rank), cost)
        return found


def elbow(values: Sequence[float]) -> int | None:
    """How many values come before the knee of a descending curve; None where it has none.

    Example:
        >>> elbow([10.0, 9.0, 2.0, 1.5, 1.0]), elbow([3.0, 2.0, 1.0])
        (2, None)
    """
    if len(values) < 3 or not values[0] > values[-1]:
        return None
    top, span, last = values[0], values[0] - values[-1], len(values) - 1
    below = [1 - i / last - (v - values[-1]) / span for i, v in enumerate(values)]
    at = max(range(len(values)), key=below.__getitem__)
    return max(1, at) if below[at] > 1e-9 * max(1.0, top / span) else None
