"""The model card: README.md for a folder that goes to the Hub, written from the same report as the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import UsageError
from .check import check
from .html import FIDELITY
from .links import paper_address
from .markup import visible
from .schema import Evaluation, Report
from .tables import judge
from .words import large, number, percent, several, size

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(report: dict[str, Any] | Report) -> str:
    """Markdown with YAML front matter for a compressed model; equal reports give equal text.

    It names no licence: that of the base model goes on applying, and only its owner can say which it is.

    Args:
        report: of kind "compress"; see `eckart.report.schema.Report`.

    Returns:
        The text of README.md, ending in a newline.

    Raises:
        Refused: the dict is not a report.
        UsageError: it is a report about something else than a compressed model.

    Example:
        >>> card = model_card({"format": 1, "kind": "compress", "title": "tiny", "verdict": ["Smaller."], "layers": [],
        ...                    "model": {"name": "org/tiny", "path": "org/tiny", "parameters": None, "bytes": None}})
        >>> print(card.splitlines()[1])
        base_model: org/tiny
    """
    checked = check(report)
    if checked["kind"] != "compress":
        raise UsageError(f"model_card: only a compressed model gets a card, this report is of kind {checked['kind']!r}.")
    parts = [_front_matter(checked), f"# {_text(checked['title'])}", *(_text(s) for s in checked["verdict"])]
    parts += [
        *_quality(checked),
        *_sizes(checked),
        *_losses(checked),
        *_usage(checked),
        *_method(checked),
        *_limits(checked),
        *_versions(checked),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: Report) -> str:
    import yaml

    head: dict[str, Any] = {}
    if HUB_ID.fullmatch(report["model"]["name"]):  # the Hub refuses a card whose base_model is a folder
        head["base_model"] = report["model"]["name"]
        head["base_model_relation"] = "quantized"
    head["library_name"] = "transformers"
    head["tags"] = ["eckart"]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, default_flow_style=False, allow_unicode=False)}---"


def _quality(report: Report) -> list[str]:
    rows = report.get("evaluation", [])
    return ["## Before and after", _evaluation(rows)] if rows else []


def _evaluation(rows: Sequence[Evaluation]) -> str:
    body = [[_text(r["metric"]), _about(r), number(r["before"]), number(r["after"]), " ".join(reversed(judge(r)))] for r in rows]
    return _table(["metric", "measured on", "before", "after", "change"], body, right=(2, 3))


def _about(row: Evaluation) -> str:
    return _text("; ".join(t for t in (row.get("text", ""), f"{row['better']} is better", row.get("note", "")) if t))


def _sizes(report: Report) -> list[str]:
    data = report.get("sizes")
    if not data:
        return []
    rows = [
        [
            "targeted matrices",
            large(data["targeted_before"]),
            large(data["targeted_after"]),
            _share(data["targeted_after"], data["targeted_before"]),
        ],
        ["whole model", large(data["total_before"]), large(data["total_after"]), _share(data["total_after"], data["total_before"])],
        ["on disk", size(data["bytes_before"]), size(data["bytes_after"]), _share(data["bytes_after"], data["bytes_before"])],
    ]
    return ["## What is stored", _table(["", "before", "after", "share"], rows, right=(1, 2, 3))]


def _losses(report: Report) -> list[str]:
    """Per role: a row per matrix would be a thousand rows, and the page has them."""
    rows: list[list[str]] = []
    for role in dict.fromkeys(layer["role"] for layer in report["layers"]):
        members = [layer for layer in report["layers"] if layer["role"] == role]
        ranks = [layer["rank"] for layer in members if layer["state"] == "factored" and layer["rank"] is not None]
        errors = [e for layer in members if (e := layer.get("error")) is not None]
        span = "" if not ranks else f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}\u2013{max(ranks)}"
        average = number(sum(errors) / len(errors) if errors else None, 3)
        rows.append([_text(role), str(len(members)), str(len(ranks)), span, average, number(max(errors, default=None), 3)])
    if not rows:
        return []
    text = "Relative loss in the metric of the recipe; it is not the loss of the model."
    return ["## Loss by role", _table(["role", "matrices", "factored", "ranks", "mean", "largest"], rows, right=(1, 2, 3, 4, 5)), text]


def _usage(report: Report) -> list[str]:
    auto = report["model"].get("auto", "AutoModel")
    auto = auto if re.fullmatch(r"Auto\w+", auto) else "AutoModel"
    if report.get("form") == "dense":
        code = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("path/to/this/folder")'
        return ["## How to load", "The factors were multiplied back: it loads like any other checkpoint.", _fence(code, "python")]
    if report.get("form") == "plain":
        code = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("path/to/this/folder")'
        return [
            "## How to load",
            "Its layers are dense, only fewer or smaller: it loads like any other checkpoint.",
            _fence(code, "python"),
        ]
    text = "`import eckart` comes first: it tells transformers how to read the factored layers. Without it the load fails, on purpose."
    code = f'import eckart\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("path/to/this/folder")'
    short = 'import eckart as ek\n\nmodel = ek.load("path/to/this/folder")'
    return [
        "## How to load",
        text,
        _fence(code, "python"),
        "Or, without naming a class:",
        _fence(short, "python"),
        'Install with `pip install "eckart[hf]"`.',
    ]


def _method(report: Report) -> list[str]:
    recipe = report.get("recipe")
    if not recipe:
        return []
    address = paper_address(recipe["paper"])
    paper = f" ([{_text(recipe['paper'])}](<{address}>))" if address else f" ({_text(recipe['paper'])})" if recipe["paper"] else ""
    parts = ["## How it was made", f"Recipe {_code(recipe['name'])}: {_text(recipe['title'])}{paper}; {FIDELITY[recipe['fidelity']]}."]
    if recipe["differs"]:
        parts.append(f"What differs: {_text(recipe['differs'])}")
    parts.append(_fence(report.get("command") or _command(report), "sh"))
    if recipe["yaml"].strip():
        parts += ["The exact run:", _fence(recipe["yaml"].strip("\n"), "yaml")]
    return parts


def _command(report: Report) -> str:
    """The command line as far as the report knows it."""
    import shlex

    recipe = report.get("recipe")
    words = ["eckart", "compress", report["model"]["name"], "-o", "OUT"]
    words += ["--recipe", recipe["name"]] if recipe else []
    for key, value in sorted((report.get("budget") or {}).items()):
        if value is not None:
            words += ["--keep", str(value)] if key == "keep" else ["--set", f"budget.{key}={value}"]
    return shlex.join(words)


def _limits(report: Report) -> list[str]:
    layers = report["layers"]
    lines: list[str] = []
    if not report.get("evaluation"):
        lines.append("Its quality was not measured. Measure it on your own data before you use it.")
    else:
        lines.append("The numbers above hold for the data that they name, and for nothing else. Measure it on your own.")
    dense = sum(layer["state"] == "dense" for layer in layers)
    skipped = sum(layer["state"] == "skipped" for layer in layers)
    if dense:
        lines.append(f"{several(dense, 'matrix', 'matrices')} of {len(layers):,} stayed dense.")
    if skipped:
        lines.append(f"{several(skipped, 'matrix', 'matrices')} of {len(layers):,} were skipped.")
    lines.append("Fewer parameters do not mean more speed: that depends on shapes, batch and hardware, and is not claimed here.")
    lines.append("The licence, the intended use and the biases of the base model go on applying.")
    lines += [f"Warning: {_text(w)}" for w in report.get("warnings", [])]
    return ["## Limits", "\n".join(f"- {line}" for line in lines)]


def _versions(report: Report) -> list[str]:
    data = report.get("versions")
    return [_text("Made with " + ", ".join(f"{k} {v}" for k, v in sorted(data.items())) + ".")] if data else []


def _share(after: int, before: int) -> str:
    return percent(after / before if before else None)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    rule = ["---:" if k in right else "---" for k in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [list(head), rule, *map(list, rows)])


def _text(value: str) -> str:
    """Plain text in Markdown: what would be markup is escaped, and it stays on one line."""
    line = " ".join(visible(value).split())
    line = re.sub(r"([\\`*\[\]<>|~])", r"\\\1", line)
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)  # inside a word an underscore is no markup
    line = re.sub(r"^([#+=-])", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", line)


def _code(value: str) -> str:
    """A code span that its own content cannot end."""
    line = " ".join(visible(value).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"


def _fence(text: str, language: str) -> str:
    """A code block that its own content cannot end."""
    body = visible(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", body)), default=0))
    return f"{fence}{language}\n{body}\n{fence}"
