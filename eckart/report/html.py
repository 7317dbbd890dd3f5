"""The report as one HTML file: no network, no library, the drawings inline and the data embedded."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import Refused, UsageError
from . import depth, heatmap, inspection, panels, spectra, tables
from .check import check
from .links import link, paper_address
from .markup import Markup, escape, tag, visible
from .schema import Report
from .words import large, number, percent, several, size

FIDELITY = {
    "exact": "follows the paper",
    "variant": "a variant of the paper",
    "idea": "built on the idea of the paper",
}


def render(report: dict[str, Any] | Report) -> str:
    """The whole page as text; equal reports give equal text. It computes nothing: every number on it is in the report.

    Args:
        report: see `eckart.report.schema.Report`.

    Returns:
        HTML with style, script, drawings and data inside. The only addresses in it are plain links.

    Raises:
        Refused: the dict is not a report.

    Example:
        >>> page = render({"format": 1, "kind": "inspect", "title": "t", "verdict": ["Fine."], "layers": [],
        ...                "model": {"name": "m", "path": "m", "parameters": None, "bytes": None}})
        >>> page.startswith("<!doctype html>")
        True
    """
    checked = check(report)
    style, script = _asset("style.css"), _asset("script.js")
    if checked["kind"] == "inspect":
        style, script = style + _asset("inspect.css"), script + _asset("inspect.js")
    sections = list(_sections(checked))
    paintings = _paintings(checked)
    head = tag(
        "head",
        None,
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"http-equiv": "Content-Security-Policy", "content": _policy(style, script)}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("meta", {"name": "generator", "content": "eckart"}),
        tag("meta", {"name": "color-scheme", "content": "light dark"}),
        tag("link", {"rel": "icon", "href": "data:,"}),
        tag("title", None, f"{checked['title']} \u00b7 eckart"),
        tag("style", None, Markup(style)),
        tag("script", None, Markup(script)),
    )
    links = [tag("a", {"href": f"#{key}"}, short) for key, short, _, _ in sections]
    nav = tag("nav", {"aria-label": "Sections"}, links)
    body = tag(
        "body",
        None,
        tag("a", {"class": "skip", "href": "#verdict"}, "Skip to the verdict"),
        tag("header", {"class": "page"}, _masthead(checked), nav),
        tag("main", None, [_section(key, title, content) for key, _, title, content in sections]),
        tag(
            "footer", None, "Written by ", tag("b", None, "eckart"), ". This file is complete: it needs no network, and holds its own data."
        ),
        tag("div", {"id": "tip", "role": "status", "aria-live": "polite"}),
        _data("report-data", checked),
        _data("map-data", paintings),
    )
    return f"<!doctype html>\n{tag('html', {'lang': 'en'}, head, body)}\n"


def save(report: dict[str, Any] | Report, path_html: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the page, and the same data as JSON beside it (`report.html`, `report.json`). Equal reports give equal bytes.

    Args:
        report: see `eckart.report.schema.Report`.
        path_html: a name that ends in .html, in a folder that exists.
        overwrite: replace the two files where they exist.

    Returns:
        The path of the page.

    Raises:
        Refused: not a report, or a file is in the way.
        UsageError: the name does not end in .html, or there is no such folder.
    """
    page = Path(path_html)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"report: the file name must end in .html, found {page.name!r}. Use {page.with_suffix('.html').name!r}.")
    if not page.parent.is_dir():
        raise UsageError(f"report: there is no folder {str(page.parent)!r}. Create it first: mkdir -p {str(page.parent)!r}")
    texts = {page: render(report), page.with_suffix(".json"): to_json(report)}
    for path in texts:
        if path.exists() and not overwrite:
            raise Refused(f"report: {str(path)!r} exists, and is never replaced unasked. Choose another name, or pass overwrite.")
    for path, text in texts.items():
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(text, encoding="utf-8", newline="\n")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return page


def to_json(report: dict[str, Any] | Report) -> str:
    """The report as JSON text with sorted keys, one line per layer: small, and a diff of two runs is readable."""
    checked = check(report)
    lines: list[str] = []
    for key, value in sorted(checked.items()):
        if isinstance(value, list) and value:
            items = ",\n  ".join(_compact(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
            lines.append(f" {json.dumps(key)}: [\n  {items}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {_compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _sections(report: Report) -> Iterator[tuple[str, str, str, list[Markup | None]]]:
    """(id, word in the menu, heading, content); what has no data has no section."""
    count = _Count()
    yield "verdict", "Verdict", "Verdict", [_verdict(report)]
    if advice := report.get("advice"):
        yield "advice", "Advice", "Advice", [*inspection.advice(advice)]
    if report.get("evaluation"):
        yield "quality", "Quality", "Before and after", [tables.evaluation(report.get("evaluation", []))]
    if sizes := report.get("sizes"):
        yield "size", "Size", "What is stored", [tables.sizes(sizes)]
    inspecting = report["kind"] == "inspect"
    if not inspecting and (curves := report.get("curves")):
        steps = all(curve["x"] == "step" for curve in curves)
        yield "curves", "Curves", "Training" if steps else "Quality against budget", _curves(report, count)
    for i, table in enumerate(report.get("tables", [])):
        text = table.get("note")
        note = tag("p", {"class": "note"}, text) if text else None
        yield f"table-{i}", table["title"] if len(table["title"]) < 26 else f"Table {i + 1}", table["title"], [tables.other(table), note]
    layers = report["layers"]
    if layers and (found := heatmap.measures(report)):
        yield "map", "Map", "The model at a glance", [_map(report, found, count())]
    if any(v > 0 for layer in layers for v in layer.get("spectrum", [])):
        drawing = [spectra.spectra(layers), panels.depth_legend(layers)]
        yield "spectra", "Spectra", "Spectra by role", [_figure(count(), "Spectra", spectra.text(layers), drawing)]
    if (other := report.get("other")) and spectra.compared(layers):
        text = f"Singular values of {other['name']} divided by those of {report['model']['name']}, index by index; 1 is no change."
        text += " What lies beyond a panel is drawn on its border."
        drawing = [spectra.ratios(layers), panels.depth_legend(layers)]
        yield "change", "Change", "What changed", [_figure(count(), "Ratio of spectra", text, drawing)]
    if found := report.get("profiles"):
        text = "Descending lists of values against their index, a line per module; every panel has its own log axes."
        yield (
            "profiles",
            "More spectra",
            "Other spectra",
            [_figure(count(), "More spectra", text, [spectra.profiles(found), panels.depth_legend(layers)])],
        )
    if found := report.get("depth"):
        text = "One chart per number, by block; a line of its own for each role where matrices were measured."
        text += " Hollow: not valid." if depth.doubted(found) else ""
        text += " Bars: one standard error." if any("spread" in p for d in found for t in d["traces"] for p in t["points"]) else ""
        figure = _figure(count(), "By depth", text, [*depth.charts(found, report.get("methods", [])), depth.legend(found)])
        yield "depth", "Depth", "Through the depth of the model", [figure]
    if inspecting and report.get("curves"):
        yield "curves", "Curves", "Curves", _curves(report, count)
    if found := report.get("facts"):
        yield "facts", "Whole model", "The whole model", [inspection.facts(found, report.get("methods", []))]
    if layers and inspecting:
        yield "one", "One matrix", "One matrix", [tag("div", {"class": "js"}, inspection.one(report))]
    if not inspecting and any(layer.get("error") is not None for layer in layers):
        text = "Relative loss of each matrix in the metric of the recipe, by depth; 0 is untouched. Grey: the other roles. "
        text += "Hollow: left dense." if any(layer["state"] != "factored" and layer.get("error") is not None for layer in layers) else ""
        yield "loss", "Loss", "Where the loss is", [_figure(count(), "Loss by depth", text, panels.losses(layers))]
    if layers:
        yield "layers", "Layers", "Every matrix", [_filter(report), tables.layers(report)]
    if found := report.get("methods"):
        yield "methods", "Methods", "How each measure was taken", [inspection.methods(found)]
    else:
        yield "method", "Method", "Method", list(_method(report))
    if (recipe := report.get("recipe")) and recipe["yaml"].strip():
        yield "yaml", "YAML", "The exact run", [_yaml(recipe["yaml"], report.get("command"))]
    elif report["kind"] in ("adapt", "search") and (line := report.get("command")):  # several recipes, each with a report of its own
        yield "command", "Command", "The exact run", [tag("pre", {"tabindex": "0", "aria-label": "Command"}, tag("code", None, line))]
    yield "versions", "Versions", "Versions and timings", list(_versions(report))


def _curves(report: Report, count: _Count) -> list[Markup | None]:
    return [_figure(count(), curve["title"], curve.get("note", ""), panels.curve(curve)) for curve in report.get("curves", [])]


class _Count:
    """Figure numbers, in the order of the page."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self) -> int:
        self.value += 1
        return self.value


def _masthead(report: Report) -> list[Markup]:
    model, recipe, budget = report["model"], report.get("recipe"), report.get("budget")
    facts: list[object] = [tag("b", None, model["name"])]
    if model["parameters"] is not None:
        facts.append(f"{large(model['parameters'])} parameters")
    if model["bytes"] is not None:
        facts.append(size(model["bytes"]))
    if recipe:
        facts.append(["recipe ", tag("b", None, recipe["name"])])
    if budget:
        facts.append(", ".join(_budget(k, v) for k, v in sorted(budget.items()) if v is not None))
    line = [[tag("span", None, fact), " "] for fact in facts if fact]
    theme = tag("button", {"type": "button", "id": "theme", "class": "js", "title": "Switch between light and dark"}, "Theme")
    top = tag("div", {"class": "kicker"}, tag("span", None, f"eckart {report['kind']}"), theme)
    return [top, tag("h1", None, report["title"]), tag("p", {"class": "facts"}, line)]


def _budget(key: str, value: object) -> str:
    if key == "keep" and isinstance(value, int | float):
        return f"keep {percent(value, 0 if float(100 * value).is_integer() else 1)}"
    return f"{key.replace('_', ' ')} {number(value) if isinstance(value, int | float) else value}"


def _verdict(report: Report) -> Markup:
    sentences = report["verdict"]
    lead = tag("p", {"class": "lead"}, sentences[0]) if sentences else None
    rest = [tag("p", None, s) for s in sentences[1:]]
    warnings = report.get("warnings", [])
    box = None
    if warnings:
        head = tag("h3", None, several(len(warnings), "warning"))
        box = tag("aside", {"class": "warnings", "aria-label": "Warnings"}, head, tag("ul", None, [tag("li", None, w) for w in warnings]))
    return tag("div", {"class": "verdict"}, lead, rest, box)


def _paintings(report: Report) -> list[dict[str, Any]]:
    cells = heatmap.grid(report["layers"])
    notes = {m["name"]: inspection.sentence(m) for m in report.get("methods", [])}
    found = [(heatmap.paint(m, cells), notes.get(m.method, "")) for m in heatmap.measures(report)]
    return [p | {"note": f"{note} {p['note']}".strip()} for p, note in found]


def _map(report: Report, found: list[heatmap.Measure], index: int) -> Markup:
    cells = heatmap.grid(report["layers"])
    shown = heatmap.first_shown(found)
    first = heatmap.paint(shown, cells)
    choose = (
        tag("label", {"class": "js choose"}, "Colour by ", tag("select", {"id": "measure", "autocomplete": "off"}, _options(found, shown)))
        if len(found) > 1
        else None
    )
    text = "One cell per matrix: rows are roles, columns are blocks, from the first to the last."
    if shown.key == "rank" and heatmap.labelled(cells):
        text += " The number is the rank that is kept."
    if any(len(members) > 1 for members in cells.cells.values()):
        text += " A cell that holds several matrices shows their mean."
    drawing = [
        heatmap.rank_map(report, cells, first),
        heatmap.legend(report, cells, first),
        inspection.caption(report, shown.method, first["note"]),
    ]
    return _figure(index, "Map", text, drawing, choose)


def _options(found: list[heatmap.Measure], shown: heatmap.Measure) -> list[Markup]:
    """Measures in a list; those with several numbers in a group of their own."""
    out: list[Markup] = []
    for group, members in groupby(found, key=lambda m: m.group):
        options = [tag("option", {"value": m.key, "selected": m is shown and m is not found[0]}, m.title) for m in members]
        out += [tag("optgroup", {"label": group}, options)] if group and len(options) > 1 else options
    return out


def _figure(index: int, title: str, text: str, content: object, control: Markup | None = None) -> Markup:
    caption = tag("figcaption", None, tag("b", None, f"Figure {index}. "), f"{title}. {text}".strip())
    return tag("figure", None, tag("div", {"class": "control"}, control) if control else None, content, caption)


def _filter(report: Report) -> Markup:
    count = len(report["layers"])
    box = tag(
        "input",
        {"type": "search", "id": "filter", "placeholder": "part of a name, role or state", "autocomplete": "off", "spellcheck": "false"},
    )
    shown = tag("span", {"id": "shown", "aria-live": "polite"}, several(count, "matrix", "matrices"))
    return tag("p", {"class": "js filter"}, tag("label", None, "Filter ", box), " ", shown, _choose_columns(report))


def _choose_columns(report: Report) -> Markup | None:
    """Which numbers the table of an inspection shows: the main ones, all numbers of one measure, or everything."""
    found = report.get("columns", [])
    if all(c["main"] for c in found):
        return None
    titles = {m["name"]: m["title"] for m in report.get("methods", [])}
    names = dict.fromkeys(c["measure"] for c in found)
    options = [tag("option", {"value": ""}, "the main numbers"), tag("option", {"value": "*"}, "every number")]
    options += [tag("option", {"value": n}, titles.get(n, n)) for n in names]
    return tag("label", None, "Show ", tag("select", {"id": "columns"}, options))


def _method(report: Report) -> Iterator[Markup]:
    recipe = report.get("recipe")
    if recipe:
        address = paper_address(recipe["paper"])
        paper = link(address, recipe["paper"]) if address else escape(recipe["paper"]) if recipe["paper"].strip() else None
        yield tag(
            "p",
            None,
            tag("b", None, recipe["name"]),
            f": {recipe['title']}",
            [" (", paper, ")"] if paper else None,
            f"; {FIDELITY[recipe['fidelity']]}.",
        )
        if recipe["differs"]:
            yield tag("p", None, tag("b", None, "What differs: "), recipe["differs"])
    for note in report.get("notes", []):
        href = note.get("href")
        more = [" ", link(href, "Source")] if href else None
        yield tag("p", None, tag("b", None, f"{note['title']}. "), note["text"], more)
    if not recipe and not report.get("notes"):
        yield tag("p", None, "Weights were read as they are stored; nothing was changed.")


def _yaml(text: str, command: str | None) -> Markup:
    parts: list[object] = []
    if command:
        parts += [tag("h3", None, "Command"), tag("pre", {"tabindex": "0", "aria-label": "Command"}, tag("code", None, command))]
        parts.append(tag("h3", None, "Recipe"))
    copy = tag("button", {"type": "button", "id": "copy", "class": "js"}, "Copy")
    return tag(
        "div",
        {"class": "code"},
        parts,
        copy,
        tag("pre", {"tabindex": "0", "id": "yaml-text", "aria-label": "Recipe"}, tag("code", None, text.strip("\n"))),
    )


def _versions(report: Report) -> Iterator[Markup]:
    model = report["model"]
    yield tag("h3", None, "Model")
    yield tables.pairs(
        [("name", model["name"]), ("read from", model["path"]), ("parameters", model["parameters"]), ("bytes", model["bytes"])]
    )
    timings = {k: f"{v:.2f} s" if isinstance(v, float) else v for k, v in report.get("timings", {}).items()}
    for title, data in (("Versions", report.get("versions")), ("Timings", timings)):
        if data:
            yield tag("h3", None, title)
            yield tables.pairs(sorted(data.items()))
    yield tag("p", {"class": "js"}, tag("button", {"type": "button", "id": "download"}, "Save the data as JSON"))


def _section(key: str, title: str, content: list[Markup | None]) -> Markup:
    return tag("section", {"id": key, "aria-labelledby": f"h-{key}"}, tag("h2", {"id": f"h-{key}"}, title), content)


def _policy(style: str, script: str) -> str:
    """Only our own style and script run, and nothing is fetched, even if a name slipped through the escaping."""
    rules = {
        "default-src": "'none'",
        "style-src": f"'sha256-{_digest(style)}'",
        "script-src": f"'sha256-{_digest(script)}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{k} {v}" for k, v in rules.items())


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data(key: str, value: object) -> Markup:
    # "</script>" and "<!--" would end or bend a script element: no angle bracket survives.
    text = _compact(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return tag("script", {"type": "application/json", "id": key}, Markup(text))


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _asset(name: str) -> str:
    return visible(resources.files("eckart.report").joinpath(name).read_text(encoding="utf-8"))
