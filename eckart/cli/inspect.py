"""`eckart inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Flag, Json, Out, Quiet, app, console, plain_table, print_json, sentences


@app.command
def inspect(
    model: str, /, *, out: Out = None, measures: str | None = None, only: str | None = None, overwrite: Flag = False,
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

    from ..verbs.inspect import inspect as run

    found = run(model, [m.strip() for m in measures.split(",")] if measures else None, only=(only,) if only else ())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found.save_html(out / "report.html", overwrite=overwrite)
    if as_json:
        print_json([asdict(r) for r in found.records])
        return
    if not quiet:
        _layers_table(found.report["layers"])
    sentences(found.report)
    if out is not None:
        print(f"report: {out / 'report.html'}")


def _layers_table(layers: Sequence[dict[str, Any]]) -> None:
    names = list(layers[0].get("measures") or {}) if layers else []
    table = plain_table()
    table.add_column("layer", overflow="fold", min_width=24)
    table.add_column("shape", no_wrap=True)
    for name in names:  # "rank at 90% energy" is headed "90%": the line below the table says of what
        table.add_column(name.removeprefix("rank at ").removesuffix(" energy"), justify="right")
    for row in layers:
        found = row.get("measures") or {}
        table.add_row(row["name"], "x".join(map(str, row["shape"])), *("" if found.get(n) is None else f"{found[n]:.4g}" for n in names))
    console().print(table)
    if any("%" in name for name in names):
        print("Columns with a percentage: how many singular values hold that share of the energy.")
