"""Spectra by role: singular values on log axes that all panels share, with the noise's edge, a fitted tail, and another model's values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .markup import Markup, tag
from .panels import LEFT, RIGHT, WIDTH, by_role, depth_class, heading
from .schema import Layer, Profiles
from .svg import Scale, axes, drawing, nice, path, power_label, steps, tick_labels
from .words import several

LOWEST = 1e-7  # of the largest singular value: float32 keeps about seven digits, below is rounding
HEIGHT = 236.0
MANY = 24  # lines in a panel from which they are thin

Points = list[tuple[float, float]]


def spectra(layers: Sequence[Layer]) -> Markup:
    """Singular values on log-log axes, a line per layer; what is cut away is drawn faint, behind a dot at the rank."""
    drawn = _drawn(layers)
    last = max(layers[i]["block"] for i in drawn)
    panels: list[Markup] = []
    shared = _inside(layers, drawn)
    for role, members in by_role(layers, drawn).items():
        x, y, frame = _axes([layers[i] for i in (shared if set(members) & set(shared) else members)])
        inside = [layers[i] for i in members]
        chosen = _typical(layers, members)
        lines = [_line(layers[i], i, x, y, depth_class(layers[i]["block"], last), i == chosen) for i in members]
        title = heading(role, _shapes(inside), _ranks(inside) or _marks(inside))
        kind = "spectra many" if len(members) > MANY else "spectra"
        panels.append(
            drawing(WIDTH, HEIGHT, f"Singular values of {role}", title, frame, _noise(inside, y), lines, kind=kind, data="series")
        )
    return tag("div", {"class": "panels"}, panels)


def _inside(layers: Sequence[Layer], drawn: Sequence[int]) -> list[int]:
    """The matrices whose panels share their axes: those of the roles that blocks have. A head or an embedding is of another size."""
    roles = {layers[i]["role"] for i in drawn if layers[i]["block"] >= 0}
    return [i for i in drawn if layers[i]["role"] in roles] if roles else list(drawn)


def _axes(shown: Sequence[Layer]) -> tuple[Scale, Scale, list[Markup]]:
    bottom, top = _range(shown)
    x = Scale(1, max(2, *(layer.get("spectrum_at", [])[-1] for layer in shown)), LEFT, RIGHT, log=True)
    y = Scale(bottom, top * 1.25, HEIGHT - 26, 46, log=True)
    frame = axes(x, y, [(t, power_label(t)) for t in x.ticks(4)], [(t, power_label(t)) for t in y.ticks(5)])
    frame.append(tag("text", {"class": "axis-name end", "x": LEFT - 6, "y": 37}, "\u03c3", tag("tspan", {"dy": 3, "class": "sup"}, "i")))
    frame.append(tag("text", {"class": "axis-name end", "x": LEFT - 16, "y": HEIGHT - 11.5}, "i"))
    return x, y, frame


def text(layers: Sequence[Layer]) -> str:
    """The caption that fits what is drawn."""
    drawn = [layers[i] for i in _drawn(layers)]
    alone = len(_inside(layers, _drawn(layers))) < len(drawn)
    which = "all panels of blocks" if alone else "all panels"
    parts = [f"Singular values \u03c3\u1d62 of each matrix against their index i, both on log axes that {which} share."]
    if any(layer["state"] == "factored" for layer in drawn):
        parts.append("Solid: what is kept; the dot marks the rank; faint: what is cut away.")
    else:
        parts.append("One line per matrix.")
    if any(layer.get("edge") for layer in drawn):
        parts.append("Band: where the edge of noise of the same size lies; what stands above it stands out of the noise.")
    if any(layer.get("tail") for layer in drawn):
        parts.append("Dashed: the power law fitted to the tail of one matrix in the middle, and of the one that is pointed at.")
    if any(layer.get("edge") and layer.get("outliers") for layer in drawn):
        parts.append("Dots: its values above its own edge of noise.")
    if any(layer.get("other") for layer in drawn):
        parts.append("Dotted: the compared model.")
    if clipped(layers):
        parts.append("Lines that reach the bottom go on below it.")
    return " ".join(parts)


def ratios(layers: Sequence[Layer]) -> Markup:
    """Singular values of the compared model over those of this one, so that small changes can be seen."""
    drawn = [i for i in _drawn(layers) if _ratio(layers[i])]
    last = max(layers[i]["block"] for i in drawn)
    height = 186.0
    shared = _inside(layers, drawn)
    panels: list[Markup] = []
    for role, members in by_role(layers, drawn).items():
        x, y, frame = _ratio_axes([_ratio(layers[i]) for i in (shared if set(members) & set(shared) else members)], height)
        lines = [
            tag(
                "g",
                {"class": f"ln {depth_class(layers[i]['block'], last)}", "data-l": i},
                tag("path", {"class": "kept", "d": path((x(k), y(r)) for k, r in _ratio(layers[i]))}),
            )
            for i in members
        ]
        kind = "ratios many" if len(members) > MANY else "ratios"
        title = heading(role, _shapes([layers[i] for i in members]), "")
        panels.append(drawing(WIDTH, height, f"Ratio of singular values of {role}", title, frame, lines, kind=kind, data="series"))
    return tag("div", {"class": "panels"}, panels)


def _ratio_axes(shown: Sequence[Sequence[tuple[int, float]]], height: float) -> tuple[Scale, Scale, list[Markup]]:
    low, high = _middle([r for pairs in shown for _, r in pairs])
    x = Scale(1, max(2, *(pairs[-1][0] for pairs in shown)), LEFT, RIGHT, log=True)
    y = Scale(low, high, height - 26, 34)
    fine = (ticks for n in (4, 6, 8) if len(ticks := steps(low, high, n)) > 1)
    ticks = next(fine, [low, high]) if nice((high - low) / 4) > 1e-6 else [low, high]
    frame = axes(x, y, [(t, power_label(t)) for t in x.ticks(4)], list(zip(ticks, tick_labels(ticks), strict=True)))
    frame.append(tag("line", {"class": "unity", "x1": LEFT, "x2": RIGHT, "y1": y(1), "y2": y(1)}))
    frame.append(tag("text", {"class": "axis-name end", "x": LEFT - 16, "y": height - 11.5}, "i"))
    return x, y, frame


def profiles(found: Sequence[Profiles]) -> Markup:
    """Descending lists of modules, such as the spectra of caches or of weight changes: a panel per kind, each on its own log axes."""
    last = max((line["block"] for p in found for line in p["lines"]), default=0)
    panels: list[Markup] = []
    for i, p in enumerate(found):
        lines = [line for line in p["lines"] if any(v > 0 for v in line["values"])]
        top = max(v for line in lines for v in line["values"])
        kept = sorted(v for line in lines for v in line["values"] if v > top * LOWEST)
        x = Scale(1, max(2, *(line["at"][-1] for line in lines)), LEFT, RIGHT, log=True)
        y = Scale(min(kept[len(kept) // 25], top / 10) / 1.2, top * 1.25, 186.0 - 26, 34, log=True)
        frame = axes(x, y, [(t, power_label(t)) for t in x.ticks(4)], [(t, power_label(t)) for t in y.ticks(4)])
        frame.append(tag("text", {"class": "axis-name end", "x": LEFT - 16, "y": 186 - 11.5}, "i"))
        drawn = [
            tag(
                "g",
                {"class": f"ln {depth_class(line['block'], last)}", "data-p": f"{i},{k}"},
                tag("path", {"class": "kept", "d": path(_points(line["at"], line["values"], x, y))}),
            )
            for k, line in enumerate(p["lines"])
        ]
        kind = "profile many" if len(lines) > MANY else "profile"
        panels.append(drawing(WIDTH, 186.0, p["title"], heading(p["title"], "", ""), frame, drawn, kind=kind, data="profile"))
    return tag("div", {"class": "panels"}, panels)


def compared(layers: Sequence[Layer]) -> bool:
    """Is there anything for `ratios` to draw?"""
    return any(_ratio(layers[i]) for i in _drawn(layers))


def _ratio(layer: Layer) -> list[tuple[int, float]]:
    """(index, other over this) where this one is not rounding."""
    mine = dict(zip(layer.get("spectrum_at", []), layer.get("spectrum", []), strict=True))
    other = layer.get("other")
    if not other or not mine:
        return []
    least = LOWEST * 100 * max(mine.values())
    pairs = zip(other["spectrum_at"], other["spectrum"], strict=True)
    return [(i, s / mine[i]) for i, s in pairs if mine.get(i, 0.0) > least]


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis that holds 1 and all but the most extreme ratios."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = min(1.0, ordered[cut]), max(1.0, ordered[len(ordered) - 1 - cut])
    pad = max(0.08 * (high - low), 1e-6)
    return low - pad, high + pad


def _line(layer: Layer, index: int, x: Scale, y: Scale, depth: str, shown: bool) -> Markup:
    points = _points(layer.get("spectrum_at", []), layer.get("spectrum", []), x, y)
    kind = f"ln {depth} shown" if shown else f"ln {depth}"
    other, tail = layer.get("other"), layer.get("tail")
    extra = [
        tag("path", {"class": "twin", "d": path(_points(other["spectrum_at"], other["spectrum"], x, y))}) if other else None,
        tag("path", {"class": "tail", "d": path([(x(i), y(s)) for i, s in tail])}) if tail else None,
        tag("path", {"class": "spikes", "d": spikes}) if (spikes := _spikes(layer, points)) else None,
    ]
    rank = layer["rank"] if layer["state"] == "factored" else None
    if rank is None or rank < 1 or len(points) < 2:
        return tag("g", {"class": kind, "data-l": index}, tag("path", {"class": "kept", "d": path(points)}), extra)
    cut = _at(points, x(rank))
    kept, rest = [p for p in points if p[0] < cut[0]], [p for p in points if p[0] > cut[0]]
    return tag(
        "g",
        {"class": kind, "data-l": index},
        tag("path", {"class": "rest", "d": path([cut, *rest])}) if rest else None,
        tag("path", {"class": "kept", "d": path([*kept, cut])}),
        tag("circle", {"class": "cut", "cx": cut[0], "cy": cut[1], "r": 2.6}),
        extra,
    )


def _spikes(layer: Layer, points: Points) -> str:
    """A dot for each stored value that stands out of the noise, as one path."""
    count = sum(i <= layer.get("outliers", 0) for i in layer.get("spectrum_at", [])) if layer.get("edge") else 0
    return "".join(f"{path([at])}h0" for at in points[:count])


def _points(places: Sequence[int], values: Sequence[float], x: Scale, y: Scale) -> Points:
    """In the frame; the first value below it is drawn at its bottom."""
    pairs = list(zip(places, values, strict=True))
    inside = [(x(i), y(s)) for i, s in pairs if s >= y.low]
    return inside + [(x(i), y.start) for i, s in pairs if s < y.low][:1]


def _noise(inside: Sequence[Layer], y: Scale) -> list[Markup]:
    """The band between the smallest and the largest edge of a panel."""
    edges = [e for layer in inside if (e := layer.get("edge")) and e >= y.low]
    if not edges:
        return []
    high, low = y(max(edges)), y(min(edges))
    band = tag("rect", {"class": "noise", "x": LEFT, "y": high, "width": RIGHT - LEFT, "height": max(1.5, low - high)})
    return [band, tag("text", {"class": "noise-name end", "x": RIGHT - 4, "y": min(low + 12, y.start - 3)}, "noise")]


def _typical(layers: Sequence[Layer], members: Sequence[int]) -> int | None:
    """The matrix in the middle of those with a fitted tail, or else with an edge of noise: the one whose marks are drawn before anybody points."""
    fitted = [i for i in members if layers[i].get("tail")] or [i for i in members if layers[i].get("edge")]
    return fitted[len(fitted) // 2] if fitted else None


def clipped(layers: Sequence[Layer]) -> bool:
    """Does a spectrum leave the frame of `spectra` at the bottom?"""
    shared = _inside(layers, _drawn(layers))
    apart = [[layers[i] for i in m] for m in by_role(layers, [i for i in _drawn(layers) if i not in set(shared)]).values()]
    groups = [[layers[i] for i in shared], *apart]
    return any(layer.get("spectrum", [])[-1] < _range(group)[0] for group in groups for layer in group)


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


def _marks(members: Sequence[Layer]) -> str:
    """How many matrices have a tail that a power law fits, where tails were fitted at all."""
    measured = [layer for layer in members if "alpha" in (layer.get("measures") or {})]
    if not measured:
        return ""
    fitted = sorted((layer.get("measures") or {}).get("alpha") or 0.0 for layer in members if layer.get("tail"))
    if not fitted:
        return "no power law"
    span = f"{fitted[0]:.1f}" if f"{fitted[0]:.1f}" == f"{fitted[-1]:.1f}" else f"{fitted[0]:.1f}\u2013{fitted[-1]:.1f}"
    return f"\u03b1 {span} ({len(fitted)} of {len(measured)})"
