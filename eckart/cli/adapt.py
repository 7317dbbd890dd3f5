"""`eckart adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import UsageError
from .base import Flag, Json, Out, Quiet, Settings, app, command, console, plain_table, print_json, sentences

Names = Annotated[list[str] | None, Parameter(negative="")]


@app.command
def adapt(
    model: str, /, *, out: Out = None, recipe: str = "lora", rank: float | None = None, data: Path | None = None, compare: str | None = None,
    init_only: Annotated[bool, Parameter(name="--init-only", negative="")] = False, calib: Path | None = None, target: Names = None,
    variant: str | None = None, glue: Names = None, alpha: str | None = None, base: str | None = None, settings: Settings = None,
    steps: int = 200, lr: float | None = None, batch_size: int = 8, accumulate: int = 1, length: int = 256,
    eval_text: Annotated[Path | None, Parameter(name="--eval")] = None, seed: int = 0, cache: Path | None = None, device: str | None = None,
    overwrite: Flag = False, as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Fine-tune a model through small adapters, or only initialise them.

    Parameters
    ----------
    model:
        Folder or Hub id.
    out:
        Adapter folder to write; with --compare a folder of them.
    recipe:
        A name from `eckart ls --verb adapt`.
    rank:
        Triples of each matrix, or a share of its smaller side.
    data:
        Training text: .txt (a line per text) or .jsonl.
    compare:
        Comma list of recipes to run under one protocol; "corda:kpm" is a variant, "pissa+lora_pro" a recipe with glue.
    init_only:
        Write the initialised adapter and train nothing; the model is streamed.
    calib:
        Calibration text, for recipes that measure something; training text by default.
    target:
        Names (or ends of names) of layers; may be repeated.
    variant:
        Named form of the recipe.
    glue:
        Recipe whose training pieces act beside; may be repeated.
    alpha:
        Numerator of the scale: a number, "r" or "2r".
    base:
        subtract leaves the weights alone, mutate takes the initial branch out of them.
    steps:
        Of the optimiser.
    lr:
        Peak learning rate; the recipe's own by default.
    batch_size:
        Rows per forward pass.
    accumulate:
        Forward passes per step.
    length:
        Tokens per row.
    eval_text:
        Text to score on; the last tenth of the data by default.
    seed:
        Of everything that draws numbers.
    cache:
        Folder of singular triples that adapters of this base share.
    device:
        Where the model runs, for instance cuda.
    overwrite:
        Replace an earlier adapter folder.
    """
    if out is None:
        raise UsageError("adapt writes a folder: give -o OUT.")
    if init_only == (data is not None):
        raise UsageError("adapt either trains (--data FILE) or initialises (--init-only): give one of them.")
    if compare is not None and init_only:
        raise UsageError("--compare trains every recipe: it needs --data, not --init-only.")
    hush()
    how: dict[str, Any] = {"target": target, "alpha": _number(alpha), "calib": calib}
    if init_only:
        from ..hub.peft.offline import initialise

        found = initialise(
            model, recipe, rank, out=out, variant=variant, glue=glue or (), base=base, settings=settings or (), seed=seed, cache=cache, device=device,
            batch_size=batch_size, overwrite=overwrite, **how,
        )  # fmt: skip
        if as_json:
            print_json(
                {"path": str(found.path), "ranks": found.ranks, "records": found.records, "trained": found.trained, "total": found.total}
            )
            return
        if not quiet:
            ranks = sorted(set(found.ranks.values()))
            spread = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            print(
                f"{len(found.ranks)} matrices at rank {spread}; {found.trained:,} numbers train, {found.trained / found.total:.2%} of the model's."
            )
        print(f"adapter: {found.path}")
        return
    if cache is not None:
        raise UsageError("--cache serves --init-only; a fine-tune has the model in memory.")
    if compare is not None and recipe != "lora":
        raise UsageError(f"--recipe and --compare exclude each other: add {recipe} to the list of --compare.")
    if compare is not None and variant is not None:
        raise UsageError("--variant names a form of one recipe; with --compare write it behind its name: corda:kpm.")
    from ..hub.peft.train import Protocol, finetune
    from ..hub.peft.train import compare as run_all

    protocol = Protocol(steps=steps, batch_size=batch_size, accumulate=accumulate, length=length, lr=lr, seed=seed, device=device)
    shared: dict[str, Any] = {
        "out": out, "protocol": protocol, "held_out": eval_text, "overwrite": overwrite, "command": command(), "glue": glue or (), "base": base,
        "settings": settings or (), **how,
    }  # fmt: skip
    if compare is not None:
        names = [n.strip() for n in compare.split(",") if n.strip()]
        report = run_all(model, data, names, rank, **shared)
    else:
        report = finetune(model, data, recipe, rank, variant=variant, **shared)
    if as_json:
        print_json(report)
        return
    if not quiet:
        _table(report)
    sentences(report)
    print(f"adapter{'s' if compare else ''}: {out}\nreport: {out / 'report.html'}")


def hush() -> None:
    """Keep what libraries say about themselves while they are imported off the screen; what they say of the run stays."""
    import logging
    import warnings

    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)


def _number(text: str | None) -> float | str | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _table(report: dict[str, Any]) -> None:
    for data in report["tables"]:
        table = plain_table(gap=2)
        for i, column in enumerate(data["columns"]):
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in data["rows"]:
            table.add_row(*(f"{v:,}" if isinstance(v, int) else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
        console().print(table)
        print(data["note"] + "\n")
