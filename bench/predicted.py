"""Loss that a spectrum predicts beside the loss that is measured, every matrix of a model cut alone; writes `bench/results/predicted.json`, `.md`, `.svg`.

    python -m bench.predicted                       # both models; about ten minutes on one core

A matrix is cut in the recipe's metric to ranks that store 20, 40, 60 and 80% of it, the rest of the model left alone, and the rise of the model's
loss on the first calibration batches is taken: next-token cross-entropy of the language model, 1 - cos to its own embedding for MiniLM. Predicted is
what the recipe's spectrum leaves behind that rank: squared singular values of So W Si (`two_sided`), of W Si (`svd_llm`) and of W (`svd`), and each as a
share of its matrix's own total. The figure is Spearman's rank correlation over all matrices and sizes, and over matrices at one size.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import eckart as ek
from bench.compress import minilm, python_lm
from bench.machine import processor, versions
from eckart.axes import score
from eckart.axes.budgets import tails_of

RESULTS = Path(__file__).parent / "results"
GRID = (0.2, 0.4, 0.6, 0.8)
RECIPES = ("two_sided", "svd_llm", "svd")
BATCHES, LENGTH = 1, 256  # batches of 8 texts, of so many tokens
TEXTS = {"python-lm": 32, "minilm": 64}  # that the statistics see


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""

    def ranks(x: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def measured(path: Path, recipe: str, texts: Sequence[str], max_length: int) -> list[dict[str, Any]]:
    """A row for each matrix and size: predicted loss, its share of the whole, and the rise that was measured."""
    seen: list[tuple[Sequence[float], Sequence[tuple[int, float]]]] = []
    original = score.MeasuredLoss.measured

    def watch(self: Any, curve: Sequence[float], found: Sequence[tuple[int, float]]) -> list[float]:
        seen.append((curve, found))
        return original(self, curve, found)

    score.MeasuredLoss.measured = watch  # type: ignore[method-assign]
    try:
        settings = ["score.kind=measured_loss", f"score.grid={json.dumps(GRID)}", f"score.batches={BATCHES}", "allocate.kind=water_fill"]
        made = ek.compress(ek.load(path, dtype="float32"), recipe, 0.6, calib=list(texts), tokenizer=ek.load_tokenizer(path), settings=settings,
            dry_run="spectra", max_length=min(max_length, LENGTH))  # fmt: skip
    finally:
        score.MeasuredLoss.measured = original  # type: ignore[method-assign]
    rows = []
    for job, (curve, found) in zip(made.plan.jobs, seen, strict=True):
        tails = tails_of(curve)
        for rank, rise in found:
            size = min(GRID, key=lambda g: abs(g - rank * sum(job.shape) / math.prod(job.shape)))
            rows.append(
                {"name": job.name, "rank": rank, "size": size, "predicted": tails[rank], "share": tails[rank] / tails[0], "rise": rise}
            )
    return rows


def correlations(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    out = {"all": spearman([r[key] for r in rows], [r["rise"] for r in rows])}
    for size in GRID:
        here = [r for r in rows if r["size"] == size]
        out[f"{size:g}"] = spearman([r[key] for r in here], [r["rise"] for r in here])
    return out


def picture(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Predicted against measured loss on log axes, a point for each matrix and size; rises of nothing or less lie on the lower edge."""
    side, edge = 360, 40
    floor = min((r["rise"] for r in rows if r["rise"] > 0), default=1e-6)
    xs = np.log10([max(r["predicted"], 1e-12) for r in rows])
    ys = np.log10([max(r["rise"], floor) for r in rows])

    def at(v: np.ndarray) -> np.ndarray:
        return edge + (side - 2 * edge) * (v - v.min()) / max(float(np.ptp(v)), 1e-9)

    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{side - y:.1f}" r="3" fill="#2f6f9f" fill-opacity="{0.25 + 0.75 * (1 - r["size"]):.2f}"/>'
        for x, y, r in zip(at(xs), at(ys), rows, strict=True)
    )
    ends = [f"{10 ** float(v):.1g}" for v in (xs.min(), xs.max(), ys.min(), ys.max())]
    words = [
        (side / 2, 20, title, "middle"), (side / 2, side - 8, "predicted loss", "middle"), (edge, side - 22, ends[0], "middle"),
        (side - edge, side - 22, ends[1], "middle"), (6, side - edge, ends[2], "start"), (6, edge, ends[3], "start"), (6, side / 2, "rise", "start"),
    ]  # fmt: skip
    text = "".join(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{word}</text>' for x, y, word, anchor in words)
    frame = f'<rect x="{edge}" y="{edge}" width="{side - 2 * edge}" height="{side - 2 * edge}" fill="none" stroke="#999"/>'
    return f'<g font-family="sans-serif" font-size="11">{frame}{dots}{text}</g>'


def write(data: dict[str, Any]) -> str:
    """The table and the picture of what is in the result file."""
    text = f"# Predicted and measured loss of single cuts\n\nSpearman's rank correlation. {data['machine']['cpu']}, {data['machine']['threads']} threads.\n"
    groups = []
    for key, found in data["models"].items():
        text += (
            f"\n## {key}\n\n| predicted by | all sizes | "
            + " | ".join(f"keep {g:g}" for g in GRID)
            + " |\n|---|---|"
            + "---|" * len(GRID)
            + "\n"
        )
        for recipe, rows in found.items():
            for how, word in (("predicted", ""), ("share", ", share of its own total")):
                text += f"| {recipe}{word} | " + " | ".join(f"{v:.2f}" for v in correlations(rows, how).values()) + " |\n"
        negative = sum(r["rise"] <= 0 for r in found["two_sided"]) / len(found["two_sided"])
        text += f"\n{negative:.0%} of the cuts did not raise the loss on these texts at all.\n"
        groups.append(picture(found["two_sided"], f"{key}, two-sided: {correlations(found['two_sided'], 'predicted')['all']:.2f}"))
    body = "".join(f'<g transform="translate({360 * i} 0)">{g}</g>' for i, g in enumerate(groups))
    (RESULTS / "predicted.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {360 * len(groups)} 360">{body}</svg>\n')
    text += "\n![Predicted against measured loss](predicted.svg)\n"
    (RESULTS / "predicted.md").write_text(text)
    return text


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", choices=("minilm", "python-lm"), action="append")
    ap.add_argument("--threads", type=int, default=1)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    file = RESULTS / "predicted.json"
    data = json.loads(file.read_text()) if file.is_file() else {"models": {}}
    data["machine"] = {"cpu": processor(), "threads": args.threads, "versions": versions()}
    for key in args.model or ("python-lm", "minilm"):
        bench = {"minilm": minilm, "python-lm": python_lm}[key]()
        data["models"][key] = {r: measured(bench.path, r, bench.calib[: TEXTS[key]], bench.max_length) for r in RECIPES}
        file.write_text(json.dumps(data, indent=1) + "\n")
    print(write(data))


if __name__ == "__main__":
    main()
