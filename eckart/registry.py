"""Every system by name, from a generated index: listing needs no import of torch and no import of the systems.

Third parties add theirs with the entry-point group `eckart.recipes` (`name = "package.module"`, the module holding `RECIPE`).
A name that exists twice is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, resources
from typing import TYPE_CHECKING, Any

from .errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from .axes import Recipe

GROUP = "eckart.recipes"


@dataclass(frozen=True)
class Entry:
    """A row of the index: what is known of a system without importing it.

    Args:
        name: key, lower snake case.
        kind: "recipe", "measure", and the kinds to come.
        verb: what it does ("compress", "inspect", ...).
        title: as published.
        paper: "arXiv:..." or "doi:...".
        fidelity: "exact", "variant" or "idea".
        differs: what differs from the paper.
        summary: first line of the file.
        module: where it lives.
        axes: axis -> kind of the choice.
    """

    name: str
    kind: str
    verb: str
    title: str
    paper: str
    fidelity: str
    differs: str = ""
    summary: str = ""
    module: str = ""
    axes: dict[str, str] = field(default_factory=dict)


@cache
def _index() -> dict[str, Entry]:
    text = resources.files("eckart.recipes").joinpath("_index.json").read_text(encoding="utf-8")
    found = {row["name"]: Entry(**row) for row in json.loads(text)}
    return found | _foreign(found)


def _foreign(known: dict[str, Entry]) -> dict[str, Entry]:
    from importlib.metadata import entry_points

    out: dict[str, Entry] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        if point.name in known or point.name in out:
            raise UsageError(
                f"two systems are called {point.name!r}: {point.value} of {point.dist} and one that exists. Rename or uninstall one."
            )
        recipe: Recipe = import_module(point.value).RECIPE
        axes = {axis: value.kind for axis, value in recipe.axes().items()}
        out[point.name] = Entry(
            point.name, "recipe", recipe.verb, recipe.title, recipe.paper, recipe.fidelity, recipe.differs, "", point.value, axes
        )
    return out


def list_entries(kind: str | None = None, verb: str | None = None) -> list[Entry]:
    """Every system, sorted by verb and name; of one kind or verb only, if given.

    Raises:
        UsageError: a kind or verb that no system has.
    """
    rows = sorted(_index().values(), key=lambda e: (e.kind != "recipe", e.kind, e.verb, e.name))
    for field_name, wanted in (("kind", kind), ("verb", verb)):
        known = sorted({getattr(e, field_name) for e in rows})
        if wanted is not None and wanted not in known:
            raise UsageError(f"no system has the {field_name} {wanted!r}.{did_you_mean(wanted, known)} There are: {', '.join(known)}.")
    return [e for e in rows if kind in (None, e.kind) and verb in (None, e.verb)]


def entry(name: str) -> Entry:
    """The row of a name.

    Raises:
        UsageError: unknown, with near names.
    """
    index = _index()
    if name not in index:
        raise UsageError(f"there is no system {name!r}.{did_you_mean(name, index)} `eckart ls` shows all of them.")
    return index[name]


def list_recipes(verb: str | None = None) -> list[str]:
    """Names of all recipes, or of those of one verb.

    Example:
        >>> "svd_llm" in list_recipes("compress")
        True
    """
    return [e.name for e in list_entries("recipe", verb)]


def get_recipe(name: str) -> Recipe:
    """A recipe by name.

    Args:
        name: key as `list_recipes` gives it, with ":VARIANT" behind it for another of its named forms.

    Raises:
        UsageError: no such system or variant, or one that is not a recipe.

    Example:
        >>> get_recipe("svd_llm").metric.kind
        'input_gram'
    """
    key, _, variant = name.partition(":")
    found = entry(key)
    if found.kind != "recipe":
        raise UsageError(f"{key} is a {found.kind}, not a recipe. `eckart show {key}` says how it is used.")
    recipe: Recipe = import_module(found.module).RECIPE
    return recipe.variant(variant) if variant else recipe


def get_object(name: str) -> Any:
    """What a name stands for: a `Recipe`, or the `MEASURE` of a measure."""
    found = entry(name)
    return get_recipe(name) if found.kind == "recipe" else import_module(found.module).MEASURE
