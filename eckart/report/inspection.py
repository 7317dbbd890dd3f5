"""What only a report of measures has: advice, facts about the whole model, how each measure was taken, and the panel of one matrix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .links import link, paper_address
from .markup import Markup, escape, tag
from .schema import Advice, Fact, Method, Report
from .tables import breakable, framed, heads, judged
from .words import number, several

ACTIONS = {
    "compress": "Compress these first",
    "keep": "Leave these alone when you compress",
    "protect": "Keep these in more bits when you quantise",
    "adapt": "Adapt these",
}
FACTS = 12  # numbers of a card
FIDELITY = {"exact": "", "variant": "A variant of the paper", "idea": "Built on the idea of the paper"}


def advice(found: Advice) -> Iterator[Markup]:
    """Suggestions by action, and what they rest on; an action without evidence says so."""
    if not found["suggestions"]:
        yield tag("p", None, "No suggestion: nothing that was measured here is known to predict its outcome.")
    for action, title in ACTIONS.items():
        rows = [s for s in found["suggestions"] if s["action"] == action]
        if rows:
            yield tag("h3", None, title)
            body = [
                tag(
                    "tr",
                    None,
                    tag("td", {"class": "num"}, str(i)),
                    tag("th", {"scope": "row", "class": "mono"}, breakable(s["module"])),
                    tag("td", None, s["reason"], tag("span", {"class": "sub"}, "measured by " + ", ".join(s["measures"]))),
                )
                for i, s in enumerate(rows, 1)
            ]
            yield framed(heads("#", "Matrix", "Because"), body, title)
    if found["basis"]:
        yield tag("h3", None, "What this rests on")
        yield tag("ul", {"class": "basis"}, [tag("li", None, text) for text in found["basis"]])


def facts(found: Sequence[Fact], methods: Sequence[Method]) -> Markup:
    """Numbers that belong to no matrix and no block: a card per measure and module."""
    titles = {m["name"]: m["title"] for m in methods}
    groups: dict[tuple[str, str], list[Fact]] = {}
    for fact in found:
        groups.setdefault((fact["measure"], fact["module"]), []).append(fact)
    return tag("div", {"class": "cards"}, [_facts(titles.get(name, name), module, rows) for (name, module), rows in groups.items()])


def _facts(title: str, module: str, rows: Sequence[Fact]) -> Markup:
    pairs: list[Markup] = []
    for fact in rows[:FACTS]:
        spread, value = fact.get("spread"), fact["value"]
        text = value if isinstance(value, str) else number(value)
        text = text if spread is None else f"{text} \u00b1 {number(spread, 2)}"
        head, dot, tail = fact["part"].partition(" ")
        name = head.replace("_", " ") + dot + tail or "value"
        pairs.append(tag("div", None, tag("dt", None, name), tag("dd", None, judged(text, fact.get("doubt"), value is not None))))
    notes = dict.fromkeys(n for f in rows if (n := f.get("doubt") or f.get("note")))
    more = len(rows) - FACTS
    return tag(
        "div",
        {"class": "card"},
        tag("h3", None, title, tag("span", {"class": "sub mono"}, " ", breakable(module)) if module else None),
        tag("dl", None, pairs),
        tag("p", {"class": "sub"}, f"{more} further numbers are in the data of this page.") if more > 0 else None,
        [tag("p", {"class": "sub"}, n) for n in notes],
    )


def methods(found: Sequence[Method]) -> Markup:
    """A card per measure: estimator, settings, caveat, how often it was valid, and the paper."""
    return tag("div", {"class": "methods"}, [_method(m) for m in found])


def _method(m: Method) -> Markup:
    address = paper_address(m["paper"])
    source = link(address, m["paper"]) if address else escape(m["paper"])
    total = m["valid"] + m["invalid"]
    unit = f" Unit: {m['unit']}." if m["unit"] else ""
    count = several(total, "result") if not m["invalid"] else f"{m['valid']:,} of {several(total, 'result')} valid"
    lines: list[object] = [
        tag("h3", None, m["title"], " ", tag("code", None, m["name"])),
        tag("p", None, tag("b", None, "How: "), raised(m["estimator"]), f" ({m['settings']})" if m["settings"] else "", "."),
        tag("p", None, tag("b", None, "Mind: "), m["note"], ".") if m["note"] else None,
    ]
    other = " ".join(_sentence(t) for t in (FIDELITY[m["fidelity"]], m["differs"]) if t)
    lines.append(tag("p", None, tag("b", None, "Differs: "), coded(other)) if other else None)
    why = f" Not valid: {'; '.join(m['reasons'])}." if m["reasons"] else ""
    lines.append(tag("p", {"class": "sub"}, f"{unit.strip()} {count}.{why} ".lstrip(), source))
    return tag("div", {"class": "method", "data-m": m["name"]}, lines)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."


def raised(text: str) -> str:
    """Powers of one digit as they are printed: s^2 becomes s\u00b2."""
    return re.sub(r"\^([0-9])(?![0-9])", lambda m: "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[int(m[1])], text)


def coded(text: str) -> list[object]:
    """Text whose `words in backticks` are set as code."""
    return [tag("code", None, part) if i % 2 else part for i, part in enumerate(text.split("`"))]


def caption(report: Report, name: str, more: str) -> Markup | None:
    """Estimator and caveat of a measure, below the map that shows it; the script changes it with the map."""
    found = next((m for m in report.get("methods", []) if m["name"] == name), None)
    if found is None:
        return None
    return tag("p", {"class": "note", "id": "map-note"}, f"{sentence(found)} {more}".strip())


def sentence(m: Method) -> str:
    """A measure in a line: what it is, its caveat, and how often it says something."""
    note = f" Mind: {m['note']}." if m["note"] else ""
    count = f" Valid in {m['valid']:,} of {m['valid'] + m['invalid']:,}." if m["invalid"] else ""
    return f"{m['title']}: {raised(m['estimator'])}.{note}{count}"


def one(report: Report) -> list[Markup]:
    """The panel that the script fills with everything known of one matrix."""
    options = [tag("option", {"value": i}, layer["name"]) for i, layer in enumerate(report["layers"])]
    choose = tag("label", {"class": "js"}, "Matrix ", tag("select", {"id": "one-name"}, options))
    return [
        tag("div", {"class": "control"}, choose),
        tag("div", {"id": "one-body", "class": "one", "aria-live": "polite"}),
        tag("p", {"class": "note"}, "Choose a matrix here, or click one anywhere on this page."),
    ]
