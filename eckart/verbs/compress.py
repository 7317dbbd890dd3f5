"""`compress`: store a model's linear layers in fewer parameters."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..axes import Budget, Recipe
from ..axes.border import override
from ..axes.group import pack
from ..axes.protocols import Bundle, Cost, Edits, World
from ..data import load_texts
from ..engine import Engine, engine_named
from ..errors import Refused, UsageError
from ..plan import Job, Plan, judges, make_plan
from ..registry import get_recipe
from ..runners.budget import parse_bytes, refuse_beyond
from ..runners.jobs import Context, Desk, NoStats, place
from ..runners.judge import Judge
from ..runners.train import recover
from ..runners.whole import Cut, Places, Run, cut, decide
from ..stats.result import batch_digest, data_digest
from ..store import check_output, finished
from ..store.journal import Entry
from ..store.resume import recorded
from .calibrate import MAX_STATS, PROBES, Calibration, Runner, is_tensors, load_calibration, measure, rows_of
from .host import Host, open_host
from .output import MAX_SHARD, config_changes, stamps_of, write_folder
from .route import cautions, plan_route
from .run import Clock, check_seed, content, identity, is_output, torch_threads
from .spread import measure_for, tidy
from .summary import compress_report

if TYPE_CHECKING:
    from torch import nn

    from ..stats import Stats


@dataclass(frozen=True)
class Compressed:
    """What `compress` returns. `model` is set when nothing was written, `path` when something was.

    Args:
        plan: what was, or would be, done.
        report: plain data, as the HTML report and `report.json` show it.
        model: the compressed copy.
        path: the folder that was written.
        stats: the statistics that were measured, for another run on the same model and data.
    """

    plan: Plan
    report: dict[str, Any]
    model: nn.Module | None = None
    path: Path | None = None
    stats: Stats | None = field(default=None, repr=False)


def resolve(recipe: str | Recipe, keep: float | None, settings: Sequence[str], form: str, quantise: str | None = None) -> Recipe:
    """The recipe of a run: by name, with the run's budget, form, storage and overrides."""
    found = get_recipe(recipe) if isinstance(recipe, str) else recipe
    if found.verb != "compress":
        raise UsageError(f"{found.name} does {found.verb}, not compress. `eckart ls --verb compress` shows what fits here.")
    if form not in ("factored", "dense"):
        raise UsageError(f"form: expected 'factored' or 'dense', found {form!r}.")
    if keep is not None:
        if any(s.startswith("budget.") for s in settings):
            raise UsageError("two budgets: --keep and --set budget... exclude each other. Give one of them.")
        found = found.with_(budget=Budget(keep=keep))
    stores = [s for s in settings if s.partition("=")[0].strip() == "form.store"]
    if quantise is not None and stores:
        raise UsageError(f"two storages: --quantise {quantise} and --set {stores[-1]} exclude each other. Give one of them.")
    found = override(found, settings)
    if form == "dense" and found.form.layout not in ("factored", "dense"):
        raise UsageError(f"{found.name} stores no factors, so there is nothing to multiply back. Leave --form out.")
    if form == "dense" and "form.layout=factored" in settings:
        raise UsageError("--form dense and --set form.layout=factored contradict each other. Give one of them.")
    if form == "dense":
        found = found.with_(form=replace(found.form, layout=form))
    return in_integers(found, quantise)


def in_integers(recipe: Recipe, quantise: str | None) -> Recipe:
    """The recipe with its matrices stored in integers; refused where that cannot be."""
    if quantise is not None:
        if recipe.form.kind != "pair":
            why = {"shared_basis": "factors that several matrices share", "smaller": "smaller dense matrices", "merged": "experts"}
            raise UsageError(f"{recipe.name}: {why.get(recipe.form.kind, recipe.form.kind)} are not stored in integers. Leave --quantise out, or take a recipe with pairs.")  # fmt: skip
        recipe = recipe.with_(form=replace(recipe.form, store=quantise))
    if recipe.form.stored != "same":
        from ..nn.quantised import torchao

        torchao()
        if recipe.recover is not None:
            raise UsageError(f"{recipe.name} trains its factors after the cut, which integers do not. Leave --quantise out, or take recipe.with_(recover=None).")  # fmt: skip
    return recipe


def compress(
    model: Any,
    recipe: str | Recipe = "svd_llm",
    keep: float | None = None,
    *,
    calib: Any = None,
    out: str | Path | None = None,
    form: Literal["factored", "dense"] = "factored",
    quantise: Literal["int8", "int4"] | None = None,
    seed: int = 0,
    dry_run: bool | Literal["spectra"] = False,
    settings: Sequence[str] = (),
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int = 8,
    probes: int = PROBES,
    device: str | None = None,
    overwrite: bool = False,
    workers: int = 1,
    threads: int | None = None,
    engine: str | Engine = "local",
    max_memory: str | int | None = None,
    calibrate: Runner = "auto",
    max_shard_bytes: int = MAX_SHARD,
    stats: Stats | str | Path | None = None,
    max_stats: int = MAX_STATS,
    loss: Any = None,
    evaluate_on: Any = None,
    command: str = "",
) -> Compressed:
    """Replace linear layers by the best low-rank pairs, in the sense that the recipe names.

    It does not train, and it does not make a model faster by itself: two thin matrices are often slower than one at small batches.

    Args:
        model: a checkpoint folder, a Hub id, or a torch module. Never changed.
        recipe: a name from `eckart ls --verb compress`, or a `Recipe`.
        keep: share of the targeted layers' parameters that is stored, in (0, 1]; None takes the recipe's budget (0.8 for those here).
        calib: texts, lists of token ids, or a path to a text or JSONL file, a line per text; for a plain module also a list of input
            tensors. Needed by every recipe that measures something.
        out: folder to write; None returns the model in memory.
        form: "factored" stores pairs, "dense" multiplies them back (loads anywhere, saves nothing).
        quantise: store the pairs, and targeted matrices that stay dense, in "int8" (a scale per output) or "int4" (a scale per 32 inputs) through
            torchao, weights only; None keeps the type of the checkpoint. It changes bytes, not `keep`. Whoever loads the result needs torchao.
        seed: of everything that draws numbers.
        dry_run: True stops at the plan, which reads no tensor; "spectra" goes on until ranks are known.
        settings: overrides such as "metric.power=1.0" or "budget.rank=8".
        tokenizer: for a module in memory that does not know its own.
        max_length: tokens per calibration text; None is the model's limit, at most 512. A causal model sees the rest of a longer text in further windows.
        batch_size: calibration texts per forward pass.
        probes: random projections per text, for encoders under a recipe with gradients; more cost time and steady the result.
        device: where the model runs and matrices are factored ("cuda"); None is the CPU for folders, the module's own device otherwise. Part
            of the plan: another type of device rounds otherwise.
        overwrite: replace an existing `out` once the new one is complete.
        workers: bundles factorised side by side; never changes a byte.
        threads: of torch in every job; None is what torch has now. Part of the plan: another number may round otherwise.
        engine: "local", "ray", "ray:ADDRESS", "torchrun", or an `Engine`. The last three need `out` on a disk that all processes see.
        max_memory: most memory that the run may take beside Python and its libraries, "2.5GiB" or bytes; a plan that needs more is refused
            before any work. What is optional (bases that are kept, activations in memory) is held to the limit with the program counted,
            where there is room for it. Other processes of an engine count for themselves.
        calibrate: "whole" measures with the model in memory, "blocks" with one block of it at a time (folders, recipes without gradients),
            "auto" with blocks where the model does not fit into `max_memory`, or where inputs pass through what is already compressed.
            The sums are the same, bit for bit.
        max_shard_bytes: size at which the output begins a new file.
        stats: statistics of an earlier run on the same model and data, or a file: read when it exists, written when it does not.
        max_stats: larger statistics are not written to that file, in bytes.
        loss: for a plain module under a recipe with gradients: (output, batch) -> scalar.
        evaluate_on: texts on which original and result are compared in the report; slower than the compression itself on long texts.
        command: the command line, for the report.

    Returns:
        `Compressed`: plan, report, and the model or the path.

    Raises:
        UsageError: an unknown recipe or setting, a budget out of range, missing calibration.
        Refused: weights that are not finite, an output that would destroy something, an unreadable checkpoint.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> small = compress(net, "svd", keep=0.5)
        >>> small.plan.after <= 0.5 * small.plan.before
        True
    """
    began = time.perf_counter()
    check_seed(seed)
    rec = resolve(recipe, keep, settings, form, quantise)
    given = None if stats is None or isinstance(stats, str | Path) else stats
    texts = load_calibration(calib, rec.needs() if given is None else frozenset(), rec.name, judges(rec))
    limit = None if max_memory is None else parse_bytes(max_memory)
    file = Path(stats) if isinstance(stats, str | Path) else None
    how = Calibration(texts, max_length, batch_size, seed, probes, loss, file, max_stats, calibrate, limit)
    example = texts[0][:1] if is_tensors(texts) else None
    host = open_host(model, tokenizer, device, example)
    with torch_threads(threads) as count:
        runs = engine_named(engine, workers, count) if isinstance(engine, str) else engine
        if runs.remote and judges(rec):
            raise UsageError(f"{rec.name} measures losses of the whole model or trains it, which this engine cannot; leave --engine out.")
        if runs.remote and (out is None or host.path is None or evaluate_on is not None):
            raise UsageError(
                "this engine runs jobs in other processes: it needs a checkpoint folder, out=FOLDER, and no evaluation in the same run."
            )
        evaluate_on = load_texts(evaluate_on) if evaluate_on is not None else None
        where = factors_on(host, device)
        plan, costs, bundles = plan_of(host, rec, seed, count, where)
        folder = Path(out).absolute().parent if out is not None else None
        plan, route = plan_route(plan, host, rec, bundles, how, given is not None, runs, folder)
        refuse_beyond(plan, limit, Path(out) if out is not None and runs.leads else None, route.caution)
        said = {"notes": [route.note] if route.note else [], "cautions": cautions(route, plan, limit)}
        describe = partial(compress_report, recipe=rec, host=host, bundles=bundles, command=command, **said)
        if dry_run is True:
            if out is not None:
                check_output(out, [host.path] if host.path else [], overwrite)
            return Compressed(plan, describe(plan, records={}))
        clock = Clock(began)
        if out is not None and runs.leads and not (overwrite or is_output(out)):
            check_output(out, [host.path] if host.path else [], overwrite)
        for bundle in bundles:
            rec.form.check(host.outline, bundle)
        tensors = runs.share(lambda: content(host, bundles))
        clock.lap("checks")
        shared: Path | None = None  # where other processes find the statistics
        if route.measures:
            by_blocks = route.by_blocks.collect if route.by_blocks is not None else None
            if runs.remote and out is not None:
                given, shared = measure_for(runs, host, route.needs, route.sites, how, Path(out), by_blocks)
            else:
                given = measure(host, route.needs, route.sites, how, by_blocks)
        clock.lap("statistics")
        judge = Judge(host.live, rows_of(host, how), loss) if judges(rec) else None
        mark = identity(host, plan, route.fingerprint(given)) | {"content": tensors}
        if judge is not None:
            mark["calibration"] = data_digest(batch_digest(b) for b in judge.batches)
        if out is not None and is_output(out) and not overwrite:
            if finished(out, mark, stamps_of(host.reader)):
                return Compressed(plan, json.loads(recorded(out, "report.json")), path=Path(out), stats=given)
            check_output(out, [host.path] if host.path else [], overwrite)
        run = Run(
            Context(rec, lambda site: host.read(site).cpu(), lambda key: host.reader.read(key).cpu(), given or NoStats(), place(where)),
            runs,
            _desk(host, rec, count, runs, where),
            plan.memory.get("bases", 0),
            judge,
        )
        first, second = route.sweeps(rec, bundles, given, shared)
        plan, seen = decide(plan, costs, first, run)
        clock.lap("spectra")
        if dry_run == "spectra":
            return Compressed(plan, describe(plan, records={}), stats=given)
        small = _copy(host) if out is None or evaluate_on is not None or rec.recover is not None else None
        recovered: dict[str, Any] = {}

        def finish(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
            clock.lap("cut")
            if small is not None:
                _mark(small, rec, plan, bundles, records)
            rows = _compare(host, small, evaluate_on) if evaluate_on is not None else []
            clock.lap("evaluation")
            return describe(plan, records=records, evaluation=rows, timings=clock.laps, recovered=recovered)

        def cuts(done: frozenset[str], places: Places | None = None, shards: str = "") -> Iterator[Cut]:
            skip = frozenset[str]() if small is not None else done
            by_name = {b.name: b for b in bundles}
            late: list[tuple[Job, Edits]] = []
            for one in cut(plan, second, run, seen, done=skip, places=places, shards=shards):
                if small is not None and not isinstance(one, Entry):
                    job, edits = one
                    rec.form.apply(small, by_name[job.name], edits)
                    if judge is not None and rec.recover is not None:
                        late.append((job, edits))
                        continue
                yield one
            if small is not None and judge is not None and rec.recover is not None:
                clock.lap("cut")
                recovered.update(recover(rec, small, judge, seed).as_dict())
                clock.lap("recovery")
                yield from ((job, rec.form.reread(small, by_name[job.name], edits)) for job, edits in late)

        if out is None:
            records = {job.name: edits.record for job, edits in (c for c in cuts(frozenset()) if not isinstance(c, Entry))}
            return Compressed(plan, finish(records), model=small, stats=given)
        report = write_folder(
            Path(out), host, rec, plan, bundles, cuts, finish,
            engine=runs, identity=mark, overwrite=overwrite, max_shard_bytes=max_shard_bytes, resume=command,
        )  # fmt: skip
        if shared is not None and runs.leads:
            tidy(Path(out), shared)
        return Compressed(plan, report, path=Path(out), stats=given)


def factors_on(host: Host, device: str | None) -> str:
    """The device of the factorisations: the one that was asked for, else that of a module in memory, else the CPU.

    Raises:
        UsageError: it is not there.
    """
    import torch

    if device is None:
        first = None if host.path is not None else next(host.live().parameters(), None)
        return "cpu" if first is None or first.device.type == "meta" else str(first.device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: torch cannot use it here ({str(error).splitlines()[0]}).") from error
    return device


def _desk(host: Host, rec: Recipe, threads: int, engine: Engine, device: str) -> Desk | None:
    return Desk(str(host.path), rec, threads, device=device) if engine.remote else None


def _compare(host: Host, small: Any, texts: Any) -> list[dict[str, Any]]:
    """Rows of the before/after table, both models in memory."""
    from .evaluate import evaluate

    return evaluate(small, texts, against=host.live(), tokenizer=host.tokenizer())["rows"]


def plan_of(host: Host, rec: Recipe, seed: int, threads: int, device: str) -> tuple[Plan, dict[str, Cost], list[Bundle]]:
    """The plan of a run, what each bundle costs, and the bundles.

    Raises:
        UsageError: nothing is targeted, or the budget is out of reach.
        Refused: a weight that is missing.
    """
    sites, skipped = rec.target.sites(host.catalogue)
    missing = {n: why for n, why in host.catalogue.notes.items() if "checkpoint" in why}
    for name, why in missing.items():
        raise Refused(
            f"{host.name}: the weight of {name} is unusable: {why}. The checkpoint is incomplete or belongs to another model; get it again."
        )
    shapes = {k: tuple(host.reader.info(k).shape) for k in host.reader}
    bundles, left = pack(rec.group, sites, World(host.read, rec.budget, shapes, host.reader.config))
    skipped = {**skipped, **left}
    plan, costs = make_plan(
        rec,
        bundles,
        model=host.name,
        source=host.reader.fingerprint,
        seed=seed,
        skipped=skipped,
        device=device.partition(":")[0],
        threads=threads,
    )
    return plan, costs, bundles


def _copy(host: Host) -> nn.Module:
    """A model of our own: a folder's is loaded for this run alone, a module in memory is copied."""
    return copy.deepcopy(host.live())


def _mark(model: Any, rec: Recipe, plan: Plan, bundles: Sequence[Bundle], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Tell transformers what the model now is, so that plain `save_pretrained` works."""
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return
    changes = config_changes(rec, plan, bundles, model.config.to_dict(), records)
    tables = changes.pop("quantization_config", None)
    for key, value in changes.items():
        setattr(model.config, key, value)
    if tables is not None:
        from .host import attach

        attach(model, recipe=rec.name)
