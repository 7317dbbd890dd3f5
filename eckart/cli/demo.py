"""`eckart demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .base import Flag, Json, app, console, plain_table, print_json, sentences


@app.command
def demo(
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = Path("eckart-demo"),
    overwrite: Flag = False,
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
    from ..verbs.demo import demo as run

    report = run(out, overwrite=overwrite)
    if as_json:
        print_json(report)
        return
    for data in report["tables"]:
        table = plain_table(gap=2)
        for i, column in enumerate(data["columns"]):
            table.add_column(column, justify="left" if i in (0, 5) else "right", overflow="fold")
        for row in data["rows"]:
            table.add_row(row[0], f"{row[1]:.0%}", f"{row[2]:.1%}", f"{row[3]:.4f}", f"{row[4]:.2f}", row[5])
        console().print(table)
        print(data["note"] + "\n")
    sentences(report)
    print(f"\nReloaded through AutoModelForCausalLM, it writes:\n{report['notes'][0]['text']}\n")
    print(f"report: {out / 'report.html'}")
