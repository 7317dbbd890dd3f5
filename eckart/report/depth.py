"""Numbers by depth: a small chart each, a line for the blocks or a line per role, with standard errors where there are any."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .markup import Markup, tag
from .panels import LEFT, RIGHT, WIDTH, heading
from .schema import Depth, Method, Point, Trace
from .svg import Scale, axes, drawing, nice, path, power_label, steps, tick_labels
from .words import NONE, several

HEIGHT, TOP = 178.0, 46.0
WORDS = 58  # characters of the line below a heading
COLOURS = 8
FEW = 40  # points of a line that get a dot each
DECADES = 50  # ratio of the largest to the smallest number from which the axis counts decades


def charts(found: Sequence[Depth], methods: Sequence[Method]) -> list[Markup]:
    """All charts, with one colour per role throughout. The first number of each measure is open to view, the others can be unfolded."""
    colours, titles = colour_of(found), {m["name"]: m["title"] for m in methods}
    drawn = [(d["main"], _chart(d, i, colours, titles.get(d["measure"], ""))) for i, d in enumerate(found)]
    first, rest = [c for main, c in drawn if main], [c for main, c in drawn if not main]
    out = [tag("div", {"class": "panels"}, first)] if first else []
    if rest:
        words = tag("summary", None, f"{several(len(rest), 'further number')} of the same measures")
        out.append(tag("details", {"class": "more"}, words, tag("div", {"class": "panels"}, rest)))
    return out


def colour_of(found: Sequence[Depth]) -> dict[str, str]:
    """The colour class of each line, by its name; a line alone has the accent."""
    names = dict.fromkeys(t["name"] for d in found if len(d["traces"]) > 1 for t in d["traces"])
    return {name: f"c{i % COLOURS}" for i, name in enumerate(names)}


def legend(found: Sequence[Depth]) -> Markup | None:
    """Which colour is which role."""
    colours = colour_of(found)
    if not colours:
        return None
    names = [tag("span", {"class": f"key {kind}"}, tag("span", {"class": "line"}), name) for name, kind in colours.items()]
    return tag("p", {"class": "legend"}, names)


def doubted(found: Sequence[Depth]) -> bool:
    """Is a point drawn that is no result?"""
    return any("doubt" in p and p["value"] is not None for d in found for t in d["traces"] for p in t["points"])


def _chart(d: Depth, index: int, colours: dict[str, str], what: str) -> Markup:
    points = [p for t in d["traces"] for p in t["points"] if p["value"] is not None]
    first, last = min(p["block"] for p in points), max(p["block"] for p in points)
    pad = 0.5 if last > first else 1.0
    x = Scale(first - pad, last + pad, LEFT, RIGHT)
    y, ticks = _up(points)
    whole = [t for t in steps(max(0, first), last, 6) if float(t).is_integer()] if last > max(0, first) else [float(last)]
    whole = sorted({*whole, float(first)}) if first < 0 else whole
    body: list[object] = [
        heading(d["title"], ", ".join(t for t in (_of(d), d.get("unit", "")) if t), ""),
        tag("text", {"class": "what", "x": 0, "y": 27}, what if len(what) <= WORDS else f"{what[: WORDS - 1].rstrip()}\u2026"),
        axes(x, y, [(t, f"{t:.0f}" if t >= 0 else NONE) for t in whole], ticks),
        tag("text", {"class": "axis-name end", "x": LEFT - 6, "y": HEIGHT - 11.5}, "block"),
    ]
    body += [_trace(t, f"{index},{k}", x, y, colours[t["name"]] if len(d["traces"]) > 1 else "") for k, t in enumerate(d["traces"])]
    return drawing(WIDTH, HEIGHT, f"{d['title']} by block", body, kind="by-depth", data="depth")


def _of(d: Depth) -> str:
    """What the lines are of."""
    if len(d["traces"]) > 1:
        return "by role"
    name = d["traces"][0]["name"]
    return "" if name == "block" else name


def _up(points: Sequence[Point]) -> tuple[Scale, list[tuple[float, object]]]:
    """The axis that fits the numbers and their errors."""
    values = [v for p in points if (v := p["value"]) is not None]
    ends = [v + s * p.get("spread", 0.0) for p in points if (v := p["value"]) is not None for s in (-1, 1)]
    if min(values) > 0 and max(values) > DECADES * min(values):
        y = Scale(min(values) / 1.2, max(values) * 1.2, HEIGHT - 26, TOP, log=True)
        return y, [(t, power_label(t)) for t in y.ticks(4)]
    low, high = min(ends), max(ends)
    if high == low:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    if 0 < low < 0.4 * high:
        low = 0.0
    unit = nice((high - low) / 4)
    y = Scale(math.floor(low / unit + 1e-9) * unit, math.ceil(high / unit - 1e-9) * unit, HEIGHT - 26, TOP)
    ticks = y.ticks(4)
    plain = 1e-4 < unit < 1e6
    return y, [(t, label) for t, label in zip(ticks, tick_labels(ticks) if plain else [f"{t:.1e}" for t in ticks], strict=True)]


def _trace(trace: Trace, index: str, x: Scale, y: Scale, colour: str) -> Markup:
    """A line; what is no result is hollow and not joined, errors are bars of one standard error to each side."""
    known = [p for p in trace["points"] if p["value"] is not None]
    good = [(x(p["block"]), y(_value(p))) for p in known if "doubt" not in p]
    marks: list[Markup] = []
    for p in known:
        at, up, spread = x(p["block"]), y(_value(p)), p.get("spread")
        if spread:
            marks.append(tag("line", {"class": "error", "x1": at, "x2": at, "y1": y(_value(p) - spread), "y2": y(_value(p) + spread)}))
        if "doubt" in p:
            marks.append(tag("circle", {"class": "dot hollow", "cx": at, "cy": up, "r": 2.6}))
        elif len(known) <= FEW:
            marks.append(tag("circle", {"class": "dot", "cx": at, "cy": up, "r": 2.4}))
    line = tag("path", {"class": "curve", "d": path(good)}) if len(good) > 1 else None
    return tag("g", {"class": f"trace {colour}".strip(), "data-t": index}, line, marks)


def _value(point: Point) -> float:
    return point["value"] or 0.0
