"""The page of an inspection in a real browser: another measure, another order, another matrix, by mouse and by keyboard, at 1,000 matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eckart.report import save
from tests.report.browser import Browser
from tests.report.inspection import inspection, large_inspection
from tests.report.test_report_browser import _no_errors as _no_errors
from tests.report.test_report_browser import tab as tab
from tests.report.test_report_browser import tip

pytestmark = pytest.mark.browser

LONG = "How a measure with a very long title is named in the list of measures, in full"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inspections")
    long = inspection(3)
    long["methods"][0]["title"] = LONG
    data = {"small": inspection(6), "large": large_inspection(), "long": long}
    return {name: save(report, folder / f"{name}.html") for name, report in data.items()}


def choose(tab: Browser, select: str, value: str) -> None:
    script = "(() => {{ const s = document.getElementById({}); s.value = {}; s.dispatchEvent(new Event('change')); }})()"
    tab.js(script.format(json.dumps(select), json.dumps(value)))


def focus(tab: Browser, node: str) -> None:
    """Give an element the focus once it is in view and the scrolling, which hides what is shown, is over."""
    frames = "requestAnimationFrame(() => requestAnimationFrame(() => { n.focus({preventScroll: true}); done(true); }))"
    tab.js(f"new Promise(done => {{ const n = {node}; n.scrollIntoView({{block: 'center', behavior: 'instant'}}); {frames}; }})")


def order(tab: Browser) -> list[int]:
    return tab.js("[...document.querySelectorAll('#layer-table tbody tr')].filter(r => !r.hidden).map(r => Number(r.dataset.l))")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_nothing_sticks_out(tab: Browser, pages: dict[str, Path], width: int, dark: bool) -> None:
    tab.open(pages["long"], width=width, height=800, dark=dark)
    wide = f"e.getBoundingClientRect().right > {width + 1} && !e.closest('option') && !e.parentElement.closest('.scroll, nav, pre')"
    assert tab.js(f"[...document.querySelectorAll('body *')].filter(e => {wide}).map(e => e.outerHTML.slice(0, 200))") == []
    assert tab.js("document.documentElement.scrollWidth") <= width


def test_the_map_switches_with_its_scale_and_its_note(tab: Browser, pages: dict[str, Path]) -> None:
    data = inspection(6)
    tab.open(pages["small"])
    assert tab.js("document.getElementById('map-title').textContent") == "relative change frobenius", "a comparison shows what moved"
    choose(tab, "measure", "measure:stable_rank")
    assert tab.js("document.getElementById('map-title').textContent") == "stable rank"
    assert "what stable_rank does not say" in tab.js("document.getElementById('map-note').textContent")
    shown = tab.js("[...document.querySelectorAll('.heat .cell')].map(c => [Number(c.dataset.l), Number(c.textContent)])")
    assert len(shown) == len(data["layers"])
    for i, value in shown:
        assert value == pytest.approx(data["layers"][i]["measures"]["stable_rank"], rel=0.05)
    choose(tab, "measure", "measure:alpha")
    doubted = {i for i, x in enumerate(data["layers"]) if "doubt" in x}
    hatched = tab.js("[...document.querySelectorAll('.heat .cell')].filter(c => getComputedStyle(c.querySelector('rect')).fill.includes('hatch')).map(c => Number(c.dataset.l))")  # fmt: skip
    assert set(hatched) == doubted
    tab.open(pages["small"], "#measure=measure:stable_rank")
    assert tab.js("document.getElementById('map-title').textContent") == "stable rank"


def test_the_table_sorts_by_a_measure_and_shows_another(tab: Browser, pages: dict[str, Path]) -> None:
    layers = inspection(6)["layers"]
    tab.open(pages["small"])
    tab.click('#layer-table th[data-k="measure:outlier_ratio"] button')
    assert order(tab) == sorted(range(len(layers)), key=lambda i: (layers[i]["measures"]["outlier_ratio"], order(tab).index(i)))
    choose(tab, "columns", "energy_ranks")
    heads = tab.js("[...document.querySelectorAll('#layer-table thead th')].map(h => h.dataset.k || h.textContent)")
    assert [h for h in heads if h.startswith("measure:")] == [f"measure:energy_ranks.{p}" for p in ("50%", "90%", "99%")]
    tab.click('#layer-table th[data-k="measure:energy_ranks.90%"] button')
    values = [layers[i]["measures"]["energy_ranks.90%"] for i in order(tab)]
    assert values == sorted(values)


def test_pointing_at_a_spectrum_shows_its_fit_and_its_spikes(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["small"])
    visible = """[...document.querySelectorAll('svg.spectra')].map(s => ['tail', 'spikes', 'twin'].map(
      k => [...s.querySelectorAll('.' + k)].filter(p => getComputedStyle(p).display !== 'none').length))"""
    before = tab.js(visible)
    assert all(counts[:2] == [1, 1] for counts in before), "one matrix of each role is marked before anybody points"
    node = "document.querySelectorAll('svg.spectra')[1].querySelectorAll('.ln')[4]"
    focus(tab, node)
    chosen = int(tab.js(f"{node}.dataset.l"))
    assert inspection(6)["layers"][chosen]["name"] in tip(tab)
    assert tab.js(visible)[1][:2] == [1, 1]
    on = tab.js("[...document.querySelectorAll('svg.spectra .ln.on .spikes')].map(p => (p.getAttribute('d').match(/M/g) || []).length)")
    layer = inspection(6)["layers"][chosen]
    assert on == [sum(i <= layer["outliers"] for i in layer["spectrum_at"])]


def test_one_matrix_by_keyboard(tab: Browser, pages: dict[str, Path]) -> None:
    """From the map: arrows move, Enter opens everything about the matrix."""
    layers = inspection(6)["layers"]
    tab.open(pages["small"])
    focus(tab, "document.querySelector('.heat .cell')")
    tab.key("ArrowRight")
    name = layers[int(tab.js("document.activeElement.dataset.l"))]["name"]
    tab.key("Enter")
    assert tab.js("document.getElementById('one-title').textContent") == name
    assert tab.js("document.activeElement.id") == "one-title"
    choose(tab, "one-name", "2")
    assert tab.js("document.getElementById('one-title').textContent") == layers[2]["name"]
    text = tab.js("document.getElementById('one-body').textContent")
    assert "± 0.25" in text
    assert f"{layers[2]['outliers']} above the noise" in text


def test_charts_by_depth_speak_to_the_keyboard(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["small"])
    focus(tab, "document.querySelectorAll('svg[data-nav=\"depth\"]')[1]")
    first = tip(tab)
    tab.key("ArrowRight")
    assert "block 1" in tip(tab)
    tab.key("ArrowDown")
    assert tip(tab).split(",")[0] != first.split(",")[0]
    focus(tab, "document.querySelector('svg[data-nav=\"profile\"]')")
    tab.key("ArrowDown")
    assert "encoder.layers.1" in tip(tab)


def test_everything_can_be_reached_with_the_tabulator(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["small"])
    seen: set[str] = set()
    for _ in range(90):
        tab.key("Tab")
        seen.add(
            tab.js("document.activeElement.id || document.activeElement.dataset.nav || document.activeElement.getAttribute('class') || ''")
        )
    assert {"theme", "measure", "one-name", "filter", "columns", "download"} <= seen
    assert {"depth", "profile"} <= seen


def test_a_thousand_matrices(tab: Browser, pages: dict[str, Path]) -> None:
    layers: list[dict[str, Any]] = large_inspection()["layers"]
    tab.open(pages["large"])
    assert tab.js("document.querySelectorAll('.heat .cell').length") == 1009
    assert tab.js("document.querySelectorAll('svg.spectra .ln').length") == 1009
    choose(tab, "measure", "measure:alpha")
    assert tab.js("document.getElementById('map-title').textContent") == "alpha"
    tab.click('#layer-table th[data-k="measure:alpha"] button')
    values = [layers[i]["measures"]["alpha"] for i in order(tab)]
    assert len(values) == 1009
    assert values == sorted(values)
    tab.hover('.heat .cell[data-l="1000"]')
    assert layers[1000]["name"] in tip(tab)
    choose(tab, "columns", "*")
    assert tab.js("document.querySelector('#layer-table thead tr').cells.length") == 3 + 43


def test_print_is_light_and_whole(tab: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    tab.open(pages["small"], dark=True, media="print")
    assert tab.js("getComputedStyle(document.body).color") == "rgb(21, 25, 30)"
    assert tab.js("['#one', '.control', 'nav'].map(s => getComputedStyle(document.querySelector(s)).display)") == ["none"] * 3
    tab.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")
