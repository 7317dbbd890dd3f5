"""The tables of the report: before and after, sizes, every layer, and whatever else a verb adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .markup import Markup, tag
from .schema import Column as Measured
from .schema import Evaluation, Layer, Report, Scalar, Sizes, Table
from .words import NONE, large, number, percent, signed, size

ARROW = "\u2192"
STATES = {"factored": "factored", "dense": "dense", "skipped": "skipped"}


def evaluation(rows: Sequence[Evaluation]) -> Markup:
    """Before and after; the change is said in words as well as in colour."""
    body: list[Markup] = []
    for row in rows:
        verdict, change = judge(row)
        about = "; ".join(t for t in (row.get("text"), f"{row['better']} is better") if t)
        what = [tag("div", {"class": "name"}, row["metric"]), tag("div", {"class": "sub"}, f"{about}. {row.get('note', '')}".strip())]
        cells = [
            tag("th", {"scope": "row"}, what),
            tag("td", {"class": "num"}, number(row["before"])),
            tag("td", {"class": "num strong"}, number(row["after"])),
            tag("td", {"class": f"num {verdict}"}, change, tag("span", {"class": "sub"}, verdict)),
        ]
        body.append(tag("tr", None, cells))
    return framed(heads("Metric", "Before#", "After#", "Change#"), body, "Before and after")


def judge(row: Evaluation) -> tuple[str, str]:
    """`("worse", "+12.3%")`: which way a metric went, and how far."""
    before, after = row["before"], row["after"]
    if before is None or after is None:
        return "", NONE
    if before == after:
        return "same", "0"
    good = (after < before) == (row["better"] == "lower")
    change = f"{signed(100 * (after - before) / abs(before))}%" if before else signed(after - before)
    return ("better" if good else "worse"), change


def sizes(data: Sizes) -> Markup:
    """Bars of what is stored: the track is before, the fill after."""
    rows = [
        ("Targeted matrices", data["targeted_before"], data["targeted_after"], large, "parameters"),
        ("Whole model", data["total_before"], data["total_after"], large, "parameters"),
        ("On disk", data["bytes_before"], data["bytes_after"], size, ""),
    ]
    body: list[Markup] = []
    for title, before, after, words, unit in rows:
        largest = max(before, after, 1)
        bar = tag(
            "svg",
            {"class": "bar", "viewBox": "0 0 100 10", "preserveAspectRatio": "none", "aria-hidden": "true"},
            tag("rect", {"class": "track", "width": 100.0 * before / largest, "height": 10}),
            tag("rect", {"class": "filled", "width": f"{100.0 * after / largest:.2f}", "height": 10}),
        )
        share = percent(after / before) if before else NONE
        text = tag("span", {"class": "amounts"}, f"{words(before)} {ARROW} ", tag("b", None, words(after)), f" {unit}")
        body.append(tag("div", {"class": "size"}, tag("span", {"class": "name"}, title), bar, tag("b", {"class": "share"}, share), text))
    return tag("div", {"class": "sizes"}, body)


@dataclass(frozen=True)
class Column:
    """A column of the table of matrices; the script sorts by `key` (see `values` in script.js)."""

    key: str
    title: str
    numeric: bool
    cell: Callable[[Layer], object]


WHICH = (
    Column("name", "Matrix", False, lambda x: breakable(x["name"])),
    Column("block", "Block", True, lambda x: str(x["block"]) if x["block"] >= 0 else NONE),
    Column("role", "Role", False, lambda x: x["role"]),
    Column("shape", "Shape", True, lambda x: f"{x['shape'][0]:,} \u00d7 {x['shape'][1]:,}"),
)
STATE = Column(
    "state", "State", False, lambda x: [STATES[x["state"]], tag("div", {"class": "sub"}, x.get("reason")) if x.get("reason") else None]
)
BEFORE = Column("before", "Params", True, lambda x: large(x["params_before"]))
CUT = (
    Column("rank", "Rank", True, lambda x: _rank(x)),
    STATE,
    BEFORE,
    Column("after", "Stored", True, lambda x: large(x["params_after"])),
    Column("kept", "Kept", True, lambda x: percent(x["params_after"] / x["params_before"] if x["params_before"] else None)),
    Column("error", "Rel. loss", True, lambda x: number(x.get("error"))),
    Column("certificate", "Certificate", False, lambda x: str((x.get("certificate") or {}).get("kind", NONE))),
)


def measured(report: Report) -> list[Measured]:
    """The columns of numbers that the layers have, also where a report does not describe them."""
    if "columns" in report:
        return report.get("columns", [])
    names = sorted({name for layer in report["layers"] for name in (layer.get("measures") or {})})
    return [{"key": n, "measure": n, "title": n.replace("_", " "), "main": True} for n in names]


def columns(report: Report) -> list[Column]:
    """What was cut, for a run that cut; what was measured, for one that only looked."""
    if report["kind"] != "inspect":
        return [*WHICH, *CUT]
    found = [c for c in WHICH if c.key != "role"] + [_of(c) for c in measured(report) if c["main"]]  # the name ends in the role
    return [*found, STATE] if any(x["state"] == "skipped" or x.get("reason") for x in report["layers"]) else found


def _of(c: Measured) -> Column:
    return Column(f"measure:{c['key']}", c["title"], True, lambda x: estimate(x, c["key"], c["measure"]))


def estimate(layer: Layer, key: str, measure: str) -> object:
    """A number with its standard error, and whether it is a result at all."""
    value, spread = (layer.get("measures") or {}).get(key), layer.get("spread", {}).get(key)
    text = number(value) if spread is None else f"{number(value)} \u00b1 {number(spread, 2)}"
    return judged(text, layer.get("doubt", {}).get(measure), value is not None)


def judged(text: str, doubt: str | None, shown: bool) -> object:
    """A number that is no result is pale, has a question mark, and says why."""
    return text if doubt is None else tag("span", {"class": "doubtful", "title": doubt}, text, " ?" if shown else "")


def layers(report: Report) -> Markup:
    """A row per matrix; the script sorts and filters the rows that are here."""
    shown = columns(report)
    heads = [
        tag("th", {"scope": "col", "class": "num" if c.numeric else None, "data-k": c.key}, tag("button", {"type": "button"}, c.title))
        for c in shown
    ]
    body: list[Markup] = []
    for i, layer in enumerate(report["layers"]):
        cells = [tag("td", {"class": "num" if c.numeric else None}, c.cell(layer)) for c in shown[1:]]
        name = tag("th", {"scope": "row", "class": "mono"}, shown[0].cell(layer))
        body.append(tag("tr", {"data-l": i, "tabindex": -1}, name, cells))
    table = tag(
        "table",
        {"class": "layers", "id": "layer-table"},
        tag("caption", {"class": "unseen"}, "Every matrix of the run"),
        tag("thead", None, tag("tr", None, heads)),
        tag("tbody", None, body),
    )
    return tag("div", {"class": "scroll tall", "tabindex": "0", "role": "region", "aria-label": "Table of all matrices"}, table)


def _rank(layer: Layer) -> object:
    if layer["state"] != "factored" or layer["rank"] is None:
        return NONE
    return [number(layer["rank"]), tag("span", {"class": "of"}, f" / {min(layer['shape']):,}")]


def breakable(name: str) -> list[object]:
    """Long dotted names may break after a dot on a narrow screen."""
    parts = name.split(".")
    return [[part, ".", tag("wbr")] if i < len(parts) - 1 else part for i, part in enumerate(parts)]


def other(table: Table) -> Markup:
    """A table as a verb gave it; columns that hold numbers are set to the right."""
    rows = table["rows"]
    numeric = [
        all(_is_number(r[k]) or r[k] is None for r in rows) and any(_is_number(r[k]) for r in rows) for k in range(len(table["columns"]))
    ]
    heads = [tag("th", {"scope": "col", "class": "num" if n else None}, c) for c, n in zip(table["columns"], numeric, strict=True)]
    texts = [_column([r[k] for r in rows]) if n else [_cell(r[k]) for r in rows] for k, n in enumerate(numeric)]
    body = [
        tag("tr", None, [tag("td", {"class": "num" if n else None}, c[i]) for c, n in zip(texts, numeric, strict=True)])
        for i in range(len(rows))
    ]
    return framed(tag("tr", None, heads), body, table["title"])


def pairs(data: Iterable[tuple[str, Scalar]]) -> Markup:
    """Names and their values."""
    return tag("dl", None, [tag("div", None, tag("dt", None, k), tag("dd", None, _cell(v))) for k, v in data])


def framed(head: Markup, body: Sequence[Markup], caption: str) -> Markup:
    """A table in a frame that scrolls sideways where the screen is narrow."""
    table = tag("table", None, tag("caption", {"class": "unseen"}, caption), tag("thead", None, head), tag("tbody", None, list(body)))
    return tag("div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": caption}, table)


def heads(*titles: str) -> Markup:
    """Column heads; "#" marks a column of numbers."""
    return tag("tr", None, [tag("th", {"scope": "col", "class": "num" if t.endswith("#") else None}, t.rstrip("#")) for t in titles])


def _is_number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _column(values: Sequence[Scalar]) -> list[str]:
    """Numbers with the same decimals where they have a like size, so that they can be compared down the column."""
    floats = [float(v) for v in values if isinstance(v, int | float)]
    if all(isinstance(v, int) for v in values if v is not None) or any(v and not 1e-3 <= abs(v) < 1e4 for v in floats):
        return [_cell(v) for v in values]
    decimals = max(len(f"{float(f'{v:.4g}'):.6f}".rstrip("0").split(".")[1]) for v in floats)
    return [NONE if v is None else f"{float(v):,.{decimals}f}".replace("-", "\u2212") for v in values]


def _cell(value: Scalar) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else number(value)
