"""HTML and SVG that cannot be injected into: every string is escaped unless `tag` made it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping

# Control characters and lone surrogates have no place in HTML; bidirectional overrides would let a tensor name display as another one.
_BAD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
_EMPTY = frozenset({"meta", "link", "br", "wbr", "input"})  # HTML forbids a closing tag
_LEAF = frozenset({"path", "rect", "circle", "line"})  # SVG: short form

Attr = str | int | float | bool | None


class Markup(str):
    """Text that is HTML already; `tag` and `escape` are the only makers of it from data."""

    __slots__ = ()


def visible(text: object) -> str:
    """Plain text with what a reader could not see replaced by U+FFFD."""
    return _BAD.sub("\ufffd", str(text).replace("\r\n", "\n"))


def escape(text: object) -> Markup:
    """Text safe inside an element and inside a quoted attribute."""
    return Markup(html.escape(visible(text), quote=True))


def tag(name: str, attrs: Mapping[str, Attr] | None = None, *children: object) -> Markup:
    """One element. Attributes that are None or False are left out; children that are not `Markup` are escaped.

    Example:
        >>> print(tag("p", {"class": "x"}, "a < b"))
        <p class="x">a &lt; b</p>
    """
    parts = [f"<{name}"]
    for key, value in (attrs or {}).items():
        if value is None or value is False:
            continue
        parts.append(f" {key}" if value is True else f' {key}="{escape(_short(value))}"')
    if name in _EMPTY:
        return Markup("".join([*parts, ">"]))
    inner = join(children)
    if not inner and name in _LEAF:
        return Markup("".join([*parts, "/>"]))
    return Markup("".join([*parts, ">", inner, f"</{name}>"]))


def join(children: Iterable[object]) -> Markup:
    """The children one after another; None is nothing, lists are flattened, text is escaped."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str | int | float):
            parts.append(escape(child))
        elif isinstance(child, Iterable):
            parts.append(join(child))  # pyright: ignore[reportUnknownArgumentType]
        else:
            raise TypeError(f"markup: expected text or elements, found {type(child).__name__}")
    return Markup("".join(parts))


def _short(value: Attr) -> str:
    """Coordinates to a tenth of a pixel: half the bytes, and the same text on every platform."""
    return coordinate(value) if isinstance(value, float) else str(value)


def coordinate(value: float) -> str:
    """A number with at most one decimal; never "-0".

    Example:
        >>> coordinate(3.0), coordinate(-0.01), coordinate(2.25)
        ('3', '0', '2.2')
    """
    text = f"{value:.1f}"
    text = text[:-2] if text.endswith(".0") else text
    return "0" if text == "-0" else text
