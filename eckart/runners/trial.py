"""Models that differ in their recipe alone, made one after another from factorisations that they share: what a search compares."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..axes.border import to_dict
from ..axes.protocols import Bundle, Cost, Edits, Parts, Read, StatsView
from ..axes.recipe import Recipe
from ..axes.solve import ReadBias, cost, spectrum
from ..engine import engine_named
from ..plan import Plan
from .budget import CACHE_BYTES
from .jobs import Context, Task
from .judge import Judge
from .whole import Group, Run, Seen, cut, decide

if TYPE_CHECKING:
    from torch import Tensor, nn

DECIDING = ("source", "rebase", "metric", "factor", "filter")
"""Axes that a factorisation depends on, beside the bundle."""


@dataclass(frozen=True)
class Trial:
    """A recipe at one size.

    Args:
        recipe: with its budget.
        plan, costs, bundles: as `make_plan` has them.
    """

    recipe: Recipe
    plan: Plan
    costs: Mapping[str, Cost]
    bundles: Sequence[Bundle]


@dataclass
class Factorisations:
    """Whole spectra and leading triples by what decides them. Beyond `limit` bytes they are made again when asked for, equal to the last bit."""

    limit: int = CACHE_BYTES
    held: int = 0
    found: dict[str, tuple[Tensor, Parts, int]] = field(default_factory=dict)

    def keep(self, key: str, values: Tensor, parts: Parts, cap: int) -> None:
        """Hold one, where there is room."""
        size = sum(t.numel() * t.element_size() for t in (values, parts.left, parts.right))
        if self.held + size <= self.limit:
            self.held += size
            self.found[key] = values, parts, cap


@dataclass(frozen=True)
class Sharing(Context):
    """A context that looks factorisations up before it makes them, for the cut as well: there the exact one stands for any other."""

    known: Factorisations = field(default_factory=Factorisations)

    @property
    def shares(self) -> bool:
        """Whether triples are the leading ones of a longer factorisation, and all that the recipe wants of it."""
        return self.recipe.factor.nested and not (self.recipe.form.solves or self.recipe.form.uses_rest)

    def look(self, task: Task) -> tuple[tuple[float, ...], Parts | None]:
        if not self.shares:
            return super().look(task)
        values, parts = self._factored(task)
        return tuple(self.recipe.score.curve(task.bundle, values, self.stats)), parts

    def cut(self, task: Task, parts: Parts | None = None) -> Edits:
        if task.rank and self.shares:
            parts = self._factored(task)[1]
        return super().cut(task, parts)

    def _factored(self, task: Task) -> tuple[Tensor, Parts]:
        said = to_dict(self.recipe)
        key = json.dumps([task.bundle.name, task.bundle.shares, *(said.get(axis) for axis in DECIDING)], sort_keys=True)
        needed = max(1, task.rank, cost(self.recipe, task.bundle).break_even)
        held = self.known.found.get(key)
        if held is not None and held[2] >= needed:
            return held[0], held[1]
        found = spectrum(self.recipe, task.bundle, self.read, self.stats, cap=needed, algorithm="gram", seed=task.seed, device=self.device)
        assert found.parts is not None, "a form that solves by itself is not looked up"
        self.known.keep(key, found.values, found.parts, needed)
        return found.values, found.parts


@dataclass(frozen=True, eq=False)
class Workshop:
    """Makes the models of trials.

    Args:
        read, read_bias, stats, device: as for `jobs.Context`.
        fit: judge on the text that statistics are from, for recipes that measure losses; it has the original model.
    """

    read: Read
    read_bias: ReadBias
    stats: StatsView
    fit: Judge
    device: str = "cpu"
    known: Factorisations = field(default_factory=Factorisations)
    curves: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)

    def model(self, trial: Trial) -> tuple[nn.Module, Plan]:
        """A changed copy of the original, and the plan with its ranks."""
        context = Sharing(trial.recipe, self.read, self.read_bias, self.stats, self.device, self.known)
        run = Run(context, engine_named("local"), None, 0, self.fit)

        def sweep(done: frozenset[str] = frozenset()) -> Iterable[Group]:
            return [Group(trial.bundles, self.stats)]

        plan = self._decided(trial, sweep, run)
        model, by_name = self.fit.copy(), {b.name: b for b in trial.bundles}
        seen: dict[str, Seen] = {}
        for one in cut(plan, sweep, run, seen):
            assert isinstance(one, tuple), "a local engine returns edits"
            trial.recipe.form.apply(model, by_name[one[0].name], one[1])
        return model, plan

    def _decided(self, trial: Trial, sweep: Any, run: Run) -> Plan:
        """The plan with ranks; what a score has measured serves all sizes and allocations."""
        if not trial.recipe.score.measures:
            return decide(trial.plan, trial.costs, sweep, run)[0]
        said = to_dict(trial.recipe)
        shared = [sorted(b.name for b in trial.bundles), *(said.get(axis) for axis in (*DECIDING, "score", "form", "refine"))]
        key = json.dumps(shared, sort_keys=True)
        if key not in self.curves:
            plan, seen = decide(trial.plan, trial.costs, sweep, run)
            self.curves[key] = {n: s.curve for n, s in seen.items()}
            return plan
        return trial.plan.decided(trial.recipe.allocate(self.curves[key], trial.costs, trial.recipe.budget), trial.costs)
