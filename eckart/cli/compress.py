"""`eckart compress`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ..errors import UsageError
from .base import Flag, Json, Out, Quiet, Settings, app, command, console, plain_table, print_json, recipe_given, sentences


@app.command
def compress(
    model: str, /, *, out: Out = None, recipe: str = "svd_llm", keep: float | None = None,
    calib: Path | None = None, settings: Settings = None, as_form: Annotated[Literal["factored", "dense"], Parameter(name=("--form", "--as"))] = "factored",
    quantise: Annotated[Literal["int8", "int4"] | None, Parameter(name=("--quantise", "--quantize"))] = None,
    dry_run: Annotated[Literal["plan", "spectra"] | None, Parameter(name="--dry-run")] = None, seed: int = 0, eval_text: Annotated[Path | None, Parameter(name="--eval")] = None,
    stats: Path | None = None,
    max_stats: int = 4 << 30, max_length: int | None = None, batch_size: int = 8, probes: int = 3, device: str | None = None, overwrite: Flag = False, workers: int = 1, threads: int | None = None,
    engine: str = "local", max_memory: str | None = None, calibrate: Literal["auto", "whole", "blocks"] = "auto",
    as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Store a model's linear layers in fewer parameters.

    Parameters
    ----------
    model:
        Folder or Hub id.
    out:
        Folder to write.
    recipe:
        A name from `eckart ls --verb compress`, or a YAML file.
    keep:
        Share of the targeted layers' parameters that is stored, in (0, 1].
    calib:
        Calibration text: .txt (a line per text) or .jsonl.
    as_form:
        factored stores pairs; dense multiplies them back.
    quantise:
        Store the targeted matrices in int8 or int4, weights only, through torchao.
    dry_run:
        Print the plan and stop; =spectra goes on until ranks are known.
    seed:
        Of everything that draws numbers.
    eval_text:
        Text on which original and result are compared.
    stats:
        File of statistics: read when it exists, written when it does not.
    max_stats:
        Larger statistics are not written, in bytes.
    max_length:
        Tokens per window of calibration text.
    batch_size:
        Calibration texts per forward pass.
    probes:
        Random projections per text, for encoders under a recipe with gradients.
    device:
        Where the model runs and matrices are factored, for instance cuda.
    overwrite:
        Replace the folder once the new one is complete.
    workers:
        Matrices factorised side by side.
    threads:
        Threads of each job; another number may give other last bits.
    engine:
        local, ray, ray:ADDRESS, or torchrun (when started by torchrun).
    max_memory:
        Most memory beside Python and its libraries, for instance 2.5GiB; a plan that needs more is refused.
    calibrate:
        whole model in memory, one of its blocks at a time, or what fits into --max-memory. The sums are the same.
    """
    from ..engine import engine_named
    from ..verbs.compress import compress as run

    if out is None and dry_run is None:
        raise UsageError("compress writes a folder: give -o OUT, or --dry-run to see the plan.")
    runs = engine_named(engine, workers, threads or 1)
    made = run(
        model, recipe_given(recipe), keep, calib=calib, out=out if dry_run is None else None, form=as_form, quantise=quantise, seed=seed, dry_run={"plan": True, None: False}.get(dry_run, "spectra"),
        settings=settings or (), stats=stats,
        max_stats=max_stats, max_length=max_length, batch_size=batch_size, probes=probes, device=device, overwrite=overwrite, workers=workers, threads=threads, engine=runs, max_memory=max_memory, calibrate=calibrate,
        command=command(),
        evaluate_on=eval_text,
    )  # fmt: skip
    if not runs.leads:
        return
    if as_json:
        print_json({"plan": made.plan.to_dict(), "report": made.report, "path": str(made.path) if made.path else None})
        return
    if not quiet:
        _plan_table(made.plan)
    sentences(made.report)
    for note in made.report.get("notes", []):
        if note["text"] not in made.report["warnings"]:
            print(textwrap.fill(f"note: {note['text']}", 80, subsequent_indent="      "))
    if made.path is not None:
        print(f"model:  {made.path}\nreport: {made.path / 'report.html'}")


def _plan_table(plan: Any) -> None:
    from ..runners.budget import words

    table = plain_table()
    table.add_column("layer", overflow="fold")
    for column in ("shape", "rank", "algorithm", "bytes", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    seconds = {j.name: sum(x.seconds for s in plan.stages for x in s.jobs if x.name == j.name) for j in plan.jobs}
    for job in plan.jobs:
        rank = "dense" if job.state == "dense" else f"<= {job.cap}" if job.state == "undecided" else str(job.rank)
        table.add_row(job.name, f"{job.shape[0]}x{job.shape[1]}", rank, job.algorithm, f"{job.bytes:,}", f"{seconds[job.name]:.2f}")
    console().print(table)
    measured = "; ".join(plan.statistics) or "nothing"
    print(f"measures: {measured}. Predicted time of factorisations: {plan.seconds:.1f} s.")
    if plan.memory:
        parts = ", ".join(f"{k} {words(v)}" for k, v in sorted(plan.memory.items(), key=lambda p: -p[1]) if k != "disk")
        print(textwrap.fill(f"memory: at most {words(plan.peak)} ({parts}). Disk: {words(plan.memory['disk'])}.", 80))
