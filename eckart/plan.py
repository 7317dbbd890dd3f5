"""A plan: what a run will do, printed before any work, obeyed by any engine, and part of what a resume must match."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .axes.border import to_dict
from .axes.protocols import Bundle, Cost, Decides
from .axes.recipe import Recipe
from .axes.solve import adds_bias, cost
from .errors import UsageError
from .linalg.choose import choose
from .linalg.peak import peak_bytes
from .linalg.weighted import TOL
from .seeds import seed_of
from .store.dtypes import nbytes


@dataclass(frozen=True)
class Job:
    """One bundle of a stage.

    Args:
        name: the bundle's.
        tensors: keys of the source that are read.
        shape: (out, in) of the matrix that is factorised.
        algorithm: what `linalg.svd` is told to use.
        rank: triples kept; None while it is not known, or where the matrix stays dense.
        cap: largest rank that stores less than the matrix.
        state: "factored", "dense", or "undecided".
        before, after: parameters stored; `after` is an upper figure while undecided.
        bytes: bytes of the new tensors, likewise.
        seconds: predicted time of the factorisation on this machine's kind.
        peak: most bytes of memory that the factorisation takes.
        seed: of the algorithms that draw numbers.
    """

    name: str
    tensors: tuple[str, ...]
    shape: tuple[int, int]
    algorithm: str
    rank: int | None
    cap: int
    state: str
    before: int
    after: int
    bytes: int
    seconds: float
    peak: int
    seed: int


@dataclass(frozen=True)
class Stage:
    """Jobs that are independent of each other."""

    name: str
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Plan:
    """An ordered list of stages; plain data.

    Args:
        recipe: as `axes.border.to_dict` writes it.
        model: name of the model.
        source: fingerprint of the input.
        seed: of the run.
        statistics: what is measured before, one line each.
        stages: in order.
        skipped: linear layer -> why it is left alone.
        decides: when ranks are known.
        threads: of torch, in every job: another number may round otherwise.
        device: type of device that matrices are factored on, likewise.
        memory: what takes how many bytes of memory at most, and "disk": bytes that will be written. Not part of the identity.
    """

    recipe: Mapping[str, Any]
    model: str
    source: str
    seed: int
    statistics: tuple[str, ...]
    stages: tuple[Stage, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    decides: Decides = "shape"
    threads: int = 1
    device: str = "cpu"
    memory: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Most bytes of memory that the run takes in its leading process."""
        return sum(v for k, v in self.memory.items() if k != "disk")

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Jobs of the last stage: the cut."""
        return self.stages[-1].jobs

    @property
    def before(self) -> int:
        """Parameters of the targeted matrices."""
        return sum(j.before for j in self.jobs)

    @property
    def after(self) -> int:
        """Parameters stored for them afterwards (an upper figure while ranks are undecided)."""
        return sum(j.after for j in self.jobs)

    @property
    def seconds(self) -> float:
        """Predicted seconds of factorisation."""
        return sum(j.seconds for s in self.stages for j in s.jobs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the result. Equal before and after ranks are decided, since ranks follow from the rest."""
        stages = [[[j.name, j.tensors, j.algorithm, j.seed] for j in s.jobs] for s in self.stages]
        text = json.dumps({"plan": self.to_dict() | {"stages": stages, "memory": {}}}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def decided(self, ranks: Mapping[str, int | None], costs: Mapping[str, Cost]) -> Plan:
        """The same plan with the ranks that an allocation found."""
        jobs = []
        for job in self.jobs:
            rank = ranks[job.name]
            after = costs[job.name].at(rank)
            width = job.bytes / max(1, job.after)
            jobs.append(replace(job, rank=rank, state="dense" if rank is None else "factored", after=after, bytes=round(after * width)))
        return replace(self, stages=(*self.stages[:-1], replace(self.stages[-1], jobs=tuple(jobs))))


def when(recipe: Recipe) -> Decides:
    """When ranks are known. A budget on energy or error needs spectra, whatever the allocation, and so do factors that are trained first."""
    return "spectra" if trains_factors(recipe) or recipe.budget.kind in ("energy", "error", "threshold") else recipe.allocate.decides


def trains_factors(recipe: Recipe) -> bool:
    """Whether factors are trained before ranks are known."""
    return recipe.factor is not None and recipe.factor.trains


def judges(recipe: Recipe) -> bool:
    """Whether a run measures the loss of changed models, or trains: it then needs calibration whatever the statistics."""
    return recipe.recover is not None or trains_factors(recipe) or recipe.score.measures or recipe.allocate.decides == "training"


def compute_dtype(recipe: Recipe) -> str:
    """Precision of the factorisations: the core's own without a metric, float64 in one (see `linalg.weighted`)."""
    return "float32" if recipe.metric is None or recipe.metric.kind == "identity" else "float64"


def make_plan(
    recipe: Recipe, bundles: Sequence[Bundle], *, model: str, source: str, seed: int, skipped: Mapping[str, str], device: str = "cpu", threads: int = 1,
) -> tuple[Plan, dict[str, Cost]]:  # fmt: skip
    """A plan from shapes alone: no tensor is read.

    Args:
        recipe: with the budget of the run.
        bundles: what is solved.
        model, source, seed: identity of the run.
        skipped: linear layers left alone, with reasons.
        device: type of device that matrices are factored on.
        threads: of each job.

    Returns:
        (plan, cost of each bundle by name).

    Raises:
        UsageError: nothing to compress, or a rank above every target.
    """
    if not bundles:
        reasons = "; ".join(sorted(set(skipped.values()))) or "the model has no linear layers"
        raise UsageError(f"{model}: no matrix is targeted ({reasons}). See target.skip and target.only: --set 'target.only=[\"q_proj\"]'.")
    bare = [s.name for b in bundles for s in b.sites if adds_bias(recipe) and s.bias is None and s.kind != "embedding"]
    if bare and recipe.form.layout == "dense":
        raise UsageError(
            f"{recipe.name} gives {bare[0]} a bias, and its class has none there, so a dense folder would lose it on loading. "
            "Use --form factored, or --set metric.keep_mean=false."
        )
    costs = {b.name: cost(recipe, b) for b in bundles}
    _check_budget(recipe, costs)
    waves = when(recipe)
    ranks = recipe.allocate({}, costs, recipe.budget) if waves == "shape" else {}
    exact = waves != "shape"
    cut = [_job(recipe, b, costs[b.name], ranks.get(b.name), exact, seed, device) for b in bundles]
    stages: list[Stage] = []
    if exact:
        wave = [
            replace(j, seconds=choose(*j.shape, None, dtype=compute_dtype(recipe), device=device, tol=TOL).seconds, after=j.before, bytes=0)
            for j in cut
        ]
        stages.append(Stage("spectra", tuple(wave)))
    stages.append(Stage("cut", tuple(cut)))
    needs = sorted(f"{s.kind} at {s.at}, {s.via}" + (f", {s.probe}" if s.via == "backward" else "") for s in recipe.needs())
    plan = Plan(to_dict(recipe), model, source, seed, tuple(needs), tuple(stages), dict(skipped), waves, threads, device)
    return plan, costs


def _job(recipe: Recipe, bundle: Bundle, cost: Cost, rank: int | None, exact: bool, seed: int, device: str) -> Job:
    """One bundle of the cut; `exact` where ranks wait for spectra."""
    m, n = bundle.shape
    state = "undecided" if exact else "dense" if rank is None else "factored"
    most = cost.break_even if exact else rank
    chosen = choose(m, n, min(most or 1, m, n), dtype=compute_dtype(recipe), device=device, tol=TOL)
    method = "gram" if exact else chosen.method
    size = nbytes(bundle.sites[0].dtype, (1,))
    after = cost.at(most)
    sides = {stat.at for stat in (recipe.metric.needs if recipe.metric is not None else ()) if stat.kind == "moments"}
    sides -= {"in"} if bundle.sites[0].kind == "embedding" else set()  # its moments are the frequencies of rows
    peak = 0
    if state != "dense":
        made = sum(8 * side**2 for side, there in ((n, "in" in sides), (m, "out" in sides)) if there)  # moments divided by their count
        peak = made + peak_bytes(m, n, most or 1, method=method, itemsize=size, into="in" in sides, out="out" in sides)
    seconds = chosen.seconds if state == "factored" else 0.0
    tensors = tuple(k for s in bundle.sites for k in s.tensors)
    return Job(
        bundle.name,
        tensors,
        bundle.shape,
        method,
        rank,
        cost.break_even,
        state,
        cost.dense,
        after,
        after * size,
        seconds,
        peak,
        seed_of(seed, bundle.name),
    )


def _check_budget(recipe: Recipe, costs: Mapping[str, Cost]) -> None:
    budget = recipe.budget
    if budget.kind is None:
        raise UsageError("the run has no budget. Give --keep 0.8, or --set budget.rank=16.")
    if budget.kind == "rank" and isinstance(budget.value, int):
        largest = max(c.full for c in costs.values())
        if budget.value > largest:
            raise UsageError(
                f"budget.rank: {budget.value} is above every target; the largest has min(out, in) = {largest}. Give a rank below it, or --keep."
            )
    if budget.kind == "keep":
        least = sum(min(c.at(1), c.dense) for c in costs.values()) / sum(c.dense for c in costs.values())
        if budget.value < least:
            raise UsageError(
                f"budget.keep: {budget.value:g} is out of reach; rank 1 everywhere already stores {least:.4f} of the targeted parameters."
            )
