"""`eckart search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from ..errors import UsageError
from .base import Flag, Json, Out, Quiet, app, command, console, plain_table, print_json, recipe_given, sentences

if TYPE_CHECKING:
    from ..verbs.search import Found

SHOWN = 8  # candidates of a size in the terminal; the report has all


@app.command
def search(
    model: str, /, *, out: Out = None, keep: str = "0.6", calib: Path | None = None,
    recipe: Annotated[list[str] | None, Parameter(negative="")] = None, evaluations: int | None = None, rungs: int | None = None, time_limit: float | None = None,
    goal: Literal["task", "original"] = "task", seed: int = 0, eval_text: Annotated[Path | None, Parameter(name="--eval")] = None,
    dry_run: Annotated[Literal["plan"] | None, Parameter(name="--dry-run")] = None, max_length: int | None = None, batch_size: int = 8, probes: int = 3,
    device: str | None = None, threads: int | None = None, overwrite: Flag = False, as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Find the mix of recipes that loses least on a model, and compress with it.

    Parameters
    ----------
    model:
        Folder or Hub id.
    out:
        Folder to write: the winner, or with several sizes a folder for each.
    keep:
        Share of the targeted layers' parameters that is stored, or several: 0.8,0.6,0.4.
    calib:
        Calibration text: .txt (a line per text) or .jsonl. Every fourth text is held out to judge on.
    recipe:
        A candidate, by name or as a YAML file; may be repeated. Left out: a grid of mixes and the recipes of the papers.
    evaluations:
        Budget at each size: models that are made and judged. Left out: enough for all candidates.
    rungs:
        Stop after so many rungs, as an earlier search did.
    time_limit:
        Stop after the rung in which so many seconds have passed; the report names the number of rungs that repeats it.
    goal:
        task is the next token's loss, for encoders the distance from the original; original is that distance always.
    seed:
        Of everything that draws numbers.
    eval_text:
        Text on which originals and winners are compared.
    dry_run:
        Print what would be tried and stop.
    max_length:
        Tokens per window of calibration text.
    batch_size:
        Calibration texts per forward pass.
    probes:
        Random projections per text, for encoders under recipes with gradients.
    device:
        Where the model runs and matrices are factored, for instance cuda.
    threads:
        Threads of torch; another number may give other last bits.
    overwrite:
        Replace the folder once the new one is complete.
    """
    from ..verbs.search import search as run

    if out is None and dry_run is None:
        raise UsageError("search writes a folder: give -o OUT, or --dry-run to see what would be tried.")
    if calib is None:
        raise UsageError("search judges candidates on text, and there is none. Give --calib FILE.")
    found = run(
        model, _sizes(keep), calib=calib, out=out if dry_run is None else None, recipes=None if recipe is None else [recipe_given(r) for r in recipe],
        evaluations=evaluations, rungs=rungs, time_limit=time_limit, goal=goal, seed=seed, dry_run=dry_run is not None, max_length=max_length,
        batch_size=batch_size, probes=probes, device=device, threads=threads, evaluate_on=eval_text, overwrite=overwrite, command=command(),
    )  # fmt: skip
    if as_json:
        print_json({"report": found.report, "path": str(found.path) if found.path else None})
        return
    if not quiet:
        _tables(found)
    sentences(found.report)
    if found.path is not None:
        many = len(found.winners) > 1
        for size in found.winners:
            print(f"model:  {found.path / f'keep-{size:g}' if many else found.path}")
        print(f"report: {found.path / 'search.html'}")


def _sizes(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--keep {text}: expected a share such as 0.6, or several: 0.8,0.6,0.4.") from None


def _tables(found: Found) -> None:
    """The best candidates of each size."""
    for size in dict.fromkeys(r.keep for r in found.rows):
        rows = [r for r in found.rows if r.keep == size]
        few = rows[:SHOWN] if found.winners else rows
        table = plain_table(gap=2)
        table.add_column(f"candidate at {size:.0%}", overflow="fold")
        for column in ("stored", "loss", "batches", ""):
            table.add_column(column, justify="right", no_wrap=True)
        for row in few:
            mark = "frontier" if row in found.frontier else "refused" if row.why else ""
            known = row.loss is not None
            table.add_row(
                row.recipe, f"{row.stored:.3f}" if known else "", f"{row.loss:.4f}" if known else "", str(row.batches or ""), mark
            )
        console().print(table)
        if len(rows) > len(few):
            print(f"... and {len(rows) - len(few)} more")
        print()
