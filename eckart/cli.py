"""The command line. Thin: it parses, calls a verb, and prints. Listing and help work without importing torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from . import __version__
from .errors import EckartError, UsageError

app = App(
    name="eckart",
    version=__version__,
    help="Read and shrink neural networks through the singular values of their weights.",
    help_format="plaintext",
)
app.register_install_completion_command(help="Install completion for your shell.")

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON document and nothing else.")]
Quiet = Annotated[bool, Parameter(name="--quiet", negative="", help="Print nothing but the result.")]
Settings = Annotated[
    list[str] | None, Parameter(name="--set", negative="", help="axis.field=value, for instance budget.rank=8; may be repeated.")
]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 usage, 3 refused input, 4 incomplete."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    tokens = ["--dry-run=plan" if t == "--dry-run" else t for t in tokens]
    mode: Literal["auto", "none"] = "none" if {"--quiet", "--json"} & set(tokens) else "auto"
    from .progress import shown

    try:
        with shown(mode):
            app(tokens, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        sys.exit(2)
    except EckartError as error:
        print(f"eckart: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader (`head`, `less`) has seen enough
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        print("eckart: interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(4)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False, default=str))


@app.command
def ls(*, verb: str | None = None, kind: str | None = None, as_json: Json = False) -> None:
    """List every system.

    Parameters
    ----------
    verb:
        Only those of a verb, for instance compress.
    kind:
        Only those of a kind: recipe or measure.
    """
    from dataclasses import asdict

    from .registry import list_entries

    rows = list_entries(kind, verb)
    if as_json:
        _print_json([asdict(r) for r in rows])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("name", "verb", "fidelity", "what it is"):
        table.add_column(column, overflow="fold", no_wrap=column != "what it is")
    for row in rows:
        table.add_row(row.name, row.verb, row.fidelity, row.summary)
    _console().print(table)


@app.command
def show(name: str, /, *, as_json: Json = False) -> None:
    """Show one system: its axes, defaults, and what differs from the paper.

    Parameters
    ----------
    name:
        A name from `eckart ls`.
    """
    from dataclasses import asdict

    from .registry import entry, get_recipe

    found = entry(name)
    if found.kind != "recipe":
        if as_json:
            _print_json(asdict(found))
            return
        print(
            f"{found.name} ({found.kind})\n{found.title}, {found.paper}\n\n{found.summary}\n\nRun it: eckart inspect MODEL --measures {found.name}"
        )
        return
    import yaml

    from .axes.border import PLAIN, to_dict

    recipe = get_recipe(name)
    if as_json:
        _print_json({**asdict(found), "recipe": to_dict(recipe)})
        return
    import textwrap

    needs = sorted({f"{s.kind} at {s.at} ({s.via})" for s in recipe.needs()})
    lines = [f"{recipe.name} ({recipe.verb}), {recipe.fidelity}", f"{recipe.title}, {recipe.paper}", "", found.summary]
    if recipe.differs:
        lines += ["", *textwrap.wrap(f"Differs: {recipe.differs}", 78)]
    choices = {k: v for k, v in to_dict(recipe).items() if k not in PLAIN}
    lines += ["", f"Measures: {', '.join(needs) or 'nothing, it needs no data'}", "", yaml.safe_dump(choices, sort_keys=False)]
    print("\n".join(lines))


@app.command
def inspect(
    model: str, /, *, out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None, measures: str | None = None, only: str | None = None, overwrite: Annotated[bool, Parameter(negative="")] = False,
    as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Measure the spectra of a model's weights.

    Parameters
    ----------
    model:
        Folder or Hub id.
    out:
        Folder for report.html and report.json.
    measures:
        Comma list; see `eckart ls --kind measure`. All by default.
    only:
        Regular expression of module names.
    overwrite:
        Replace an earlier report.
    """
    from dataclasses import asdict

    from .verbs.inspect import inspect as run

    found = run(model, [m.strip() for m in measures.split(",")] if measures else None, only=(only,) if only else ())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found.save_html(out / "report.html", overwrite=overwrite)
    if as_json:
        _print_json([asdict(r) for r in found.records])
        return
    if not quiet:
        _layers_table(found.report["layers"])
    _sentences(found.report)
    if out is not None:
        print(f"report: {out / 'report.html'}")


@app.command
def compress(
    model: str, /, *, out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None, recipe: str = "svd_llm", keep: float | None = None,
    calib: Path | None = None, settings: Settings = None, as_form: Annotated[Literal["factored", "dense"], Parameter(name=("--form", "--as"))] = "factored",
    dry_run: Annotated[Literal["plan", "spectra"] | None, Parameter(name="--dry-run")] = None, seed: int = 0, eval_text: Annotated[Path | None, Parameter(name="--eval")] = None,
    stats: Path | None = None,
    max_stats: int = 4 << 30, max_length: int | None = None, batch_size: int = 8, probes: int = 3, device: str | None = None, overwrite: Annotated[bool, Parameter(negative="")] = False, workers: int = 1,
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
        Where the model runs for statistics, for instance cuda.
    overwrite:
        Replace the folder once the new one is complete.
    workers:
        Matrices factorised side by side.
    """
    from .axes.border import from_yaml
    from .verbs.compress import compress as run

    if out is None and dry_run is None:
        raise UsageError("compress writes a folder: give -o OUT, or --dry-run to see the plan.")
    what: Any = recipe
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise UsageError(f"--recipe {recipe}: no such file. Names without .yaml are looked up; `eckart ls` shows them.")
        what = from_yaml(path.read_text(encoding="utf-8"))
    made = run(
        model, what, keep, calib=calib, out=out if dry_run is None else None, form=as_form, seed=seed, dry_run={"plan": True, None: False}.get(dry_run, "spectra"),
        settings=settings or (), stats=stats,
        max_stats=max_stats, max_length=max_length, batch_size=batch_size, probes=probes, device=device, overwrite=overwrite, workers=workers, command=_command(),
        evaluate_on=eval_text,
    )  # fmt: skip
    if as_json:
        _print_json({"plan": made.plan.to_dict(), "report": made.report, "path": str(made.path) if made.path else None})
        return
    if not quiet:
        _plan_table(made.plan)
    _sentences(made.report)
    if made.path is not None:
        print(f"model:  {made.path}\nreport: {made.path / 'report.html'}")


@app.command(name="eval")
def evaluate(
    model: str, /, *, text: Path, against: str | None = None, context: int | None = None, batch_size: int = 8, device: str | None = None, as_json: Json = False, quiet: Quiet = False
) -> None:  # fmt: skip
    """Score a model on text: bits per byte for language models, fidelity of embeddings for encoders.

    Parameters
    ----------
    model:
        Folder or Hub id.
    text:
        .txt (a line per text) or .jsonl.
    against:
        The original, to compare with; needed for encoders.
    context:
        Tokens per window, BOS included.
    batch_size:
        Rows per forward pass.
    device:
        Where the models run.
    """
    from .verbs.evaluate import evaluate as run

    found = run(model, text, against=against, context=context, batch_size=batch_size, device=device)
    if as_json:
        _print_json(found)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("metric", "original", "this model"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for row in found["rows"]:
        table.add_row(row["metric"], "" if row["before"] is None else f"{row['before']:.4f}", f"{row['after']:.4f}")
    _console().print(table)
    if not quiet:
        print(f"{found['rows'][0]['text']}: {found['rows'][0]['note']}")


@app.command
def verify(folder: Path, /, *, against: str | None = None, as_json: Json = False) -> None:
    """Check every byte of a folder that eckart wrote.

    Parameters
    ----------
    folder:
        What to check.
    against:
        The source: copied tensors must equal it, and none may be missing.
    """
    from .errors import Refused
    from .store import verify as run

    found = run(folder, against)
    if as_json:
        _print_json({"ok": found.ok, "problems": list(found.problems), "tensors": found.tensors, "bytes": found.bytes})
    elif found.ok:
        print(f"{folder}: {found.tensors} tensors, {found.bytes:,} bytes, all as recorded.")
    if not found.ok:
        raise Refused("\n".join((f"{folder}: not as recorded.", *found.problems)))


@app.command
def demo(
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = Path("eckart-demo"),
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    as_json: Json = False,
) -> None:
    """Run the main job on the bundled model and write a report.

    Parameters
    ----------
    out:
        Folder for the compressed models and the report.
    overwrite:
        Replace results of an earlier demo.
    """
    from .verbs.demo import demo as run

    report = run(out, overwrite=overwrite)
    if as_json:
        _print_json(report)
        return
    from rich.table import Table

    for data in report["tables"]:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i, column in enumerate(data["columns"]):
            table.add_column(column, justify="left" if i in (0, 5) else "right", overflow="fold")
        for row in data["rows"]:
            table.add_row(row[0], f"{row[1]:.0%}", f"{row[2]:.1%}", f"{row[3]:.4f}", f"{row[4]:.2f}", row[5])
        _console().print(table)
        print(data["note"] + "\n")
    _sentences(report)
    print(f"\nReloaded through AutoModelForCausalLM, it writes:\n{report['notes'][0]['text']}\n")
    print(f"report: {out / 'report.html'}")


def _command() -> str:
    import shlex

    return shlex.join(["eckart", *sys.argv[1:]])


def _sentences(report: dict[str, Any]) -> None:
    import textwrap

    for line in report["verdict"]:
        print(textwrap.fill(line, 80))
    for line in report.get("warnings", []):
        print(textwrap.fill(f"note: {line}", 80, subsequent_indent="      "))


def _layers_table(layers: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    names = list(layers[0].get("measures") or {}) if layers else []
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold", min_width=24)
    table.add_column("shape", no_wrap=True)
    for name in names:  # "rank at 90% energy" is headed "90%": the line below the table says of what
        table.add_column(name.removeprefix("rank at ").removesuffix(" energy"), justify="right")
    for row in layers:
        found = row.get("measures") or {}
        table.add_row(row["name"], "x".join(map(str, row["shape"])), *("" if found.get(n) is None else f"{found[n]:.4g}" for n in names))
    _console().print(table)
    if any("%" in name for name in names):
        print("Columns with a percentage: how many singular values hold that share of the energy.")


def _plan_table(plan: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for column in ("shape", "rank", "algorithm", "bytes", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    seconds = {j.name: sum(x.seconds for s in plan.stages for x in s.jobs if x.name == j.name) for j in plan.jobs}
    for job in plan.jobs:
        rank = "dense" if job.state == "dense" else f"<= {job.cap}" if job.state == "undecided" else str(job.rank)
        table.add_row(job.name, f"{job.shape[0]}x{job.shape[1]}", rank, job.algorithm, f"{job.bytes:,}", f"{seconds[job.name]:.2f}")
    _console().print(table)
    measured = "; ".join(plan.statistics) or "nothing"
    print(f"measures: {measured}. Predicted time of factorisations: {plan.seconds:.1f} s.")


if __name__ == "__main__":
    main()
