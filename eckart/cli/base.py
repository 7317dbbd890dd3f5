"""What the commands share: the application, options that several of them have, and how things are printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from .. import __version__
from ..errors import UsageError

app = App(
    name="eckart",
    version=__version__,
    help="Read, shrink and tune neural networks through the singular values of their weights.",
    help_format="plaintext",
)
app.register_install_completion_command(help="Install completion for your shell.")

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON document and nothing else.")]
Quiet = Annotated[bool, Parameter(name="--quiet", negative="", help="Print nothing but the result.")]
Flag = Annotated[bool, Parameter(negative="")]
Out = Annotated[Path | None, Parameter(name=("--out", "-o"))]
Settings = Annotated[
    list[str] | None, Parameter(name="--set", negative="", help="axis.field=value, for instance budget.rank=8; may be repeated.")
]


def console() -> Any:
    """The terminal, or what stands in for it."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def plain_table(*, gap: int = 1) -> Any:
    """A table without lines, `gap` blanks between its columns."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))


def print_json(data: Any) -> None:
    """One JSON document."""
    print(json.dumps(data, indent=1, ensure_ascii=False, default=str))


def recipe_given(given: str) -> Any:
    """A recipe as `--recipe` takes it: the name, or what a YAML file says.

    Raises:
        UsageError: there is no such file, or it holds no recipe.
    """
    from ..axes.border import from_yaml

    if not given.endswith((".yaml", ".yml")):
        return given
    path = Path(given)
    if not path.is_file():
        raise UsageError(f"--recipe {given}: no such file. Names without .yaml are looked up; `eckart ls` shows them.")
    return from_yaml(path.read_text(encoding="utf-8"))


def command() -> str:
    """The command line as it can be typed again."""
    import shlex

    return shlex.join(["eckart", *sys.argv[1:]])


def sentences(report: dict[str, Any]) -> None:
    """Verdict and warnings of a report."""
    import textwrap

    for line in report["verdict"]:
        print(textwrap.fill(line, 80))
    for line in report.get("warnings", []):
        print(textwrap.fill(f"note: {line}", 80, subsequent_indent="      "))
