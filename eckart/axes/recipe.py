"""A published system as a value: one choice on each axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UsageError, did_you_mean
from . import allocate as _allocate
from . import factor as _factor
from . import filter as _filter
from . import metric as _metric
from . import score as _score
from . import source as _source
from . import target as _target
from .base import Choice
from .form import Pair
from .protocols import Budget, Stat

Fidelity = Literal["exact", "variant", "idea"]
AXES = ("target", "group", "source", "rebase", "metric", "factor", "filter", "score", "allocate", "form", "refine", "recover")
"""Axes in the order of the flow; `budget`, `roles` and `train` are settings beside them."""
PIECES = ("penalty", "gradient", "loss", "refresh")
"""What acts while a recipe trains, each a tuple of choices; see `eckart.axes.training`."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A system: which matrix, best in what sense, how much of it, what becomes of the pieces. A value, not a procedure: `solve` runs it.

    Args:
        name: key in the registry, lower snake case.
        verb: what it does: "compress", "adapt", "quantize", "merge", "train", "cache".
        paper: "arXiv:...", or what else identifies the source.
        title: name as published.
        fidelity: "exact" (the paper's mathematics), "variant" (`differs` says how), "idea" (from an abstract, unverified).
        differs: what differs from the paper, a sentence.
        target, source, metric, factor, filter, score, allocate, form: the axes; see `eckart.axes`.
        group, rebase, refine, recover: further axes, None where a recipe has none.
        budget: the paper's own budget; a run's budget replaces it.
        roles: part of the form -> role.
        train: the paper's training settings, used by verbs that train.
        penalty, gradient, loss, refresh: what acts during training, once per step of the optimiser.
        variants: name -> the fields that change in it, for what a paper has in several forms; see `variant`.

    Raises:
        UsageError: axes that do not fit together, with a sentence.

    Example:
        >>> from eckart.axes import metric
        >>> Recipe(name="mine", verb="compress", paper="-", metric=metric.InputGram(power=1.0)).metric.power
        1.0
    """

    name: str
    verb: str
    paper: str
    title: str = ""
    fidelity: Fidelity = "exact"
    differs: str = ""
    target: Any = field(default_factory=_target.Linears)
    group: Any = None
    source: Any = field(default_factory=_source.Weights)
    rebase: Any = None
    metric: Any = field(default_factory=_metric.Identity)
    factor: Any = field(default_factory=_factor.SVD)
    filter: Any = field(default_factory=_filter.Top)
    score: Any = field(default_factory=_score.PredictedLoss)
    allocate: Any = field(default_factory=_allocate.Uniform)
    form: Any = field(default_factory=Pair)
    refine: Any = None
    recover: Any = None
    budget: Budget = field(default_factory=lambda: Budget(keep=0.8))
    roles: Mapping[str, Choice] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    penalty: tuple[Any, ...] = ()
    gradient: tuple[Any, ...] = ()
    loss: tuple[Any, ...] = ()
    refresh: tuple[Any, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        gives: frozenset[str] = frozenset().union(*(a.gives for a in self.axes().values()))
        for axis, value in self.axes().items():
            if getattr(value, "axis", axis) != axis:
                raise UsageError(f"{self.name}: {axis} got {value!r}, which belongs to the axis {value.axis}.")
            for tag in sorted(value.takes - gives):
                raise UsageError(
                    f"{self.name}: {axis}={value.kind} needs {tag!r}, which no other axis of this recipe gives. {_givers(tag)}"
                )
        for axis in PIECES:
            for value in getattr(self, axis):
                if getattr(value, "axis", axis) != axis:
                    raise UsageError(f"{self.name}: {axis} got {value!r}, which belongs to the axis {value.axis}.")
        for part in self.roles:
            if part not in self.form.parts:
                raise UsageError(
                    f"{self.name}: roles names {part!r}, but form={self.form.kind} has the parts {', '.join(self.form.parts)}."
                )
        if self.fidelity != "exact" and not self.differs:
            raise UsageError(f"{self.name}: fidelity={self.fidelity} wants a sentence in `differs`.")

    def axes(self) -> dict[str, Any]:
        """The choices that are set, in the order of the flow."""
        return {a: getattr(self, a) for a in AXES if getattr(self, a) is not None}

    def needs(self) -> frozenset[Stat]:
        """The statistics that must be measured before anything is factorised."""
        found = frozenset[Stat]().union(*(a.needs for a in (*self.axes().values(), *self.pieces())))
        return found if self.target.tables else frozenset(s for s in found if s.kind != "frequency")

    def pieces(self) -> tuple[Any, ...]:
        """What acts during training, in the order in which it does: gradients are changed before penalties are added to them."""
        return (*self.loss, *self.gradient, *self.penalty, *self.refresh)

    def variant(self, name: str) -> Recipe:
        """The recipe in one of its named forms.

        Raises:
            UsageError: it has no such form.
        """
        if name not in self.variants:
            known = f"It has: {', '.join(self.variants)}." if self.variants else "It has none."
            raise UsageError(f"{self.name} has no variant {name!r}.{did_you_mean(name, self.variants)} {known}")
        return self.with_(**self.variants[name])

    def plus(self, other: Recipe) -> Recipe:
        """This recipe with what acts during the training of another beside its own, on the blocks that the other chooses where it does."""
        return self.with_(target=other.target.around(self.target), **{axis: getattr(self, axis) + getattr(other, axis) for axis in PIECES})

    def with_(self, **changes: Any) -> Recipe:
        """The same recipe with other choices; checked like a new one.

        Args:
            **changes: axis or field name -> value.

        Raises:
            UsageError: a field that does not exist, or a mix that does not fit together.
        """
        names = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name not in names:
                raise UsageError(f"a recipe has no field {name!r}.{did_you_mean(name, names)} It has: {', '.join(sorted(names))}.")
        return dataclasses.replace(self, **changes)


def _givers(tag: str) -> str:
    from .border import CHOICES

    found = [f"{c.axis}={c.kind}" for kinds in CHOICES.values() for c in kinds.values() if tag in c.gives]
    return f"These give it: {', '.join(sorted(found))}." if found else ""
