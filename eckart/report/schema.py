"""The report as data: plain dicts, lists, strings and finite numbers, so that `report.json` is all of it.

The TypedDicts below are the schema itself: `check.check` walks them. No `from __future__ import annotations` here, it would hide which
keys are required.
"""

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

FORMAT = 1
SPECTRUM_POINTS = 64

Scalar = str | int | float | bool | None


class Model(TypedDict):
    """The source. `path` is a folder or a Hub id; `parameters` and `bytes` are null where they were not counted.

    `auto` names the transformers class that loads it ("AutoModelForCausalLM"); "AutoModel" when absent.
    """

    name: str
    path: str
    parameters: int | None
    bytes: int | None
    auto: NotRequired[str]


class RecipeInfo(TypedDict):
    """The card of the recipe that ran; `yaml` is the exact record of the run."""

    name: str
    title: str
    paper: str
    fidelity: Literal["exact", "variant", "idea"]
    differs: str | None
    yaml: str


class Sizes(TypedDict):
    """Parameters of the targeted matrices and of the whole model, and bytes on disk. "After" counts what is stored."""

    targeted_before: int
    targeted_after: int
    total_before: int
    total_after: int
    bytes_before: int
    bytes_after: int


class Spectrum(TypedDict):
    """`spectrum[k]` is the singular value number `spectrum_at[k]`, as in `Layer`."""

    spectrum: list[float]
    spectrum_at: list[int]


class Layer(TypedDict):
    """One matrix.

    `block` is -1 outside the numbered blocks. `shape` is (out, in). `cap` is the largest rank that would still save parameters.
    `error` is the relative loss in the recipe's own metric, `energy` the share of the squared spectrum that is kept.
    `spectrum[k]` is the singular value number `spectrum_at[k]`, counted from 1; at most 64 of them, descending. `other` is the spectrum of
    the same matrix in the compared model. `edge` is the largest singular value that noise of the same size would have, `outliers` of them stand out of it, `tail` the ends
    [[index, value], [index, value]] of a fitted power law, a straight line on log axes.
    `measures` has a number per column; `spread` its standard error; `doubt` says of a measure why its number here is no result, `remarks`
    what goes with it; `lists` are values that are no single number.
    """

    name: str
    block: int
    role: str
    shape: list[int]
    rank: int | None
    state: Literal["factored", "dense", "skipped"]
    params_before: int
    params_after: int
    cap: NotRequired[int | None]
    reason: NotRequired[str]
    error: NotRequired[float | None]
    certificate: NotRequired[dict[str, Any] | None]
    spectrum: NotRequired[list[float]]
    spectrum_at: NotRequired[list[int]]
    energy: NotRequired[float | None]
    measures: NotRequired[dict[str, float | None] | None]
    spread: NotRequired[dict[str, float]]
    doubt: NotRequired[dict[str, str]]
    remarks: NotRequired[dict[str, str]]
    lists: NotRequired[dict[str, list[float | None]]]
    other: NotRequired[Spectrum | None]
    edge: NotRequired[float | None]
    outliers: NotRequired[int]
    tail: NotRequired[list[list[float]]]


class Column(TypedDict):
    """A number per matrix: `key` names it in `Layer.measures`, `measure` is the measure that it belongs to. `main` ones are in the table
    before anybody asks for more."""

    key: str
    measure: str
    title: str
    main: bool
    unit: NotRequired[str]


class Method(TypedDict):
    """How a measure was taken, and how often it said something: of `valid` + `invalid` modules. `reasons` say why not."""

    name: str
    title: str
    paper: str
    estimator: str
    note: str
    settings: str
    fidelity: Literal["exact", "variant", "idea"]
    differs: str
    unit: str
    valid: int
    invalid: int
    reasons: list[str]


class Point(TypedDict):
    """A number at a block; -1 stands before the first block. `doubt` says why it is no result."""

    block: int
    value: float | None
    spread: NotRequired[float]
    doubt: NotRequired[str]


class Trace(TypedDict):
    """One line of a chart by depth."""

    name: str
    points: list[Point]


class Profile(TypedDict):
    """A descending list of one module, for instance the spectrum of a cache; `values[k]` is number `at[k]`, counted from 1."""

    module: str
    block: int
    at: list[int]
    values: list[float]


class Profiles(TypedDict):
    """Lists of the same kind from several modules, for a panel."""

    key: str
    measure: str
    title: str
    lines: list[Profile]


class Depth(TypedDict):
    """A chart by depth: a line, or a line per role. `main` ones are shown at once."""

    key: str
    measure: str
    title: str
    main: bool
    traces: list[Trace]
    unit: NotRequired[str]


class Fact(TypedDict):
    """A number about the whole model, or about a part of it that is neither a matrix nor a block. `module` is "" for the whole."""

    module: str
    measure: str
    part: str
    value: Scalar
    spread: NotRequired[float]
    doubt: NotRequired[str]
    note: NotRequired[str]


class Suggestion(TypedDict):
    """What to do with a matrix, why, and what speaks for the reason: measured correlations, never a guess."""

    action: Literal["compress", "keep", "protect", "adapt"]
    module: str
    reason: str
    measures: list[str]


class Advice(TypedDict):
    """Suggestions in order, best first within an action; `basis` says for each action what they rest on, or why there are none."""

    suggestions: list[Suggestion]
    basis: list[str]


class Evaluation(TypedDict):
    """One metric before and after; `text` says what it was measured on."""

    metric: str
    before: float | None
    after: float | None
    better: Literal["lower", "higher"]
    text: NotRequired[str]
    note: NotRequired[str]


class Table(TypedDict):
    """Any other table; a row has a cell per column."""

    title: str
    columns: list[str]
    rows: list[list[Scalar]]
    note: NotRequired[str]


class Series(TypedDict):
    """One line of a curve; `points` are [x, y] pairs in the order they are drawn."""

    name: str
    points: list[list[float]]


class Curve(TypedDict):
    """A line chart, for instance quality against budget."""

    title: str
    x: str
    y: str
    series: list[Series]
    note: NotRequired[str]


class Note(TypedDict):
    """A method note; `href` is an http(s) address, usually of the paper, or null."""

    title: str
    text: str
    href: NotRequired[str | None]


class Report(TypedDict):
    """Everything the HTML file and the model card say. `command` is the line that reproduces the run."""

    format: int
    kind: Literal["compress", "inspect", "demo", "adapt", "search"]
    title: str
    verdict: list[str]
    model: Model
    layers: list[Layer]
    recipe: NotRequired[RecipeInfo | None]
    budget: NotRequired[dict[str, Scalar] | None]
    form: NotRequired[Literal["factored", "dense", "plain"] | None]
    command: NotRequired[str | None]
    sizes: NotRequired[Sizes | None]
    evaluation: NotRequired[list[Evaluation]]
    curves: NotRequired[list[Curve]]
    tables: NotRequired[list[Table]]
    warnings: NotRequired[list[str]]
    notes: NotRequired[list[Note]]
    versions: NotRequired[dict[str, Scalar]]
    timings: NotRequired[dict[str, Scalar]]
    other: NotRequired[Model | None]
    columns: NotRequired[list[Column]]
    methods: NotRequired[list[Method]]
    depth: NotRequired[list[Depth]]
    facts: NotRequired[list[Fact]]
    profiles: NotRequired[list[Profiles]]
    advice: NotRequired[Advice | None]


def plain(value: Any) -> Any:
    """A value as a report can hold it: tuples become lists, NaN and infinities null.

    Example:
        >>> plain({"a": (1, float("nan"))})
        {'a': [1, None]}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
