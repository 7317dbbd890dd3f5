"""`eckart inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import Flag, Json, Out, Quiet, app, command, console, plain_table, print_json, sentences

WIDE = 80  # characters of the table where the terminal does not say
ROWS = 100  # matrices from which a row stands for a role


@app.command
def inspect(
    model: str, /, *, compare: str | None = None, calib: Path | None = None, measures: str | None = None, only: str | None = None, kinds: str = "linear",
    advise: Flag = False, out: Out = None, overwrite: Flag = False, seed: int = 0, max_length: int | None = None, batch_size: int = 8, device: str | None = None,
    as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Measure a model: the spectra of its weights, what changed in another checkpoint, its activations on text.

    Parameters
    ----------
    model:
        Folder, .safetensors file, or Hub id.
    compare:
        A second one, usually the fine-tuned model.
    calib:
        Text for measures of activations: .txt (a line per text) or .jsonl.
    measures:
        Comma list; see `eckart ls --kind measure`. Without it: every one that is meant for each run and whose input is there.
    only:
        Regular expression of matrix names.
    kinds:
        Comma list of what to look at: linear, embedding, conv, other.
    advise:
        Suggest what to compress, keep, protect and adapt, where a measure was seen to predict it.
    out:
        Folder for report.html, report.json and records.json.
    overwrite:
        Replace an earlier report.
    seed:
        Of everything that draws numbers.
    max_length:
        Tokens per text; what is longer is cut.
    batch_size:
        Texts per forward pass.
    device:
        Where weights are measured and the model runs, for instance cuda.
    """
    from ..verbs.inspect import inspect as run

    if out is not None and not overwrite:
        _refuse_existing(out)
    found = run(
        model, compare, _list(measures), calib, only=(only,) if only else (), kinds=_list(kinds) or (), advise=advise, seed=seed, max_length=max_length,
        batch_size=batch_size, device=device, command=command(),
    )  # fmt: skip
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found.save_html(out / "report.html", overwrite=overwrite)
        found.save_json(out / "records.json", overwrite=overwrite)
    if as_json:
        print_json({"records": found.to_list(), "advice": found.report["advice"]} if advise else found.to_list())
        return
    if not quiet:
        _table(found.report)
        _whole(found.report)
    sentences(found.report)
    if advise:
        _advice(found.report["advice"])
    if out is not None:
        print(f"report: {out / 'report.html'}")


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _refuse_existing(out: Path) -> None:
    """Before the work, not after it."""
    from ..errors import Refused

    there = next((p for name in ("report.html", "report.json", "records.json") if (p := out / name).exists()), None)
    if there is not None:
        raise Refused(f"{there} exists, and is never replaced unasked. Choose another folder, or add --overwrite.")


def _table(report: Mapping[str, Any]) -> None:
    """A row per matrix, or per role where there are many; as many columns as fit, and what became of the others."""
    layers: Sequence[Mapping[str, Any]] = report["layers"]
    columns = sorted(report["columns"], key=lambda c: not c["main"])
    rows = [(x["name"], "x".join(map(str, x["shape"])), [_cell(x, c) for c in columns]) for x in layers]
    if len(layers) > ROWS:
        rows = _by_role(layers, columns)
    head = _common([name for name, _, _ in rows])
    width = max((len(name) for name, _, _ in rows), default=0) - len(head)
    room = console().width if console().is_terminal else WIDE
    used, shown = max(width, 6) + 1 + max((len(s) for _, s, _ in rows), default=5), 0
    for k, c in enumerate(columns):
        used += 1 + max(*(len(part) for part in _lines(c["title"])), *(len(cells[k]) for _, _, cells in rows))
        if used > room:
            break
        shown += 1
    table = plain_table()
    table.add_column(f"{head}*" if head else "matrix", overflow="fold", min_width=min(width, 24))
    table.add_column("shape", no_wrap=True)
    for c in columns[:shown]:
        table.add_column("\n".join(_lines(c["title"])), justify="right", no_wrap=True)
    for name, shape, cells in rows:
        table.add_row(name.removeprefix(head), shape, *cells[:shown])
    console().print(table)
    _footnotes(report, columns[shown:], len(layers) > ROWS)


def _footnotes(report: Mapping[str, Any], hidden: Sequence[Mapping[str, Any]], by_role: bool) -> None:
    import textwrap

    if by_role:
        print("A row is a role: the median over its matrices. --json has all of them.")
    if any(x.get("doubt") for x in report["layers"]):
        print("? not valid: the note in the report says why.")
    if hidden:
        names = ", ".join(dict.fromkeys(c["measure"] for c in hidden))
        text = f"{len(hidden)} more {'column' if len(hidden) == 1 else 'columns'} ({names}): --measures NAMES shows them here, -o DIR in a report, --json as data."
        print(textwrap.fill(text, WIDE))


def _cell(layer: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    """A number, its standard error, and a question mark where it is no result."""
    value = (layer["measures"] or {}).get(column["key"])
    doubtful = column["measure"] in layer.get("doubt", {})
    if value is None:
        return "?" if doubtful else ""
    spread = layer.get("spread", {}).get(column["key"])
    text = f"{value:.4g}" if spread is None else f"{value:.3g}±{spread:.1g}"
    return text + ("?" if doubtful else "")


def _by_role(layers: Sequence[Mapping[str, Any]], columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """A row per role: how many matrices, and the median of their valid numbers."""
    from statistics import median

    rows: list[tuple[str, str, list[str]]] = []
    for role in dict.fromkeys(x["role"] for x in layers):
        members = [x for x in layers if x["role"] == role]
        cells: list[str] = []
        for c in columns:
            known = [
                v for x in members if c["measure"] not in x.get("doubt", {}) and (v := (x["measures"] or {}).get(c["key"])) is not None
            ]
            cells.append(f"{median(known):.4g}" if known else "")
        shapes = {"x".join(map(str, x["shape"])) for x in members}
        rows.append((f"{role} ({len(members)})", shapes.pop() if len(shapes) == 1 else "several", cells))
    return rows


def _common(names: Sequence[str]) -> str:
    """The dotted part with which all but a few names begin, to be said once."""
    if len(names) < 3:
        return ""
    heads = [name.split(".") for name in names]
    most: list[str] = []
    for depth in range(1, 4):
        counts: dict[str, int] = {}
        for parts in heads:
            if len(parts) > depth:
                key = ".".join(parts[:depth]) + "."
                counts[key] = counts.get(key, 0) + 1
        best = max(counts, key=lambda k: counts[k], default="")
        if best and counts[best] >= 0.9 * len(names):
            most.append(best)
    return most[-1] if most else ""


def _lines(title: str) -> list[str]:
    """A heading in short lines."""
    import textwrap

    return textwrap.wrap(title, 10, break_long_words=False)


def _whole(report: Mapping[str, Any]) -> None:
    """Numbers about the whole model, where there are any."""
    facts = [f for f in report["facts"] if not f["module"]]
    if not facts:
        return
    table = plain_table(gap=2)
    table.add_column("whole model", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for fact in facts[:24]:
        value, spread = fact["value"], fact.get("spread")
        text = "" if value is None else value if isinstance(value, str) else f"{value:.4g}"
        text += f" ± {spread:.2g}" if spread is not None else ""
        name = f"{fact['measure']} {fact['part'] if fact['part'] != fact['measure'] else ''}".strip().replace("_", " ")
        table.add_row(name, text + ("?" if "doubt" in fact else ""))
    console().print(table)
    if len(facts) > 24:
        print(f"{len(facts) - 24} more: -o DIR, or --json.")


def _advice(advice: Mapping[str, Any]) -> None:
    import textwrap

    for s in advice["suggestions"]:
        print(textwrap.fill(f"{s['action']} {s['module']}: {s['reason']}", WIDE, subsequent_indent="    "))
    for text in advice["basis"]:
        print(textwrap.fill(text, WIDE, subsequent_indent="  "))
