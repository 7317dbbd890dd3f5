"""Advice follows the evidence and nothing else; the evidence holds what the bench wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

import eckart as ek
from bench.advise import LEVEL, TARGETS, lucks, spearman
from eckart.axes.protocols import Site
from eckart.measures.base import Record
from eckart.verbs.advise import advise, evidence, features, judges, rests_on, scores

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "advise.json"


def row(verdict: str, sign: int, a: float, b: float) -> dict[str, Any]:
    return {"verdict": verdict, "sign": sign, "rho": {"m": [a, a - 0.2, a + 0.2], "n": [b, b - 0.2, b + 0.2]}, "within": {}, "luck": 0.001}


def known(**columns: Any) -> dict[str, Any]:
    return {"targets": {"cut": {"what": "loss of a cut", "low": "compress", "high": "keep", "tried": 9, "columns": columns}}}


def run(values: dict[str, list[float]]) -> tuple[list[Record], list[Site]]:
    count = len(next(iter(values.values())))
    sites = [Site(f"blocks.{i}.w", (40, 30), (f"blocks.{i}.w.weight",), block=i) for i in range(count)]
    return [Record(s.name, key, v[i], "") for key, v in values.items() for i, s in enumerate(sites)], sites


def test_matrices_are_ranked_by_what_predicts_alone() -> None:
    good, bad = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0, 9.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    records, sites = run({"entropy": good, "alpha": bad})
    made = advise(records, sites, known(entropy=row("predicts", 1, 0.6, 0.5), alpha=row("nothing", 1, 0.9, 0.9)))
    actions = [(s["action"], s["module"]) for s in made["suggestions"]]
    assert actions == [("compress", "blocks.1.w"), ("compress", "blocks.3.w"), ("keep", "blocks.9.w"), ("keep", "blocks.8.w")]
    assert made["suggestions"][0]["reason"] == "entropy 1, lowest of 10"
    assert made["suggestions"][1]["reason"] == "entropy 2, 2nd lowest of 10"
    assert {m for s in made["suggestions"] for m in s["measures"]} == {"entropy"}
    assert "+0.60 [+0.40, +0.80]" in made["basis"][0]
    assert "0.1% of the cases" in made["basis"][0]


def test_a_negative_correlation_turns_the_order_round() -> None:
    records, sites = run({"zd": [float(i) for i in range(10)]})
    made = advise(records, sites, known(zd=row("predicts", -1, -0.6, -0.5)))
    assert [s["module"] for s in made["suggestions"]] == ["blocks.9.w", "blocks.8.w", "blocks.0.w", "blocks.1.w"]


def test_places_are_means_weighted_by_the_weaker_model() -> None:
    records, sites = run({"entropy": [1.0, 2.0, 3.0], "zd": [3.0, 2.0, 1.0]})
    target = known(entropy=row("predicts", 1, 0.9, 0.6), zd=row("predicts", 1, 0.2, 0.8))["targets"]["cut"]
    chosen = judges(target, features(records, sites), 3)
    assert [(j.key, j.rho) for j in chosen] == [("entropy", 0.6), ("zd", 0.2)]
    assert scores(chosen) == pytest.approx({"blocks.0.w": 0.25, "blocks.1.w": 0.5, "blocks.2.w": 0.75})


def test_without_evidence_there_is_no_advice_and_it_is_said() -> None:
    records, sites = run({"alpha": [float(i) for i in range(10)]})
    nothing = advise(records, sites, known(alpha=row("nothing", 0, 0.1, -0.1)))
    assert nothing["suggestions"] == []
    assert nothing["basis"] == [
        "Compress and keep: no suggestion. Not one of the 9 columns that were tried predicts the loss of a cut on both models of the bench."
    ]
    unmeasured = advise(records, sites, known(entropy=row("predicts", 1, 0.6, 0.5)))
    assert unmeasured["suggestions"] == []
    assert "was not measured here: entropy." in unmeasured["basis"][0]
    few, two = run({"entropy": [1.0, 2.0]})
    assert "2 matrices are too few" in advise(few, two, known(entropy=row("predicts", 1, 0.6, 0.5)))["basis"][0]


def test_numbers_that_are_no_results_are_not_heard() -> None:
    records, sites = run({"entropy": [float(i) for i in range(10)]})
    doubtful = [Record(r.module, r.measure, r.value, "", valid=False, note="no") for r in records]
    assert advise(doubtful, sites, known(entropy=row("predicts", 1, 0.6, 0.5)))["suggestions"] == []


def test_the_shipped_evidence_is_that_of_the_bench() -> None:
    bench = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name, target in evidence()["targets"].items():
        assert target == {k: v for k, v in bench["targets"][name].items() if k != "beside"}
        for found in target["columns"].values():
            ends = [(low, high) for _, low, high in found["rho"].values()]
            one_side = len(ends) == 2 and (all(low > 0 for low, _ in ends) or all(high < 0 for _, high in ends))
            assert (found["verdict"] == "predicts") == (one_side and found["luck"] <= LEVEL / len(TARGETS))
    acted = [t["columns"] for t in evidence()["targets"].values() if t["low"] or t["high"]]
    said = {k.removesuffix("/rank").partition(".")[0] for columns in acted for k, c in columns.items() if c["verdict"] == "predicts"}
    assert said == set(rests_on())


def test_correlations_of_the_bench_are_those_of_scipy() -> None:
    """Its own formula, on the numbers of the result file; ties and missing values included."""
    bench = json.loads(RESULTS.read_text(encoding="utf-8"))
    checked = 0
    for target, found in bench["targets"].items():
        for key, column in found["columns"].items():
            for m in bench["models"]:
                names = [n for n in m["effects"][target] if n in m["columns"].get(key, {})]
                if m["name"] in column["rho"]:
                    rho = spearmanr([m["columns"][key][n] for n in names], [m["effects"][target][n] for n in names]).statistic
                    assert column["rho"][m["name"]][0] == pytest.approx(rho, abs=6e-4)
                    checked += 1
    assert checked > 200


def test_luck_is_that_of_the_best_of_all_columns() -> None:
    """Noise has the luck of noise however many columns there are; one true column among them has none."""
    rng = np.random.default_rng(3)
    names = [f"l{i}" for i in range(24)]
    models: dict[str, Any] = {}
    for model in ("m", "n"):
        effect = rng.normal(size=24)
        columns = {f"noise{k}": dict(zip(names, rng.normal(size=24), strict=True)) for k in range(20)}
        columns["true"] = dict(zip(names, effect + 0.3 * rng.normal(size=24), strict=True))
        shapes = {n: "4 x 4" if i < 12 else "8 x 4" for i, n in enumerate(names)}
        columns["shape"] = {n: float(s[0]) for n, s in shapes.items()}
        models[model] = {"effects": {"cut": dict(zip(names, effect, strict=True))}, "columns": columns, "blocks": [], "shapes": shapes}
    found = lucks([*(f"noise{k}" for k in range(20)), "true", "shape"], models, "cut")
    assert found["true"] < 0.001
    assert found["shape"] == 1, "what only tells the shapes apart tells nothing within one"
    assert min(v for k, v in found.items() if k.startswith("noise")) > 0.02
    alone = lucks(["noise0", "true"], models, "cut")
    assert alone["noise0"] <= found["noise0"]


def test_rank_correlation_within_classes() -> None:
    x, y = np.array([1.0, 2.0, 10.0, 11.0]), np.array([2.0, 1.0, 20.0, 19.0])
    assert spearman(x, y, np.zeros(4)) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(x, y, np.array([0, 0, 1, 1])) == pytest.approx(-1)


def test_advice_on_the_bundled_model(lm_folder: Path) -> None:
    """Weights alone: the measures of weights that predict are heard, and what needs text is not asked for."""
    made = ek.inspect(lm_folder, advise=True)
    found = made.report["advice"]
    order = sorted(r.value for r in made.records if r.measure == "entropy" and ".layers." in r.module)
    best = next(s for s in found["suggestions"] if s["action"] == "compress")
    value = next(r.value for r in made.records if r.measure == "entropy" and r.module == best["module"])
    assert value <= order[len(order) // 5]
    assert {s["action"] for s in found["suggestions"]} <= {"compress", "keep"}
