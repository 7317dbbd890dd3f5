"""Small multiples: a panel per role, all on the same axes, so that panels can be compared by eye."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .markup import Markup, tag
from .schema import Curve, Layer
from .svg import STEPS, Scale, axes, bucket, drawing, nice, path, steps, tick_labels
from .words import NONE, number

WIDTH, LEFT, RIGHT = 320.0, 42.0, 318.0
FEW = 40  # points of a curve that get a dot each


def by_role(layers: Sequence[Layer], indices: Sequence[int]) -> dict[str, list[int]]:
    """Layer indices per role, early blocks first."""
    found: dict[str, list[int]] = {}
    for i in indices:
        found.setdefault(layers[i]["role"], []).append(i)
    return {role: sorted(members, key=lambda i: (layers[i]["block"], i)) for role, members in found.items()}


def depth_class(block: int, last: int) -> str:
    """The colour class of a block; neutral outside the blocks."""
    return "dn" if block < 0 else f"d{bucket(block / last if last else 0.5)}"


def depth_legend(layers: Sequence[Layer]) -> Markup | None:
    """Colour bar from the first block to the last; nothing for a model without depth."""
    last = max((layer["block"] for layer in layers), default=0)
    if last < 1:
        return None
    bar = [tag("rect", {"class": f"d{i} fill", "x": i * 9.0, "y": 0, "width": 9.5, "height": 10}) for i in range(STEPS)]
    svg = drawing(STEPS * 9.0, 10, "Colour of depth", bar, fluid=False, kind="swatch")
    return tag("p", {"class": "legend"}, tag("span", {"class": "key"}, "block 0", svg, str(last)))


def losses(layers: Sequence[Layer]) -> Markup:
    """Relative loss by depth; the other roles stay behind in grey, so that every panel is read against the whole."""
    drawn = [i for i, layer in enumerate(layers) if layer.get("error") is not None]
    blocks = [layers[i]["block"] for i in drawn]
    first, last = min(blocks), max(blocks)
    highest = max(_error(layers[i]) for i in drawn) or 1.0
    height = 162.0
    pad = 0.5 if last > first else 1.0
    x = Scale(first - pad, last + pad, LEFT, RIGHT)
    y = Scale(0, nice(highest / 4) * math.ceil(highest / nice(highest / 4) - 1e-9), height - 26, 32)
    whole = [t for t in steps(max(0, first), last, 6) if float(t).is_integer()] if last > max(0, first) else [float(last)]
    whole = sorted({*whole, float(first)}) if first < 0 else whole
    frame = axes(x, y, [(t, f"{t:.0f}" if t >= 0 else NONE) for t in whole], list(zip(y.ticks(4), tick_labels(y.ticks(4)), strict=True)))
    frame.append(tag("text", {"class": "axis-name end", "x": LEFT - 6, "y": height - 11.5}, "block"))
    roles = by_role(layers, drawn)
    means = {role: path([(x(b), y(e)) for b, e in _means(layers, members)]) for role, members in roles.items()}
    panels: list[Markup] = []
    for role, members in roles.items():
        behind = tag("path", {"class": "behind", "d": "".join(d for other, d in means.items() if other != role)})
        line = tag("path", {"class": "front", "d": means[role]})
        dots = [_dot(layers[i], i, x, y) for i in members]
        average = sum(_error(layers[i]) for i in members) / len(members)
        title = heading(role, f"mean {number(average, 3)}", "")
        crowded = len({layers[i]["block"] for i in members}) < len(members)
        kind = "losses cloud" if crowded else "losses many" if len(members) > 40 else "losses"
        panels.append(
            drawing(WIDTH, height, f"Relative loss of {role} by block", title, frame, behind, line, dots, kind=kind, data="series")
        )
    return tag("div", {"class": "panels"}, panels)


def _dot(layer: Layer, index: int, x: Scale, y: Scale) -> Markup:
    state = "dot" if layer["state"] == "factored" else "dot hollow"
    return tag("circle", {"class": state, "data-l": index, "cx": x(layer["block"]), "cy": y(_error(layer)), "r": 2.8})


def _error(layer: Layer) -> float:
    return layer.get("error") or 0.0


def _means(layers: Sequence[Layer], members: Sequence[int]) -> list[tuple[int, float]]:
    found: dict[int, list[float]] = {}
    for i in members:
        if layers[i]["block"] >= 0:
            found.setdefault(layers[i]["block"], []).append(_error(layers[i]))
    return [(block, sum(values) / len(values)) for block, values in sorted(found.items())]


def heading(role: str, right: str, below: str) -> list[Markup]:
    """Name of a panel, a remark beside it, and one below that."""
    room = max(28, 40 - len(right))  # characters
    name = role if len(role) <= room else f"{role[: room - 18]}\u2026{role[-17:]}"
    return [
        tag("text", {"class": "panel-name", "x": 0, "y": 13}, name),
        tag("text", {"class": "panel-note end", "x": RIGHT, "y": 13}, right),
        tag("text", {"class": "panel-note end", "x": RIGHT, "y": 28}, below) if below else Markup(""),
    ]


def curve(data: Curve) -> Markup:
    """A line chart with its lines named at their ends."""
    points = [(p[0], p[1]) for s in data["series"] for p in s["points"]]
    width, height, right = 640.0, 300.0, 440.0
    span = [(min(v), max(v)) for v in zip(*points, strict=True)]
    (x0, x1), (y0, y1) = [(a, b) if b > a else (a - 0.5, b + 0.5) for a, b in span]
    if y0 >= 0 and y0 < 0.4 * y1:
        y0 = 0.0
    unit = nice((y1 - y0) / 5)
    x = Scale(x0, x1, 56, right)
    y = Scale(math.floor(y0 / unit + 1e-9) * unit, math.ceil(y1 / unit - 1e-9) * unit, height - 44, 26)
    frame = [list(zip(t, tick_labels(t), strict=True)) for t in (steps(x0, x1, 6), y.ticks(5))]
    body: list[object] = [axes(x, y, frame[0], frame[1])]
    body.append(tag("text", {"class": "axis-name", "x": 0, "y": 12}, data["y"]))
    body.append(tag("text", {"class": "axis-name end", "x": right, "y": height - 12}, data["x"]))
    ends = [max(((x(p[0]), y(p[1])) for p in s["points"]), key=lambda p: p[0]) for s in data["series"]]
    means = [sum(y(p[1]) for p in s["points"]) / len(s["points"]) for s in data["series"]]
    heights = _apart([at for _, at in ends], means, 17.0)
    for k, series in enumerate(data["series"]):
        places = [(x(p[0]), y(p[1])) for p in series["points"]]
        marks = [tag("circle", {"class": "dot", "cx": px, "cy": py, "r": 3.2}) for px, py in places] if len(places) <= FEW else []
        sample = tag("path", {"class": "curve", "d": path([(right + 14, heights[k]), (right + 28, heights[k])])})
        name = tag("text", {"class": "end-label", "x": right + 34, "y": heights[k] + 4}, series["name"])
        body.append(tag("g", {"class": f"c{k % 8}"}, tag("path", {"class": "curve", "d": path(places)}), marks, sample, name))
    names = [tag("span", {"class": f"key c{k % 8}"}, tag("span", {"class": "line"}), s["name"]) for k, s in enumerate(data["series"])]
    chart = tag("div", {"class": "scroll"}, drawing(width, height, data["title"], body, kind="curve-plot"))
    return tag("div", None, chart, tag("p", {"class": "legend narrow"}, names))


def _apart(places: Sequence[float], means: Sequence[float], gap: float) -> list[float]:
    """Label heights pushed down until none overlaps the one above; lines that end together are named in the order they mostly lie in."""
    moved, above = list(places), -math.inf
    for k in sorted(range(len(places)), key=lambda k: (round(places[k]), means[k], k)):
        moved[k] = above = max(places[k], above + gap)
    return moved
