"""`check` names the place and the reason of the first thing that is wrong."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from eckart.errors import Refused
from eckart.report import check
from tests.report.sample import sample

MINIMAL: dict[str, Any] = {
    "format": 1, "kind": "inspect", "title": "t", "verdict": [], "layers": [],
    "model": {"name": "m", "path": "p", "parameters": None, "bytes": None},
}  # fmt: skip


def test_good_reports_pass_unchanged() -> None:
    for good in (MINIMAL, sample(8)):
        before = copy.deepcopy(good)
        assert check(good) is good
        assert good == before
        assert check(json.loads(json.dumps(good))) == before


def change(path: str, value: object) -> dict[str, Any]:
    """A sample with one thing replaced; the path is dotted, numbers are indices, "-" as value deletes."""
    data = sample(2)
    *steps, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    node: Any = data
    for step in steps:
        node = node[step]
    if value == "-":
        del node[last]
    else:
        node[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("format", 2, "report.format: this version of eckart reads format 1, found 2"),
        ("kind", "compres", "report.kind: expected one of 'compress', 'inspect', 'demo', 'adapt', 'search', found 'compres'"),
        ("title", "-", "report.title: missing"),
        ("title", 7, "report.title: expected a string, found int 7"),
        ("verdict", "fine", "report.verdict: expected a list, found str 'fine'"),
        ("verdict.0", None, r"report.verdict\[0\]: expected a string"),
        ("warning", [], "report.warning: not a key of a report. Did you mean 'warnings'"),
        ("model.parameters", 1.5, "report.model.parameters: expected a whole number or null, found float 1.5"),
        ("model.bytes", True, "report.model.bytes: expected a whole number or null, found bool True"),
        ("model", None, "report.model: expected a dict, found NoneType"),
        ("recipe.fidelity", "nearly", "report.recipe.fidelity: expected one of 'exact'"),
        ("recipe.yaml", "-", "report.recipe.yaml: missing"),
        ("sizes.total_after", None, "report.sizes.total_after: expected a whole number"),
        ("layers.3.rank", "x", r"report.layers\[3\].rank: expected a whole number or null, found str 'x'"),
        ("layers.3.rank", None, r"layers\[3\].*: a factored layer has a rank"),
        ("layers.3.rank", 385, r"layers\[3\].*\.rank: expected 0 to 384 for shape \[384, 384\], found 385"),
        ("layers.3.rank", -1, r"expected 0 to 384"),
        ("layers.3.shape", [384], r"shape: expected two positive sizes"),
        ("layers.3.shape", [384, 0], r"shape: expected two positive sizes"),
        ("layers.3.block", -2, r"block: expected a block index, or -1"),
        ("layers.3.state", "cut", r"layers\[3\].state: expected one of 'factored'"),
        ("layers.3.params_after", -1, "negative"),
        ("layers.3.error", float("nan"), r"layers\[3\].error: expected a finite number or null, found float nan"),
        ("layers.3.energy", float("inf"), r"layers\[3\].energy: expected a finite number"),
        ("layers.3.measures", {"alpha": float("nan")}, r"layers\[3\].measures\['alpha'\]: expected a finite number"),
        ("layers.3.measures", {3: 1.0}, "expected words as keys, found 3"),
        ("layers.3.certificate", {}, "certificate.kind: expected a word"),
        ("layers.3.certificate", {"kind": "free", "x": [1, {"y": float("inf")}]}, r"\['x'\]\[1\]\['y'\]: expected something JSON can hold"),
        ("layers.3.certificate", {"kind": "free", "x": (1, 2)}, "expected something JSON can hold, found tuple"),
        ("layers.3.spectrum", [3.0, 2.0, 1.0], "as many places in spectrum_at"),
        ("layers.3.spectrum_at", [1] * 50, "spectrum"),
        ("layers.3.name", "model.layers.0.query", "is there twice"),
        ("evaluation.0.better", "bigger", r"evaluation\[0\].better: expected one of 'lower', 'higher'"),
        ("evaluation.0.after", "0.9", r"evaluation\[0\].after: expected a finite number or null"),
        ("tables.0.rows.1", ["svd"], r"tables\[0\].rows\[1\]: expected 4 cells, one per column, found 1"),
        ("tables.0.rows.1.0", [], r"rows\[1\]\[0\]: expected"),
        ("curves.0.series.0.points", [], r"expected a non-empty list of \[x, y\] pairs"),
        ("curves.0.series.0.points.0", [1.0], r"\[x, y\] pairs"),
        ("notes.0.href", "javascript:alert(1)", "expected an address that starts with https://"),
        ("notes.0.href", "https://a b", "expected an address"),
        ("versions", {"torch": object()}, r"versions\['torch'\]"),
    ],
)
def test_refusals(path: str, value: object, words: str) -> None:
    with pytest.raises(Refused, match=words):
        check(change(path, value))


@pytest.mark.parametrize(
    ("values", "places", "words"),
    [
        ([1.0] * 65, list(range(1, 66)), "at most 64"),
        ([1.0, 2.0], [1, 2], "descending"),
        ([1.0, -0.5], [1, 2], "not negative"),
        ([2.0, 1.0], [2, 2], "increasing places"),
        ([2.0, 1.0], [0, 2], "increasing places"),
        ([2.0, 1.0], [1, 385], "increasing places from 1 to 384"),
    ],
)
def test_spectra(values: list[float], places: list[int], words: str) -> None:
    data = sample(1)
    data["layers"][0] |= {"spectrum": values, "spectrum_at": places}
    with pytest.raises(Refused, match=words):
        check(data)


@pytest.mark.parametrize("thing", [None, [], "report", 3])
def test_not_even_a_dict(thing: Any) -> None:
    with pytest.raises(Refused, match="expected a dict"):
        check(thing)


def test_numpy_numbers_are_not_json() -> None:
    import numpy

    data = sample(1)
    data["layers"][0]["error"] = numpy.float64(0.5)  # a subclass of float, that repr and other writers would show as np.float64(0.5)
    with pytest.raises(Refused, match="error: expected a finite number"):
        check(data)
