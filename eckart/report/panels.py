"""Small multiples: a panel per role, all on the same axes, so that panels can be compared by eye."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from .markup import Markup, tag
from .schema import Curve, Layer
from .svg import STEPS, Scale, axes, bucket, drawing, nice, path, power_label, steps, tick_labels
from .words import NONE, number, several

WIDTH, LEFT, RIGHT = 320.0, 42.0, 318.0
LOWEST = 1e-7  # of the largest singular value: float32 keeps about seven digits, below is rounding


def by_role(layers: Sequence[Layer], indices: Sequence[int]) -> dict[str, list[int]]:
    """Layer indices per role, early blocks first."""
    found: dict[str, list[int]] = {}
    for i in indices:
        found.setdefault(layers[i]["role"], []).append(i)
    return {role: sorted(members, key=lambda i: (layers[i]["block"], i)) for role, members in found.items()}


def depth_class(layer: Layer, last: int) -> str:
    """The colour class of a block; neutral outside the blocks."""
    return "dn" if layer["block"] < 0 else f"d{bucket(layer['block'] / last if last else 0.5)}"


def depth_legend(layers: Sequence[Layer]) -> Markup | None:
    """Colour bar from the first block to the last; nothing for a model without depth."""
    last = max((layer["block"] for layer in layers), default=0)
    if last < 1:
        return None
    bar = [tag("rect", {"class": f"d{i} fill", "x": i * 9.0, "y": 0, "width": 9.5, "height": 10}) for i in range(STEPS)]
    svg = drawing(STEPS * 9.0, 10, "Colour of depth", bar, fluid=False, kind="swatch")
    return tag("span", {"class": "key"}, "block 0", svg, str(last))


def spectra(layers: Sequence[Layer]) -> Markup:
    """Singular values on log-log axes, a line per layer; what is cut away is drawn faint, behind a dot at the rank."""
    drawn = _drawn(layers)
    bottom, top = _range([layers[i] for i in drawn])
    longest = max(layers[i].get("spectrum_at", [])[-1] for i in drawn)
    last = max(layers[i]["block"] for i in drawn)
    height = 236.0
    x = Scale(1, max(2, longest), LEFT, RIGHT, log=True)
    y = Scale(bottom, top * 1.25, height - 26, 46, log=True)
    frame = axes(x, y, [(t, power_label(t)) for t in x.ticks(4)], [(t, power_label(t)) for t in y.ticks(5)])
    frame.append(tag("text", {"class": "axis-name end", "x": LEFT - 6, "y": 37}, "\u03c3", tag("tspan", {"dy": 3, "class": "sup"}, "i")))
    frame.append(tag("text", {"class": "axis-name end", "x": LEFT - 16, "y": height - 11.5}, "i"))
    panels: list[Markup] = []
    for role, members in by_role(layers, drawn).items():
        lines = [_spectrum(layers[i], i, x, y, depth_class(layers[i], last)) for i in members]
        title = _head(role, _shapes([layers[i] for i in members]), _ranks([layers[i] for i in members]))
        kind = "spectra many" if len(members) > 24 else "spectra"
        panels.append(drawing(WIDTH, height, f"Singular values of {role}", title, frame, lines, kind=kind, data="series"))
    return tag("div", {"class": "panels"}, panels)


def _spectrum(layer: Layer, index: int, x: Scale, y: Scale, depth: str) -> Markup:
    points = [(x(i), y(s)) for i, s in zip(layer.get("spectrum_at", []), layer.get("spectrum", []), strict=True) if s >= y.low]
    points += [(x(i), y.start) for i, s in zip(layer.get("spectrum_at", []), layer.get("spectrum", []), strict=True) if s < y.low][:1]
    rank = layer["rank"] if layer["state"] == "factored" else None
    if rank is None or rank < 1 or len(points) < 2:
        return tag("g", {"class": f"ln {depth}", "data-l": index}, tag("path", {"class": "kept", "d": path(points)}))
    cut = _at(points, x(rank))
    kept, rest = [p for p in points if p[0] < cut[0]], [p for p in points if p[0] > cut[0]]
    return tag(
        "g",
        {"class": f"ln {depth}", "data-l": index},
        tag("path", {"class": "rest", "d": path([cut, *rest])}) if rest else None,
        tag("path", {"class": "kept", "d": path([*kept, cut])}),
        tag("circle", {"class": "cut", "cx": cut[0], "cy": cut[1], "r": 2.6}),
    )


def clipped(layers: Sequence[Layer]) -> bool:
    """Does a spectrum leave the frame of `spectra` at the bottom?"""
    drawn = [layers[i] for i in _drawn(layers)]
    bottom, _ = _range(drawn)
    return any(layer.get("spectrum", [])[-1] < bottom for layer in drawn)


def _drawn(layers: Sequence[Layer]) -> list[int]:
    return [i for i, layer in enumerate(layers) if any(v > 0 for v in layer.get("spectrum", []))]


def _range(drawn: Sequence[Layer]) -> tuple[float, float]:
    """Lowest and highest value in the frame: the last few of a spectrum plunge, and would flatten all the rest. Cuts stay in."""
    top = max(layer.get("spectrum", [])[0] for layer in drawn)
    values = sorted(v for layer in drawn for v in layer.get("spectrum", []) if v > top * LOWEST)
    cuts = [_value(layer) for layer in drawn if layer["state"] == "factored"]
    floor = min([values[len(values) // 25], *(c for c in cuts if c > top * LOWEST)])
    return max(values[0], min(floor, top / 10) / 1.5) / 1.1, top


def _value(layer: Layer) -> float:
    """The singular value at the rank, or the next one that is stored."""
    at, values = layer.get("spectrum_at", []), layer.get("spectrum", [])
    return next((v for i, v in zip(at, values, strict=True) if i >= (layer["rank"] or 1)), values[-1])


def _at(points: Sequence[tuple[float, float]], where: float) -> tuple[float, float]:
    """The point of a polyline at an x coordinate; its end when the line stops before."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= where <= x1:
            return where, y0 + (y1 - y0) * ((where - x0) / (x1 - x0) if x1 > x0 else 0.0)
    return points[-1] if where > points[-1][0] else points[0]


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
        title = _head(role, f"mean {number(average, 3)}", "")
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


def _head(role: str, right: str, below: str) -> list[Markup]:
    name = role if len(role) <= 28 else f"{role[:10]}\u2026{role[-17:]}"
    return [
        tag("text", {"class": "panel-name", "x": 0, "y": 13}, name),
        tag("text", {"class": "panel-note end", "x": RIGHT, "y": 13}, right),
        tag("text", {"class": "panel-note end", "x": RIGHT, "y": 28}, below) if below else Markup(""),
    ]


def _shapes(members: Sequence[Layer]) -> str:
    shapes = sorted({tuple(layer["shape"]) for layer in members})
    return f"{shapes[0][0]} \u00d7 {shapes[0][1]}" if len(shapes) == 1 else several(len(shapes), "shape")


def _ranks(members: Sequence[Layer]) -> str:
    ranks = [layer["rank"] for layer in members if layer["state"] == "factored" and layer["rank"] is not None]
    dense = sum(layer["state"] == "dense" for layer in members)
    parts: list[str] = []
    if ranks:
        parts.append(f"rank {ranks[0]}" if min(ranks) == max(ranks) else f"rank {min(ranks)}\u2013{max(ranks)}")
        if dense:
            parts.append(f"{dense} left dense")
    return ", ".join(parts)


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
        marks = [tag("circle", {"class": "dot", "cx": px, "cy": py, "r": 3.2}) for px, py in places]
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
