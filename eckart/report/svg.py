"""Scales, ticks and paths: the arithmetic of a chart.

No colour is named here: classes carry it, and style.css holds each one twice, for light and for dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .markup import Markup, coordinate, tag

STEPS = 16  # classes h0..h15 (heat) and d0..d15 (depth) in style.css


@dataclass(frozen=True)
class Scale:
    """A number to a coordinate, linear or logarithmic. Values outside are clamped to the ends.

    Args:
        low, high: the data's ends.
        start, end: their coordinates in pixels (end < start for an axis that points up).
        log: decades instead of units; low must then be positive.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * min(1.0, max(0.0, self.share(value)))

    def share(self, value: float) -> float:
        """Where the value lies between low (0) and high (1)."""
        if self.log:
            return math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low) if self.high > self.low else 0.0
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the scale, about `count` of them."""
        return decades(self.low, self.high, count) if self.log else steps(self.low, self.high, count)


def steps(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten.

    Example:
        >>> steps(0, 1, 5)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    unit = nice((high - low) / max(1, count))
    first = math.ceil(low / unit - 1e-9)
    return [round(k * unit, 12) for k in range(first, math.floor(high / unit + 1e-9) + 1)]


def nice(value: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below `value`."""
    base = 10.0 ** math.floor(math.log10(value))
    return next(round(base * m, 15) for m in (1, 2, 5, 10) if base * m >= value * (1 - 1e-9))


def decades(low: float, high: float, count: int = 5) -> list[float]:
    """Powers of ten, every second or third one when there are many; threes, or twos and fives, between them on a short axis.

    Example:
        >>> decades(1, 400), decades(0.2, 4), decades(1, 4)
        ([1.0, 10.0, 100.0], [0.3, 1.0, 3.0], [1.0, 2.0])
    """
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / max(1, count)))
    powers = [10.0**k for k in range(first, last + 1) if k % stride == 0]
    if len(powers) >= 3:
        return powers
    between = [
        [
            round(m * 10.0**k, 12 - k)
            for k in range(first - 1, last + 1)
            for m in multiples
            if low * (1 - 1e-9) <= m * 10.0**k <= high * (1 + 1e-9)
        ]
        for multiples in ((1, 3), (1, 2, 5))
    ]
    return between[0] if len(between[0]) >= 3 else between[1]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Ticks of a linear axis, all with the decimals that the finest one needs.

    Example:
        >>> tick_labels([0.0, 0.25, 1.0])
        ['0', '0.25', '1.00']
    """
    decimals = max((len(f"{v:.6f}".rstrip("0").split(".")[1]) for v in values), default=0)
    return ["0" if v == 0 else f"{v:,.{decimals}f}".replace("-", "\u2212") for v in values]


def path(points: Iterable[tuple[float, float]]) -> str:
    """The `d` of a polyline."""
    return "".join(f"{'L' if i else 'M'}{coordinate(x)} {coordinate(y)}" for i, (x, y) in enumerate(points))


def bucket(share: float, count: int = STEPS) -> int:
    """A share of 1 as a class number, 0 to count - 1."""
    return min(count - 1, max(0, round(share * (count - 1))))


def power_label(value: float) -> list[object]:
    """A tick of a log axis: plain from 0.01 to 1000, a power of ten beyond."""
    if 0.0099 <= value <= 10_000:
        return [f"{value:g}"]
    exponent = math.floor(math.log10(value) + 1e-9)
    lead = value / 10.0**exponent
    sign = "\u2212" if exponent < 0 else ""
    front = "10" if abs(lead - 1) < 1e-6 else f"{lead:g}\u00b710"
    return [front, tag("tspan", {"dy": "-4", "class": "sup"}, f"{sign}{abs(exponent)}")]


def axes(x: Scale, y: Scale, x_ticks: Sequence[tuple[float, object]], y_ticks: Sequence[tuple[float, object]]) -> list[Markup]:
    """Hairlines and tick labels: horizontal rules across, short ticks below, nothing else."""
    left, right, bottom = min(x.start, x.end), max(x.start, x.end), max(y.start, y.end)
    parts: list[Markup] = []
    for value, label in y_ticks:
        at = y(value)
        parts.append(tag("line", {"class": "rule", "x1": left, "x2": right, "y1": at, "y2": at}))
        parts.append(tag("text", {"class": "tick end", "x": left - 6, "y": at + 3.5}, label))
    parts.append(tag("line", {"class": "axis", "x1": left, "x2": right, "y1": bottom, "y2": bottom}))
    for value, label in x_ticks:
        at = x(value)
        parts.append(tag("line", {"class": "axis", "x1": at, "x2": at, "y1": bottom, "y2": bottom + 3.5}))
        parts.append(tag("text", {"class": "tick mid", "x": at, "y": bottom + 14.5}, label))
    return parts


def drawing(width: float, height: float, label: str, *children: object, fluid: bool = True, kind: str = "", data: str = "") -> Markup:
    """The svg element: it scales with its column, or keeps its pixels inside a scrolling frame when `fluid` is False."""
    attrs: dict[str, str | float | None] = {
        "class": f"plot {kind}".strip(),
        "viewBox": f"0 0 {coordinate(width)} {coordinate(height)}",
        "role": "group",
        "aria-label": label,
        "data-nav": data or None,
    }
    if not fluid:
        attrs |= {"width": coordinate(width), "height": coordinate(height)}
    return tag("svg", attrs, *children)
