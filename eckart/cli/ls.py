"""`eckart ls` and `eckart show`: what there is, without importing torch."""

from __future__ import annotations

from .base import Json, app, console, plain_table, print_json


@app.command
def ls(*, verb: str | None = None, kind: str | None = None, as_json: Json = False) -> None:
    """List every system.

    Parameters
    ----------
    verb:
        Only those of a verb, for instance compress.
    kind:
        Only those of a kind: recipe or measure.
    """
    from dataclasses import asdict

    from ..registry import list_entries

    rows = list_entries(kind, verb)
    if as_json:
        print_json([asdict(r) for r in rows])
        return
    table = plain_table(gap=2)
    for column in ("name", "verb", "fidelity", "what it is"):
        table.add_column(column, overflow="fold", no_wrap=column != "what it is")
    for row in rows:
        table.add_row(row.name, row.verb, row.fidelity, row.summary)
    console().print(table)


@app.command
def show(name: str, /, *, as_json: Json = False) -> None:
    """Show one system: its axes, defaults, and what differs from the paper.

    Parameters
    ----------
    name:
        A name from `eckart ls`; NAME:VARIANT is a recipe in another of its forms.
    """
    from dataclasses import asdict

    from ..registry import entry, get_recipe

    key, _, variant = name.partition(":")
    found = entry(key)
    if found.kind != "recipe" and not variant:
        if as_json:
            print_json(asdict(found))
            return
        print(
            f"{found.name} ({found.kind})\n{found.title}, {found.paper}\n\n{found.summary}\n\nRun it: eckart inspect MODEL --measures {found.name}"
        )
        return
    import yaml

    from ..axes.border import PLAIN, to_dict

    recipe = get_recipe(name)
    shown = f"{key}:{variant}" if variant else key
    if as_json:
        axes = {axis: choice.kind for axis, choice in recipe.axes().items()}
        print_json({**asdict(found), **{k: getattr(recipe, k) for k in PLAIN}, "name": shown, "axes": axes, "recipe": to_dict(recipe)})
        return
    import textwrap

    needs = sorted({f"{s.kind} at {s.at} ({s.via})" for s in recipe.needs()})
    lines = [f"{shown} ({recipe.verb}), {recipe.fidelity}", f"{recipe.title}, {recipe.paper}", "", found.summary]
    if recipe.differs:
        lines += ["", *textwrap.wrap(f"Differs: {recipe.differs}", 78)]
    choices = {k: v for k, v in to_dict(recipe).items() if k not in PLAIN}
    lines += ["", f"Measures: {', '.join(needs) or 'nothing, it needs no data'}", "", yaml.safe_dump(choices, sort_keys=False)]
    print("\n".join(lines))
