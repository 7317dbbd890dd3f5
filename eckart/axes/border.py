"""Where recipes come from text: YAML, `--set axis.field=value`, and back. pydantic checks here and nowhere else.

    metric:
      kind: both
      into: {kind: input_gram, power: 0.5}
      out: {kind: grad_gram, clamp: 1.0e-4}

`kind` says which choice, unknown keys are errors with a suggestion, and absent fields take the choice's own defaults.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import Refused, UsageError, did_you_mean
from . import (
    allocate,
    branch,
    core,
    factor,
    filter,
    form,
    gradient,
    group,
    loss,
    metric,
    penalty,
    recover,
    refine,
    refresh,
    roles,
    score,
    source,
    target,
    variance,
)
from .base import Choice
from .protocols import Budget
from .recipe import AXES, PIECES, Recipe

CHOICES: dict[str, dict[str, type[Choice]]] = {}
for _module in (
    target,
    source,
    metric,
    factor,
    filter,
    score,
    variance,
    allocate,
    form,
    branch,
    core,
    roles,
    group,
    refine,
    recover,
    loss,
    penalty,
    gradient,
    refresh,
):
    for _value in vars(_module).values():
        if isinstance(_value, type) and issubclass(_value, Choice) and hasattr(_value, "kind"):
            CHOICES.setdefault(_value.axis, {})[_value.kind] = _value

PLAIN = ("name", "verb", "paper", "title", "fidelity", "differs")
_PLAIN = Recipe(name="-", verb="-", paper="-")  # holds the defaults


def _dump(value: Any) -> Any:
    if isinstance(value, Choice):
        own = {f.name: _dump(getattr(value, f.name)) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {"kind": value.kind, **own}
    if isinstance(value, Mapping):
        return {str(k): _dump(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_dump(v) for v in value]
    return value


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data: what YAML, `eckart show` and the fingerprint see."""
    out: dict[str, Any] = {k: getattr(recipe, k) for k in PLAIN if getattr(recipe, k)}
    out |= {axis: _dump(value) for axis, value in recipe.axes().items()}
    out |= {axis: None for axis in AXES if getattr(recipe, axis) is None and getattr(_PLAIN, axis) is not None}
    out["budget"] = {recipe.budget.kind: recipe.budget.value} if recipe.budget.kind else {}  # left out it would mean the default
    if recipe.roles:
        out["roles"] = {part: role.kind for part, role in recipe.roles.items()}
    if recipe.train:
        out["train"] = dict(recipe.train)
    out |= {axis: _dump(getattr(recipe, axis)) for axis in PIECES if getattr(recipe, axis)}
    return out


def _choice(axis: str, data: Any, where: str) -> Choice:
    if isinstance(data, Choice):
        return data
    if isinstance(data, str):
        data = {"kind": data}
    kinds = CHOICES.get(axis, {})
    if not isinstance(data, Mapping) or "kind" not in data:
        raise UsageError(f"{where}: expected a mapping with `kind:` (one of {', '.join(sorted(kinds))}), found {_short(data)}.")
    cls = kinds.get(str(data["kind"]))
    if cls is None:
        raise UsageError(
            f"{where}.kind: no {axis} is called {_short(data['kind'])}.{did_you_mean(str(data['kind']), kinds)} There are: {', '.join(sorted(kinds))}."
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in data.items():
        if key == "kind":
            continue
        if key not in fields:
            raise UsageError(
                f"{where}.{_word(key)}: {axis}={cls.kind} has no such field.{did_you_mean(key, fields)} It has: {', '.join(fields) or 'none'}."
            )
        nested = isinstance(value, Mapping) and "kind" in value
        given[key] = _choice(_axis_of(cls, key, axis), value, f"{where}.{key}") if nested else value
    return _validate(cls, given, where)


def _axis_of(cls: type, key: str, axis: str) -> str:
    """The axis of the choices that a field holds; its owner's own when it names none."""
    from typing import get_args, get_type_hints

    hint = get_type_hints(cls)[key]
    return next((t.axis for t in (get_args(hint) or (hint,)) if hasattr(t, "axis")), axis)


def _validate(cls: type, given: dict[str, Any], where: str) -> Any:
    from typing import get_args, get_type_hints

    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(cls)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        try:
            if isinstance(value, Choice):
                allowed = get_args(hints[key]) or (hints[key],)
                if not isinstance(value, tuple(t for t in allowed if isinstance(t, type))):
                    kinds = ", ".join(sorted(t.kind for t in allowed if hasattr(t, "kind")))
                    raise UsageError(f"{where}.{key}: {value.kind} does not fit here; it takes {kinds or 'a plain value'}.")
                checked[key] = value
            else:
                checked[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise UsageError(f"{where}.{key}: {error.errors()[0]['msg']}, found {_short(value)}.") from None
    return cls(**checked)


def budget_from(data: Any, where: str = "budget") -> Budget:
    """A budget from plain data."""
    if isinstance(data, Budget):
        return data
    known = [f.name for f in dataclasses.fields(Budget)]
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: expected a mapping such as {{keep: 0.8}}, found {_short(data)}.")
    for key in data:
        if key not in known:
            raise UsageError(f"{where}.{_word(key)}: no such budget.{did_you_mean(str(key), known)} There are: {', '.join(known)}.")
    for key, value in data.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{where}.{key}: expected a number, found {value}.")
    return Budget(**dict(data))


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data; the inverse of `to_dict`.

    Raises:
        UsageError: an unknown key, kind or field, or a value of the wrong type, with its place and a suggestion.
    """
    known = {f.name for f in dataclasses.fields(Recipe)}
    given: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise UsageError(f"{_word(key)}: a recipe has no such key.{did_you_mean(str(key), known)} It has: {', '.join(sorted(known))}.")
        if key in AXES:
            given[key] = None if value is None else _choice(key, value, key)
        elif key == "budget":
            given[key] = budget_from(value)
        elif key in PIECES:
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise UsageError(f"{key}: expected a list of choices, found {_short(value)}.")
            given[key] = tuple(_choice(key, piece, f"{key}[{i}]") for i, piece in enumerate(value))
        elif key in ("roles", "train"):
            if not isinstance(value, Mapping):
                raise UsageError(f"{key}: expected a mapping, found {_short(value)}.")
            table = {str(part): item for part, item in value.items()}
            given[key] = {p: _choice("roles", role, f"roles.{_word(p)}") for p, role in table.items()} if key == "roles" else table
        elif key in PLAIN and key not in ("name", "verb") and not isinstance(value, str):
            raise UsageError(f"{key}: expected text, found {_short(value)}.")
        else:
            given[key] = value
    for key in ("name", "verb"):
        if not isinstance(given.get(key), str):
            raise UsageError(f"{key}: a recipe needs it.")
        if not 0 < len(given[key]) <= 100 or "\n" in given[key]:
            raise UsageError(f"{key}: expected a line of 1 to 100 characters, found {_short(given[key])}.")
    given.setdefault("paper", "")
    return Recipe(**given)


def _short(value: Any) -> str:
    """A value for a message, never much longer than a line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _word(key: Any) -> str:
    """A key for a message: as it is, or quoted and escaped where it cannot be shown."""
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) <= 200 else _short(key)


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML, keys in the order of the flow."""
    import yaml

    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True, width=120)


def from_yaml(text: str | bytes) -> Recipe:
    """A recipe from YAML text, read as a stranger's: plain values, no tags, no aliases, no key twice."""
    from ..store._yaml import parse

    try:
        data = parse(text, "recipe YAML")
    except Refused as error:
        raise UsageError(str(error)) from None
    if not isinstance(data, Mapping):
        raise UsageError(f"recipe YAML: expected a mapping, found {type(data).__name__}.")
    return from_dict(data)


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """A recipe with `axis.field=value` settings applied in order, values read as JSON where they are JSON.

    Args:
        recipe: where to start.
        settings: for instance ("metric.kind=input_gram", "metric.power=1.0", "budget.rank=8").

    Raises:
        UsageError: a setting without "=", or a place that does not exist.

    Example:
        >>> override(Recipe(name="a", verb="compress", paper="-"), ["budget.rank=8"]).budget
        Budget(keep=None, rank=8, total_rank=None, energy=None, error=None, threshold=None)
    """
    data = to_dict(recipe)
    for setting in settings:
        path, sign, text = setting.partition("=")
        keys = path.strip().split(".")
        if not sign or len(keys) < 2:
            raise UsageError(f"--set {setting}: expected axis.field=value, for instance budget.rank=8 or metric.kind=identity.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if keys[0] == "budget":
            data["budget"] = {keys[1]: value}
            continue
        if keys[0] not in AXES and keys[0] not in ("roles", "train"):
            raise UsageError(
                f"--set {setting}: there is no axis {keys[0]!r}.{did_you_mean(keys[0], AXES)} There are: {', '.join(AXES)}, budget, roles, train."
            )
        node = data.setdefault(keys[0], {})
        for key in keys[1:-1]:
            if not isinstance(node.get(key), dict):
                raise UsageError(f"--set {setting}: {key!r} is not a choice with fields of its own.")
            node = node[key]
        if keys[-1] == "kind":
            node.clear()
        if keys == ["form", "kind"] and value != recipe.form.kind:  # another form has other parts
            data["roles"] = {part: role for part, role in data.get("roles", {}).items() if part not in recipe.roles}
        node[keys[-1]] = value
    return from_dict(data)
