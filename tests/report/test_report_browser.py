"""The page in a real browser: it draws, sorts, filters, switches, speaks to the keyboard, and asks the network for nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eckart.report import save
from tests.report.browser import HINT, Browser, find
from tests.report.sample import large_sample, sample
from tests.report.test_report_html import hostile

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    program = find()
    if program is None:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(HINT)
        pytest.skip(HINT)
    with Browser(program) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    data = {"small": sample(), "large": large_sample(), "evil": hostile()}
    return {name: save(report, folder / f"{name}.html") for name, report in data.items()}


@pytest.fixture(autouse=True)
def _no_errors(tab: Browser) -> Iterator[None]:
    tab.errors.clear()
    tab.requests.clear()
    yield
    assert tab.errors == []
    assert tab.js("document.documentElement.getAttribute('data-error')") is None
    assert [r for r in tab.requests if not r.startswith(("file:", "about:", "data:"))] == []


def column(tab: Browser, key: str) -> list[Any]:
    """What the rows show, in their order, as values of the report."""
    script = """(() => { const layers = JSON.parse(document.getElementById("report-data").textContent).layers;
      return [...document.querySelectorAll("#layer-table tbody tr")].filter(r => !r.hidden).map(r => layers[r.dataset.l][%s]); })()"""
    return tab.js(script % json.dumps(key))


def test_the_plots_are_there(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["small"])
    found = tab.js(
        """[...document.querySelectorAll("svg.spectra")].map(s => [...s.querySelectorAll(".kept")].map(p => p.getTotalLength()))"""
    )
    assert [len(lines) for lines in found] == [6] * 6
    assert all(length > 50 for lines in found for length in lines)
    cells = tab.js("""[...document.querySelectorAll(".heat .cell rect")].map(r => getComputedStyle(r).fill)""")
    assert len(cells) == 36
    assert len(set(cells)) > 4
    dense = [x["state"] == "dense" for x in sample()["layers"]]
    assert any(dense)
    assert sum(fill.startswith("rgb") for fill in cells) == dense.count(False)
    assert sum("hatch" in fill for fill in cells) == dense.count(True)
    assert tab.js("""document.querySelectorAll("svg.losses .dot").length""") == 36
    assert tab.js("""document.querySelectorAll("svg.curve-plot .curve").length""") == 6


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_nothing_sticks_out(tab: Browser, pages: dict[str, Path], width: int, dark: bool) -> None:
    for name in ("small", "evil"):
        tab.open(pages[name], width=width, height=800, dark=dark)
        wide = f"e.getBoundingClientRect().right > {width + 1} && !e.parentElement.closest('.scroll, nav, pre')"
        assert tab.js(f"[...document.querySelectorAll('body *')].filter(e => {wide}).map(e => e.outerHTML.slice(0, 200))") == []
        assert tab.js("document.documentElement.scrollWidth") <= width
        paper = tab.js("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, paper[4:-1].split(", "))) < 80) is dark


def test_sorting(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["small"])
    for key in ("error", "rank", "name"):
        tab.click(f'#layer-table th[data-k="{key}"] button')
        values = column(tab, key)
        known = [v for v in values if v is not None]
        assert len(values) == 36
        assert values == sorted(known) + [None] * (36 - len(known))
        assert tab.js(f"""document.querySelector('th[data-k="{key}"]').getAttribute('aria-sort')""") == "ascending"
        tab.click(f'#layer-table th[data-k="{key}"] button')
        assert column(tab, key) == sorted(known, reverse=True) + [None] * (36 - len(known))
    tab.open(pages["small"], "#sort=error:desc")
    assert column(tab, "error") == sorted(column(tab, "error"), reverse=True)


def test_filter(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["small"], "#filter=layers.3%20KEY")
    assert column(tab, "name") == ["model.layers.3.key"]
    assert tab.js("document.getElementById('shown').textContent") == "1 of 36 matrices"


def test_the_map_switches(tab: Browser, pages: dict[str, Path]) -> None:
    read = """[...document.querySelectorAll(".heat .cell")].map(c => [c.getAttribute("class"), c.textContent])"""
    tab.open(pages["small"])
    ranks = tab.js(read)
    tab.js("""(() => { const s = document.getElementById("measure"); s.value = "error"; s.dispatchEvent(new Event("change")); })()""")
    errors = tab.js(read)
    assert errors != ranks
    assert tab.js("document.getElementById('map-title').textContent") == "relative loss"
    tab.js("""(() => { const s = document.getElementById("measure"); s.value = "rank"; s.dispatchEvent(new Event("change")); })()""")
    assert tab.js(read) == ranks
    tab.open(pages["small"], "#measure=error")
    assert tab.js(read) == errors


def tip(tab: Browser) -> str:
    return tab.js("(() => { const t = document.getElementById('tip'); return t.classList.contains('on') ? t.textContent : ''; })()")


def test_hover_says_which_matrix(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["small"])
    tab.hover('.heat .cell[data-l="7"]')
    data = sample()["layers"][7]
    assert data["name"] in tip(tab)
    assert f"rank {data['rank']} of 384" in tip(tab)
    tab.hover("svg.spectra .cut")
    assert "model.layers.0.query" in tip(tab)
    assert tab.js("document.querySelectorAll('.ln.on').length") == 1
    tab.hover("h1")
    assert tip(tab) == ""


def test_keyboard(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["small"])
    stops = tab.js("""[...document.querySelectorAll("svg[data-nav]")].map(s => s.querySelectorAll('[tabindex="0"]').length)""")
    assert stops == [1] * 13
    tab.js("document.querySelector('.heat .cell').focus()")
    assert "model.layers.0.query" in tip(tab)
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowDown"):
        tab.key(key)
    assert "model.layers.1.value" in tip(tab)
    assert "model.layers.1.value" in tab.js("document.activeElement.getAttribute('aria-label')")
    tab.key("Escape")
    assert tip(tab) == ""
    tab.key("Enter")
    assert tab.js("document.activeElement.matches('tr.here') && document.activeElement.textContent.includes('model.layers.1.value')")
    tab.js("document.querySelector('svg.spectra .ln').focus()")
    tab.key("ArrowRight")
    assert "model.layers.1.query" in tip(tab)


def test_tab_reaches_everything_that_acts(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["small"])
    seen = set()
    for _ in range(60):
        tab.key("Tab")
        seen.add(tab.js("document.activeElement.id || document.activeElement.getAttribute('class') || document.activeElement.tagName"))
    assert {"theme", "measure", "filter"} <= seen
    assert any("cell" in s for s in seen)
    assert any("ln" in s for s in seen)


def test_theme(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["small"])
    light = tab.js("getComputedStyle(document.body).backgroundColor")
    tab.click("#theme")
    dark = tab.js("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    tab.click("#theme")
    assert tab.js("getComputedStyle(document.body).backgroundColor") == light
    tab.open(pages["small"], "#theme=dark")
    assert tab.js("getComputedStyle(document.body).backgroundColor") == dark


def test_print_is_light_and_whole(tab: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    tab.open(pages["small"], dark=True, media="print")
    assert tab.js("getComputedStyle(document.body).color") == "rgb(21, 25, 30)"
    assert tab.js("getComputedStyle(document.querySelector('.scroll.tall')).maxHeight") == "none"
    assert tab.js("getComputedStyle(document.querySelector('nav')).display") == "none"
    tab.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")


def test_hostile_names_do_nothing(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["evil"])
    assert tab.js("document.documentElement.dataset.evil") is None
    assert tab.js("document.images.length") == 0
    tab.hover(".heat .cell")
    assert "<script>" in tip(tab)
    tab.click('#layer-table th[data-k="name"] button')
    assert tab.js("document.documentElement.dataset.evil") is None
    assert tab.js("document.scripts.length") == 3


def test_a_thousand_matrices(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["large"])
    assert tab.js("document.querySelectorAll('.heat .cell').length") == 1008
    tab.click('#layer-table th[data-k="error"] button')
    assert column(tab, "error") == sorted(x["error"] for x in large_sample()["layers"])
    tab.hover('.heat .cell[data-l="1007"]')
    assert "model.layers.125.router" in tip(tab)


def test_without_scripts_the_page_still_shows_everything(tab: Browser, pages: dict[str, Path]) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.call("Page.navigate", url=pages["small"].as_uri())
        end = time.monotonic() + 30
        while "This file is complete" not in (tree := json.dumps(tab.call("DOMSnapshot.captureSnapshot", computedStyles=[])["strings"])):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert "model.layers.5.query" in tree
        assert "Spectra by role" in tree
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
