"""The map of the model: one row per role, one column per block, one cell per matrix (or the mean over several, for experts)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import tables
from .markup import Markup, tag
from .schema import Layer, Report
from .svg import STEPS, bucket, drawing, nice, tick_labels
from .words import number, percent

ROOM = 1060  # pixels for labels and columns on a 1280 px screen
LABEL_WIDTH = 6.3  # of one character in the row labels
MOVED = "relative_change"  # the measure that a comparison is looked at for
LOG = 50  # ratio of the largest to the smallest number from which colours count decades


@dataclass(frozen=True)
class Measure:
    """A number per layer that the map can show; null where the layer has none.

    Args:
        key: its name in the script.
        title: in words.
        values: what is coloured.
        shown: what is written into the cells.
        share: of one.
        doubted: numbers that are no results: written, not coloured.
        group: what a list of many is sorted into.
        method: name of the measure.
        main: whether it is among the numbers to show first.
    """

    key: str
    title: str
    values: tuple[float | None, ...]
    shown: tuple[float | None, ...]
    share: bool = False
    doubted: tuple[bool, ...] = ()
    group: str = ""
    method: str = ""
    main: bool = True


@dataclass(frozen=True)
class Grid:
    """Where the layers lie: indices into `report["layers"]` per (row, column)."""

    roles: tuple[str, ...]
    blocks: tuple[int, ...]
    cells: dict[tuple[int, int], tuple[int, ...]]


def grid(layers: Sequence[Layer]) -> Grid:
    """Rows in order of first appearance, columns by block; what is outside the blocks comes last."""
    roles = tuple(dict.fromkeys(layer["role"] for layer in layers))
    blocks = tuple(sorted({layer["block"] for layer in layers}, key=lambda b: (b < 0, b)))
    row, column = {r: i for i, r in enumerate(roles)}, {b: i for i, b in enumerate(blocks)}
    cells: dict[tuple[int, int], tuple[int, ...]] = {}
    for i, layer in enumerate(layers):
        at = row[layer["role"]], column[layer["block"]]
        cells[at] = (*cells.get(at, ()), i)
    return Grid(roles, blocks, cells)


def measures(report: Report) -> list[Measure]:
    """What the map can be coloured by."""
    layers, found = report["layers"], []

    def add(key: str, title: str, values: Sequence[float | None], share: bool, shown: Sequence[float | None] | None = None) -> None:
        if any(v is not None for v in values):
            found.append(Measure(key, title, tuple(values), tuple(shown or values), share))

    ranks = [layer["rank"] if layer["state"] == "factored" else None for layer in layers]
    shares = [None if r is None else r / min(layer["shape"]) for r, layer in zip(ranks, layers, strict=True)]
    add("rank", "rank kept, as a share of min(m, n)", shares, True, ranks)
    add("error", "relative loss", [layer.get("error") for layer in layers], False)
    if report["kind"] != "inspect":
        stored = [layer["params_after"] / layer["params_before"] if layer["params_before"] else None for layer in layers]
        add("kept", "parameters stored, as a share", stored, True)
    add("energy", "energy kept", [layer.get("energy") for layer in layers], True)
    titles = {m["name"]: m["title"] for m in report.get("methods", [])}
    for c in tables.measured(report):
        values = [(layer.get("measures") or {}).get(c["key"]) for layer in layers]
        if any(v is not None for v in values):
            doubted = tuple(c["measure"] in layer.get("doubt", {}) for layer in layers)
            title = ", ".join(t for t in (c["title"], c.get("unit", "")) if t)
            group = titles.get(c["measure"], "")
            found.append(
                Measure(f"measure:{c['key']}", title, tuple(values), tuple(values), False, doubted, group, c["measure"], c["main"])
            )
    return found


def first_shown(found: Sequence[Measure]) -> Measure:
    """What the map shows before anyone chooses: how far weights moved, or else the first measure whose numbers differ and are nearly all valid."""
    good = [m for m in found if m.main and sum(m.doubted) <= len(m.doubted) // 10 and len(set(m.values)) > 1]
    return next((m for m in good if m.method == MOVED), good[0] if good else found[0])


def widths(cells: Grid) -> tuple[float, float]:
    """Of the row labels and of a column, in pixels."""
    names = min(220.0, 12 + LABEL_WIDTH * max(len(_short(r)) for r in cells.roles))
    return names, max(6.0, min(66.0, math.floor(2 * (ROOM - names) / max(1, len(cells.blocks))) / 2))


def labelled(cells: Grid) -> bool:
    """Are the columns wide enough for a number in each cell?"""
    return widths(cells)[1] >= 20


def paint(measure: Measure, cells: Grid) -> dict[str, Any]:
    """A measure as the classes and labels of the cells, in the order of `cells.cells`; the script switches maps with it."""
    doubted = [_doubted(measure, members) for members in cells.cells.values()]
    kept = [[i for i in m if d or not (measure.doubted and measure.doubted[i])] for m, d in zip(cells.cells.values(), doubted, strict=True)]
    means = [_mean([measure.values[i] for i in members]) for members in kept]
    shown = [_mean([measure.shown[i] for i in members]) for members in kept]
    marks: dict[str, Any] = {"doubt": [i for i, d in enumerate(doubted) if d], "note": ""}
    known = [v for v, d in zip(means, doubted, strict=True) if v is not None and not d]
    inside = [v for v, d, (_, c) in zip(means, doubted, cells.cells, strict=True) if v is not None and not d and cells.blocks[c] >= 0]
    beyond = [v for v in known if inside and measure.method and not min(inside) <= v <= max(inside)]
    known = inside if beyond else known  # a head of another size would leave one colour to all blocks
    labels = ["" if v is None else _label(measure, v) for v in shown]
    if not known:
        return {"key": measure.key, "title": measure.title, "low": "", "high": "", "steps": [-1] * len(means), "labels": labels, **marks}
    low, high = min(known), max(known)
    marks["note"] = "Cells outside the blocks may lie beyond the scale." if beyond else ""
    if not measure.share and low > 0 and high > LOG * low:
        span = math.log(high / low)
        steps = [-1 if v is None or d else bucket(math.log(max(v, low) / low) / span) for v, d in zip(means, doubted, strict=True)]
        title, ends = f"{measure.title} (log scale)", {"low": number(low, 2), "high": number(high, 2)}
        return {"key": measure.key, "title": title, **ends, "steps": steps, "labels": labels, **marks}
    unit = nice((high - low) / 6) if high > low else nice(abs(high) / 2 or 1.0)
    low, high = math.floor(low / unit + 1e-9) * unit, math.ceil(high / unit - 1e-9) * unit
    if high == low:  # all cells equal: the middle of the ramp
        low, high = low - unit, high + unit
    if 0 < low < 0.3 * high:
        low = 0.0
    span = high - low
    return {
        "key": measure.key,
        "title": measure.title,
        "low": _end(low, unit, measure.share),
        "high": _end(high, unit, measure.share),
        "steps": [-1 if v is None or d else bucket((v - low) / span) for v, d in zip(means, doubted, strict=True)],
        "labels": labels,
        **marks,
    }


def _doubted(measure: Measure, members: Sequence[int]) -> bool:
    """Has the cell a number, and is not one of its numbers a result?"""
    held = [i for i in members if measure.values[i] is not None]
    return bool(held) and bool(measure.doubted) and all(measure.doubted[i] for i in held)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _label(measure: Measure, value: float) -> str:
    if measure.key == "rank" or (float(value).is_integer() and all(v is None or float(v).is_integer() for v in measure.values)):
        return f"{value:.0f}"
    return percent(value, 0) if measure.share else number(value, 2)


def _end(value: float, unit: float, share: bool) -> str:
    """An end of the colour scale, with the digits of its unit."""
    if share:
        return percent(value, 0 if unit >= 0.0099 else 1)
    return tick_labels([value, unit])[0] if 1e-4 < unit < 1e5 else number(value, 3)


def rank_map(report: Report, cells: Grid, first: dict[str, Any]) -> Markup:
    """Row labels in one drawing, cells in another that scrolls under them on a narrow screen."""
    layers, many = report["layers"], len(cells.blocks)
    label_width, width = widths(cells)
    height = 30.0 if many <= 40 else 24.0
    gap = 2.0 if width >= 14 else 1.0
    top, total = 6.0, 6.0 + height * len(cells.roles) + 22.0
    body: list[Markup] = []
    for i, ((row, column), members) in enumerate(cells.cells.items()):
        step, label = first["steps"][i], first["labels"][i]
        state = _state([layers[k] for k in members], report["kind"])
        kind = "doubt" if i in first["doubt"] else f"h{step}" if step >= 0 else state
        x, y = column * width, top + row * height
        shape = tag("rect", {"x": x, "y": y, "width": width - gap, "height": height - gap, "rx": 2 if width >= 14 else 0.5})
        text = tag("text", {"class": "mid", "x": x + (width - gap) / 2, "y": y + (height - gap) / 2 + 4}, label)
        attrs = {"class": f"cell {kind}", "data-s": state, "data-r": row, "data-c": column}
        body.append(tag("g", {**attrs, "data-l": ",".join(map(str, members))}, shape, text if labelled(cells) else None))
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if s * width >= 22 or s == 500)
    for column, block in enumerate(cells.blocks):
        if block < 0 or column % stride == 0:
            where = {"class": "tick mid", "x": column * width + (width - gap) / 2, "y": total - 7}
            body.append(tag("text", where, str(block) if block >= 0 else ("other" if width >= 34 else NOT_A_BLOCK)))
    names = [
        tag("text", {"class": "rowname end", "x": label_width - 8, "y": top + r * height + (height - gap) / 2 + 4}, _short(role))
        for r, role in enumerate(cells.roles)
    ]
    names.append(tag("text", {"class": "tick end", "x": label_width - 8, "y": total - 7}, "block"))
    hatch = tag(
        "defs",
        None,
        tag(
            "pattern",
            {"id": "hatch", "width": 5, "height": 5, "patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"},
            tag("rect", {"width": 5, "height": 5, "class": "hatch-back"}),
            tag("line", {"x1": 0, "x2": 0, "y1": 0, "y2": 5, "class": "hatch-line"}),
        ),
    )
    columns = many * width + 10
    return tag(
        "div",
        {"class": "map"},
        drawing(label_width, total, "Roles", names, fluid=False),
        tag(
            "div",
            {"class": "scroll", "tabindex": -1},
            drawing(columns, total, "Map of the model, a cell per matrix", hatch, body, fluid=False, kind="heat", data="grid"),
        ),
    )


NOT_A_BLOCK = "\u2013"


def legend(report: Report, cells: Grid, first: dict[str, Any]) -> Markup:
    """The colour bar, and what a cell without colour means."""
    bar = [tag("rect", {"class": f"h{i}", "x": i * 9.0, "y": 0, "width": 9.5, "height": 10}) for i in range(STEPS)]
    keys: list[Markup] = []
    words = {"dense": "left dense", "skipped": "skipped", "none": "no number"}
    states = [_state([report["layers"][k] for k in members], report["kind"]) for members in cells.cells.values()]
    if report["kind"] == "inspect":
        words["doubt"] = "not valid: written, not coloured"
        states = ["doubt" if i in first["doubt"] else "none" if step < 0 else "" for i, step in enumerate(first["steps"])]
    for state, text in words.items():
        blank = [s == state for s in states]
        if any(blank) or (report["kind"] == "inspect" and state in ("none", "doubt")):
            unused = not any(b and step < 0 for b, step in zip(blank, first["steps"], strict=True))
            swatch = tag("g", {"class": f"cell {state}"}, tag("rect", {"x": 0.5, "y": 0.5, "width": 15, "height": 9, "rx": 2}))
            keys.append(
                tag(
                    "span",
                    {"class": "key", "data-key": state, "hidden": unused},
                    drawing(16, 10, text, swatch, fluid=False, kind="swatch"),
                    text,
                )
            )
    return tag(
        "p",
        {"class": "legend"},
        tag("span", {"class": "key"}, tag("span", {"id": "map-title"}, first["title"])),
        tag(
            "span",
            {"class": "key"},
            tag("span", {"id": "map-low"}, first["low"]),
            drawing(STEPS * 9.0, 10, "Colour scale", bar, fluid=False, kind="swatch"),
            tag("span", {"id": "map-high"}, first["high"]),
        ),
        keys,
    )


def _state(members: Sequence[Layer], kind: str) -> str:
    """What a cell without a colour means."""
    if kind == "inspect":
        return "none"
    states = {layer["state"] for layer in members}
    return states.pop() if len(states) == 1 else "factored"


def _short(role: str) -> str:
    return role if len(role) <= 32 else f"{role[:12]}\u2026{role[-19:]}"
