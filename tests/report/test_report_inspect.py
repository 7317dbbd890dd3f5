"""The page of an inspection: every number with its error and its doubt, drawings that say what the numbers say, nothing injected."""

from __future__ import annotations

import copy
import json
import math
import re
from typing import Any

import pytest

from eckart.errors import Refused
from eckart.report import check, render
from tests.report.inspection import inspection, large_inspection
from tests.report.test_report_html import EVIL, Page, embedded, numbers, poison


def test_sections_in_order() -> None:
    page = Page(render(inspection()))
    assert [e["@id"] for e in page.all("section")] == [
        "verdict", "advice", "map", "spectra", "change", "profiles", "depth", "curves", "facts", "one", "layers", "methods", "versions",
    ]  # fmt: skip


def test_a_report_without_extras_is_drawn() -> None:
    data = inspection(2)
    for key in ("columns", "methods", "depth", "facts", "profiles", "curves", "advice", "other"):
        del data[key]
    for x in data["layers"]:
        for key in ("spread", "doubt", "remarks", "lists", "other", "edge", "tail", "outliers"):
            x.pop(key, None)
    assert [e["@id"] for e in Page(render(data)).all("section")] == ["verdict", "map", "spectra", "one", "layers", "method", "versions"]


def test_no_number_is_bare() -> None:
    """In the table an error stands behind its number, a doubt is written, and the reason is there to read."""
    data = inspection(3)
    page = Page(render(data))
    rows = {int(e["@data-l"]): e for e in page.all("tr") if "@data-l" in e}
    doubtful = {i for i, x in enumerate(data["layers"]) if "doubt" in x}
    for i, row in rows.items():
        assert "± 0.25" in row["text"]
        assert ("?" in row["text"]) == (i in doubtful)
    marks = [e for e in page.all("span", class_="doubtful") if "table" in e["above"]]
    assert len(marks) == len(doubtful)
    assert {e["@title"] for e in marks} == {"only 4 values in the tail"}
    methods = page.all("section", id="methods")[0]["text"]
    for m in data["methods"]:
        assert m["estimator"] in methods
        assert m["note"] in methods
    assert "Not valid: only 4 values in the tail (2)." in methods
    assert any(e["@href"] == "https://arxiv.org/abs/0706.1062" for e in page.all("a"))
    assert any(e["text"] == "released code" for e in page.all("code"))


def test_doubtful_cells_have_no_colour_and_colours_follow_the_numbers() -> None:
    data = inspection(5)
    page = Page(render(data))
    maps = {m["key"]: m for m in embedded(page, "map-data")}
    assert set(maps) == {f"measure:{c['key']}" for c in data["columns"]}
    cells = [e for e in page.all("g") if "@data-c" in e]
    order = [int(e["@data-l"]) for e in cells]
    alpha = maps["measure:alpha"]
    assert [order[k] for k in alpha["doubt"]] == [i for i in order if "alpha" in data["layers"][i].get("doubt", {})]
    for key, found in maps.items():
        values = [data["layers"][i]["measures"][key.removeprefix("measure:")] for i in order]
        assert [k for k, s in enumerate(found["steps"]) if s < 0] == found["doubt"]
        pairs = sorted((v, s) for v, s, i in zip(values, found["steps"], order, strict=True) if s >= 0 and data["layers"][i]["block"] >= 0)
        assert [s for _, s in pairs] == sorted(s for _, s in pairs)
        assert "what" in found["note"]
        assert "does not say" in found["note"]
    first = next(m for m in maps.values() if m["title"] == page.all("span", id="map-title")[0]["text"])
    assert [("doubt" in e["@class"].split()) for e in cells] == [k in first["doubt"] for k in range(len(cells))]


def test_wide_ranges_are_coloured_by_decades() -> None:
    data = inspection(5)
    for i, x in enumerate(data["layers"]):
        x["measures"]["stable_rank"] = 10.0 ** (i % 5)
    found = next(m for m in embedded(Page(render(data)), "map-data") if m["key"] == "measure:stable_rank")
    assert found["title"].endswith("(log scale)")
    assert sorted(set(found["steps"])) == [0, 4, 8, 11, 15]
    assert (found["low"], found["high"]) == ("1.0", "10,000")


def test_tails_edges_and_twins_can_be_read_off_the_axes() -> None:
    """Pixels back to numbers through the ticks alone."""
    data = inspection(3)
    panel = next(p for p in re.findall(r'<svg class="plot spectra".*?</svg>', render(data)) if "Singular values of key" in p)
    texts = re.findall(r'<text class="tick (mid|end)" x="([\d.]+)" y="([\d.]+)">([\d.]+)</text>', panel)
    across = [(float(x), math.log(float(t))) for kind, x, _, t in texts if kind == "mid"]
    up = [(float(y) - 3.5, math.log(float(t))) for kind, _, y, t in texts if kind == "end"]

    def reader(ticks: list[tuple[float, float]]) -> Any:
        (p0, v0), (p1, v1) = ticks[0], ticks[-1]
        return lambda p: math.exp(v0 + (v1 - v0) * (p - p0) / (p1 - p0))

    index, sigma = reader(across), reader(up)
    lines = re.findall(r'<g class="ln d\d+( shown)?" data-l="(\d+)">(.*?)</g>', panel)
    members = [data["layers"][int(i)] for _, i, _ in lines]
    assert sum(bool(shown) for shown, _, _ in lines) == 1, "one fit is drawn before anybody points"
    for (_, _, inner), x in zip(lines, members, strict=True):
        assert ('class="tail"' in inner) == ("tail" in x)
        if "tail" in x:
            for (px, py), (i, s) in zip(numbers(re.search(r'class="tail" d="([^"]+)"', inner)[1]), x["tail"], strict=True):  # type: ignore[index]
                assert index(px) == pytest.approx(i, rel=0.02)
                assert sigma(py) == pytest.approx(s, rel=0.02)
        twin = numbers(re.search(r'class="twin" d="([^"]+)"', inner)[1])  # type: ignore[index]
        assert sigma(twin[0][1]) == pytest.approx(x["other"]["spectrum"][0], rel=0.02)
    y, height = re.search(r'<rect class="noise" x="42" y="([\d.]+)" width="276" height="([\d.]+)"', panel).groups()  # type: ignore[union-attr]
    edges = [x["edge"] for x in members]
    assert sigma(float(y)) == pytest.approx(max(edges), rel=0.02)
    assert sigma(float(y) + float(height)) == pytest.approx(min(edges), rel=0.05)


def test_ratios_are_those_of_the_spectra() -> None:
    panel = re.findall(r'<svg class="plot ratios".*?</svg>', render(inspection(2)))[0]
    up = [(float(y) - 3.5, float(t)) for y, t in re.findall(r'<text class="tick end" x="[\d.]+" y="([\d.]+)">([\d.]+)</text>', panel)]
    (p0, v0), (p1, v1) = up[0], up[-1]
    first = numbers(re.search(r'class="kept" d="([^"]+)"', panel)[1])[0]  # type: ignore[index]
    assert v0 + (v1 - v0) * (first[1] - p0) / (p1 - p0) == pytest.approx(1.05, abs=0.002)


def test_charts_by_depth_show_points_errors_and_doubts() -> None:
    data = inspection(6)
    charts = re.findall(r'<svg class="plot by-depth".*?</svg>', render(data))
    assert len(charts) == 3
    single, several, _ = charts
    assert single.count('class="error"') == 6
    assert single.count('class="dot hollow"') == 1
    assert single.count('class="dot"') == 5
    assert several.count('class="trace c') == len(data["depth"][1]["traces"]) == 6
    up = [(float(y) - 3.5, float(t)) for y, t in re.findall(r'<text class="tick end" x="[\d.]+" y="([\d.]+)">([\d.]+)</text>', single)]
    (p0, v0), (p1, v1) = up[0], up[-1]
    dots = [float(y) for y in re.findall(r'<circle class="dot(?: hollow)?" cx="[\d.]+" cy="([\d.]+)"', single)]
    for y, point in zip(dots, data["depth"][0]["traces"][0]["points"], strict=True):
        assert v0 + (v1 - v0) * (y - p0) / (p1 - p0) == pytest.approx(point["value"], abs=0.03)
    assert "1 further number" in Page(render(data)).all("summary")[0]["text"]


def test_facts_and_advice_are_written_out() -> None:
    data = inspection(2)
    page = Page(render(data))
    facts = page.all("section", id="facts")[0]["text"]
    assert "0 ± 0.50" in facts
    assert "0, 3, 1 ?" in facts
    assert "one text alone" in facts
    assert "3 further numbers are in the data of this page." in facts
    advice = page.all("section", id="advice")[0]["text"]
    for s in data["advice"]["suggestions"]:
        assert s["reason"] in advice
        assert s["module"] in advice
    for text in data["advice"]["basis"]:
        assert text in advice


def test_hostile_names_stay_text() -> None:
    data = poison(inspection(2))
    for key in ("depth", "profiles"):
        assert data[key]
    for m in data["methods"]:
        m["fidelity"], m["paper"] = "variant", "javascript:alert(1)"
    for x in data["layers"]:
        x["measures"] = {EVIL + k: v for k, v in x["measures"].items()}
    for s in data["advice"]["suggestions"]:
        s["action"] = "keep"
    data["kind"] = "inspect"
    good, bad = Page(render(inspection(2))), Page(render(data))
    assert len(bad.all("script")) == 3
    assert {e["tag"] for e in bad.elements} <= {e["tag"] for e in good.elements}
    assert {k for e in bad.elements for k in e} <= {k for e in good.elements for k in e}
    assert embedded(bad, "report-data") == data
    assert not any("javascript" in (e.get("@href") or "") for e in bad.elements)


ODD: list[dict[str, Any]] = [
    {"measures": None, "spread": {}, "doubt": {"alpha": "zero"}},
    {"spectrum": [], "spectrum_at": [], "other": None, "edge": None},
    {"spectrum": [0.0, 0.0], "spectrum_at": [1, 2]},
    {"state": "skipped", "shape": [0, 7], "spectrum": [], "spectrum_at": [], "other": None, "reason": "the matrix is empty (0 x 7)"},
    {"edge": 1e-30},
    {"edge": 1e30},
    {"tail": [[1.0, 1e-12], [3.0, 1e-13]]},
    {"measures": {"alpha": -1e300, "stable_rank": None, "relative_change.frobenius": 0.0}},
    {"block": 700},
    {"other": {"spectrum": [1.0], "spectrum_at": [1]}},
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("blocks", [1, 3])
def test_odd_matrices_are_drawn(odd: dict[str, Any], blocks: int) -> None:
    data = inspection(blocks)
    data["layers"][0].pop("tail", None)
    data["layers"][0] |= odd
    text = render(data)
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL))
    page = Page(text)
    assert len([e for e in page.all("tr") if "@data-l" in e]) == len(data["layers"])
    for e in page.elements:
        for key in ("@cx", "@cy", "@x", "@y", "@height"):
            if key in e:
                assert abs(float(e[key])) < 1e5


def test_a_thousand_matrices_stay_small() -> None:
    data = large_inspection()
    text = render(data)
    assert len(data["layers"]) == 1009
    assert len(data["columns"]) == 43
    assert len(text) < 7_000_000
    assert len(re.findall(r'<tr data-l="\d+"', text)) == 1009


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("columns", 1, "key"), "alpha", "columns: every key is there once, found \\['alpha'\\]"),
        (("layers", 1, "tail"), [[1.0, 2.0]], "tail: expected two ends"),
        (("layers", 1, "tail"), [[0.0, 2.0], [3.0, 1.0]], "positive numbers"),
        (("layers", 1, "other", "spectrum_at"), [1], "other.spectrum: expected at most"),
        (("layers", 1, "shape"), [0, 4], "shape: expected two positive sizes"),
        (("depth", 0, "traces"), [], "depth\\[0\\] \\('lim'\\): expected at least one number"),
        (("profiles", 0, "lines", 1, "at"), [2, 2, 3, 4, 5], "lines\\[1\\]: expected as many increasing places"),
        (("advice", "suggestions", 0, "action"), "burn", "action: expected one of 'compress'"),
        (("methods", 0, "valid"), 1.5, "valid: expected a whole number"),
        (("facts", 0, "value"), [1], "value: expected"),
    ],
)
def test_check_names_what_is_wrong(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = copy.deepcopy(inspection(2))
    at: Any = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(Refused, match=message):
        check(data)


def test_a_report_survives_json() -> None:
    data = inspection(2)
    assert check(json.loads(json.dumps(data))) == data
