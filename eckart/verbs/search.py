"""`search`: which mix of choices loses least on a model, at each of several sizes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..axes import Budget, Recipe
from ..axes.protocols import Bundle, Stat
from ..data import load_texts
from ..errors import EckartError, Refused, UsageError
from ..progress import track
from ..runners.jobs import NoStats, place
from ..runners.judge import Judge
from ..runners.trial import Trial, Workshop
from ..stats.result import batch_digest, data_digest
from .calibrate import PROBES, Calibration, is_tensors, load_calibration, measure, rows_of
from .candidates import Rung, affordable, checked, ladder
from .compress import compress, factors_on, plan_of
from .host import Host, open_host
from .run import Clock, check_seed, content, torch_threads
from .search_folder import Folder, Known, key_of
from .search_report import search_report

HELD = 4  # one text in so many is held out of the statistics and judged on


@dataclass(frozen=True)
class Row:
    """A candidate at one size, as far as it came.

    Args:
        keep: the size that was asked for.
        recipe: name of the candidate.
        stored: share of the targeted parameters that it stores; 0 where it was refused.
        loss: mean loss on the held-out batches that it has seen, None where it was refused.
        batches: how many those are.
        rung: the last rung that it reached, from 1.
        why: of a refusal.
    """

    keep: float
    recipe: str
    stored: float = 0.0
    loss: float | None = None
    batches: int = 0
    rung: int = 0
    why: str = ""


@dataclass(frozen=True)
class Found:
    """What `search` returns.

    Args:
        winners: for each size the recipe that lost least, with its budget; empty after a dry run.
        rows: every candidate at every size.
        frontier: the rows that no other one beats in both size and loss, of those that saw all of the held-out text.
        rungs: how many rungs were climbed.
        dense: loss of the original on the held-out text.
        report: plain data, as `search.html` and `search.json` show it.
        path: the folder that was written.
    """

    winners: Mapping[float, Recipe]
    rows: Sequence[Row]
    frontier: Sequence[Row]
    rungs: int
    dense: float | None
    report: dict[str, Any] = field(repr=False)
    path: Path | None = None


def search(
    model: Any,
    keep: float | Sequence[float] = 0.6,
    *,
    calib: Any,
    out: str | Path | None = None,
    recipes: Sequence[str | Recipe] | None = None,
    evaluations: int | None = None,
    rungs: int | None = None,
    time_limit: float | None = None,
    goal: Literal["task", "original"] = "task",
    seed: int = 0,
    dry_run: bool = False,
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int = 8,
    probes: int = PROBES,
    device: str | None = None,
    threads: int | None = None,
    loss: Any = None,
    evaluate_on: Any = None,
    overwrite: bool = False,
    command: str = "",
) -> Found:
    """Compare mixes of metric, grouping, allocation and refit on the model itself, by successive halving, and compress with the best.

    It does not train, and it is no evaluation: the loss that it reports was chosen among many, so judge the winner on other text.

    One text in four is held out of the statistics, and candidates are judged on it: all of them on a quarter of its batches, the better half on
    half of them, the better half of those on all. Statistics and factorisations are shared among candidates. The winner of each size is then
    compressed with all of the calibration text, as `compress` with its recipe would. Needs room for the model twice.

    Args:
        model: a checkpoint folder, a Hub id, or a torch module. Never changed.
        keep: share, or shares, of the targeted layers' parameters that are stored, in (0, 1].
        calib: texts, lists of token ids, or a path to a text or JSONL file, a line per text; for a plain module also a list of input tensors.
        out: folder to write; None returns recipes only. With one size it holds the winner, with several a folder of each, "keep-0.6".
        recipes: candidates by name ("two_sided:weight_grads") or as recipes; None takes the grid and the recipes of the papers.
        evaluations: the budget at each size: models that are made and judged. None is enough for all candidates; fewer take the head of the list.
        rungs: stop after so many rungs, as an earlier search did.
        time_limit: stop after the rung in which this many seconds have passed; the number of rungs is recorded, so that `rungs` repeats the result.
        goal: "task" is next-token cross-entropy, for encoders and plain modules without a loss the distance from the original's output;
            "original" is that distance always.
        seed: of everything that draws numbers.
        dry_run: stop before any work, with the report of what would be done.
        tokenizer, max_length, batch_size, probes, device, threads, loss: as for `compress`.
        evaluate_on: texts on which originals and winners are compared in their reports.
        overwrite: replace an existing `out` once the new one is complete.
        command: the command line, for the reports.

    Returns:
        `Found`: winners, every candidate, the frontier, the report, and the path.

    Raises:
        UsageError: candidates that cannot be compared, a size or a budget out of range, missing calibration.
        Refused: weights that are not finite, an output that would destroy something, an unreadable checkpoint, a size that every candidate refused.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> data = [torch.randn(16, 32, generator=torch.Generator().manual_seed(i)) for i in range(8)]
        >>> found = search(net, 0.5, calib=data, recipes=["svd", "svd_llm"])
        >>> found.winners[0.5].name
        'svd_llm'
    """
    began = time.perf_counter()
    sizes = _sizes(keep)
    if goal not in ("task", "original"):
        raise UsageError(f"goal: expected 'task' or 'original', found {goal!r}.")
    if rungs is not None and rungs < 1:
        raise UsageError(f"rungs: expected at least 1, found {rungs}.")
    check_seed(seed)
    listed = checked(recipes)
    every = load_calibration(calib, frozenset(), "search", judges=True)
    fit, held = split(every)
    evaluate_on = load_texts(evaluate_on) if evaluate_on is not None else None
    host = open_host(model, tokenizer, device, every[0][:1] if is_tensors(every) else None)
    folder = Folder(Path(out), host.path, overwrite) if out is not None else None
    with torch_threads(threads) as count:
        how = Calibration(fit, max_length, batch_size, seed, probes, loss)
        fitted, judged = (Judge(host.live, rows_of(host, replace(how, texts=part)), loss) for part in (fit, held))
        steps = ladder(affordable(len(listed), len(judged.batches), evaluations), len(judged.batches))
        run = Searching(
            host, listed[: steps[0].candidates], sizes, steps[:rungs], len(steps), judged, goal, seed, count, factors_on(host, device), folder
        )  # fmt: skip
        describe = partial(search_report, run, listed, (len(fit), len(held)), command=command)
        trials = run.plans()
        if dry_run:
            return Found({}, run.rows(), (), 0, None, describe())
        clock = Clock(began)
        weights = content(host, _covering(trials.values()))
        needs = frozenset[Stat]().union(*(t.recipe.needs() for t in trials.values()))
        if folder is not None:
            text = data_digest(batch_digest(b) for b in [*fitted.batches, *judged.batches])
            folder.open([host.reader.fingerprint, weights, text, goal, str(seed), str(probes), str(count), run.device])
            if loss is None:  # one's own has no fingerprint, so that nothing of an earlier run can be told to be of the same
                run.known = folder.known()
                how = replace(how, file=folder.statistics(needs))
        sites = {s.name: s for t in trials.values() for b in t.bundles for s in b.sites}
        stats = measure(host, needs, list(sites.values()), how) if needs else NoStats()
        clock.lap("statistics")
        workshop = Workshop(lambda site: host.read(site).cpu(), lambda key: host.reader.read(key).cpu(), stats, fitted, place(run.device))
        run.climb(workshop, trials, None if time_limit is None else began + time_limit)
        clock.lap("candidates")
        dense = judged(host.live(), goal)
        winners = run.winners()
        report = describe(unit=_unit(judged, goal), dense=dense, winners=winners)
        path: Path | None = None
        if folder is not None:
            del workshop, stats
            shared: dict[Any, Any] = {}
            for size, part in folder.parts(sizes).items():
                needs = winners[size].needs()
                shared[needs] = compress(
                    model, winners[size], calib=every, out=part, seed=seed, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size,
                    probes=probes, device=device, threads=count, stats=shared.get(needs), loss=loss, evaluate_on=evaluate_on, command=command,
                ).stats  # fmt: skip
            clock.lap("compression")
            path = folder.finish(report, clock.laps)
        return Found(
            winners,
            run.rows(),
            run.frontier(),
            run.climbed,
            dense,
            report | {"timings": {k: round(v, 3) for k, v in clock.laps.items()}},
            path,
        )


@dataclass(eq=False)
class Searching:
    """Candidates on their way up.

    Args:
        host: the model.
        candidates, sizes: what is tried, and at which sizes.
        steps: the rungs that will be climbed.
        rungs: how many there are.
        judge, goal: on the held-out text.
        seed, threads, device: of the run.
        folder: where evaluations are recorded, if anywhere.
        climbed, evaluated: rungs that are done, and evaluations, those of an interrupted search among them.
        table: (size, candidate) -> how far it came.
        known: evaluations of an interrupted search.
    """

    host: Host
    candidates: Sequence[Recipe]
    sizes: Sequence[float]
    steps: Sequence[Rung]
    rungs: int
    judge: Judge
    goal: str
    seed: int
    threads: int
    device: str
    folder: Folder | None = None
    climbed: int = 0
    evaluated: int = 0
    table: dict[tuple[float, str], Row] = field(default_factory=dict)
    known: Known = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the last rung was climbed."""
        return self.climbed == self.rungs

    def plans(self) -> dict[tuple[float, str], Trial]:
        """Every candidate at every size; what cannot be planned is refused in its row.

        Raises:
            Refused: a size that every candidate refuses.
        """
        out: dict[tuple[float, str], Trial] = {}
        for size in self.sizes:
            for candidate in self.candidates:
                recipe, at = candidate.with_(budget=Budget(keep=size)), (size, candidate.name)
                self.table[at] = Row(size, candidate.name)
                try:
                    plan, costs, bundles = plan_of(self.host, recipe, self.seed, self.threads, self.device)
                    for bundle in bundles:
                        recipe.form.check(self.host.outline, bundle)
                    out[at] = Trial(recipe, plan, costs, bundles)
                except EckartError as error:
                    self.table[at] = Row(size, candidate.name, why=str(error))
            self._refuse_if_all(size)
        return out

    def climb(self, workshop: Workshop, trials: Mapping[tuple[float, str], Trial], until: float | None) -> None:
        """All rungs, or as many as there is time for; each for all sizes."""
        for number, step in enumerate(self.steps, 1):
            todo = [(size, name) for size in self.sizes for name in self._best(size, step.candidates)]
            for at in track(todo, f"rung {number} of {len(self.steps)}", len(todo)):
                row = self.table[at]
                try:
                    loss, stored = self._evaluate(workshop, trials[at], step.batches)
                    self.table[at] = replace(row, loss=loss, stored=stored, batches=step.batches, rung=number)
                except EckartError as error:
                    self.table[at] = replace(row, loss=None, why=str(error))
            self.climbed = number
            for size in self.sizes:
                self._refuse_if_all(size)
            if until is not None and time.perf_counter() >= until:
                break

    def _evaluate(self, workshop: Workshop, trial: Trial, batches: int) -> tuple[float, float]:
        """(loss, stored share)."""
        at = key_of(trial.recipe), batches
        self.evaluated += 1
        if at in self.known:
            return self.known[at]
        model, plan = workshop.model(trial)
        loss, stored = self.judge(model, self.goal, batches), plan.after / plan.before
        if self.folder is not None:
            self.folder.note(trial.recipe, batches, loss, stored)
        return loss, stored

    def _best(self, size: float, count: int) -> list[str]:
        """Names of the best so far, before the first rung of the head of the list."""
        rows = [r for r in self.rows() if r.keep == size and not r.why and r.rung == self.climbed]
        return [r.recipe for r in rows[:count]]

    def _refuse_if_all(self, size: float) -> None:
        rows = [r for r in self.table.values() if r.keep == size]
        if all(r.why for r in rows):
            raise Refused(f"keep {size:g}: every candidate was refused. The first, {rows[0].recipe}: {rows[0].why}")

    def rows(self) -> list[Row]:
        """Of each size the best first: those that came furthest before the others, refused ones last; ties in the order of the list."""
        order = {c.name: i for i, c in enumerate(self.candidates)}
        return sorted(self.table.values(), key=lambda r: (-r.keep, bool(r.why), -r.rung, _lost(r), order[r.recipe]))

    def winners(self) -> dict[float, Recipe]:
        """The best at each size, with its budget."""
        by_name = {c.name: c for c in self.candidates}
        return {size: by_name[self._best(size, 1)[0]].with_(budget=Budget(keep=size)) for size in self.sizes}

    def frontier(self) -> list[Row]:
        """Rows of the last rung that no other one, of any size, beats in what it stores and in what it loses."""
        last = [r for r in self.rows() if not r.why and r.rung == self.climbed]
        return [r for r in last if not any(_beats(o, r) for o in last)]


def _lost(row: Row) -> float:
    return float("inf") if row.loss is None else row.loss


def _beats(one: Row, other: Row) -> bool:
    a, b = (one.stored, _lost(one)), (other.stored, _lost(other))
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _covering(trials: Iterable[Trial]) -> list[Bundle]:
    """Bundles that hold every tensor which a trial changes."""
    out: list[Bundle] = []
    seen: set[str] = set()
    for bundle in (b for t in trials for b in t.bundles):
        if not seen.issuperset(bundle.keys):
            out.append(bundle)
            seen.update(bundle.keys)
    return out


def _sizes(keep: float | Sequence[float]) -> list[float]:
    given = [keep] if isinstance(keep, int | float) else list(keep)
    if not given:
        raise UsageError("keep: a search needs at least one size, for instance 0.6.")
    for size in given:
        Budget(keep=size)
    if len(set(given)) < len(given):
        raise UsageError(f"keep: {', '.join(f'{s:g}' for s in given)} names a size twice.")
    return sorted((float(s) for s in given), reverse=True)


def split(texts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(for the statistics, held out): every fourth text is held out, whatever their order says.

    Raises:
        UsageError: too few.
    """
    if len(texts) < HELD:
        raise UsageError(
            f"calib: a search holds every {HELD}th text out of the statistics, and found {len(texts)}. Give at least {HELD}, better hundreds."
        )
    return [t for i, t in enumerate(texts) if i % HELD != HELD - 1], list(texts[HELD - 1 :: HELD])


def _unit(judge: Judge, goal: str) -> str:
    """What is lowest for the best, in words."""
    if goal == "task" and judge.predicts:
        return "loss of your own, per sample" if judge.loss is not None else "next-token cross-entropy in nats per token"
    return "distance from the original's output"
