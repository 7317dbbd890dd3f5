"""`demo`: the main job on the model that ships with the package, from spectra to a folder that transformers opens."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import Refused
from ..progress import shown, track

RATIOS = (0.8, 0.6, 0.4)
RECIPES = ("svd", "svd_llm", "two_sided")
BEST = "two_sided"
PROMPT = 'def read_file(path):\n    """Return '
CALIBRATION = 48  # of the shipped calibration texts, about 4,000 characters each


def demo_model() -> Path:
    """Folder of the small language model that ships with the package, with `calibration.jsonl` and `heldout.jsonl` in it.

    Example:
        >>> (demo_model() / "config.json").is_file()
        True
    """
    path = Path(str(resources.files("eckart"))) / "assets" / "python-lm"
    if not (path / "model.safetensors").is_file():
        raise Refused(f"{path}: the bundled model is missing from this installation. Reinstall eckart.")
    return path


def demo(out: str | Path, *, overwrite: bool = False, prompt: str = PROMPT) -> dict[str, Any]:
    """Inspect, compress at three sizes with three recipes, evaluate on held-out text, reload through transformers, generate.

    Args:
        out: folder for the compressed models and the report.
        overwrite: replace results of an earlier demo.
        prompt: what the reloaded model continues.

    Returns:
        The report; the continuation is its first note.
    """
    from ..data import load_texts
    from ..report.html import save
    from .compress import compress
    from .evaluate import evaluate
    from .host import open_host
    from .inspect import inspect

    source, target = demo_model(), Path(out)
    target.mkdir(parents=True, exist_ok=True)
    calib = load_texts(source / "calibration.jsonl")[:CALIBRATION]
    heldout = source / "heldout.jsonl"
    tokenizer = open_host(source).tokenizer()
    seen = inspect(source)
    before = evaluate(source, heldout)["model"]
    rows: list[list[Any]] = [["original", 1.0, 1.0, before["bits_per_byte"], before["perplexity"], ""]]
    points = {recipe: [[1.0, before["bits_per_byte"]]] for recipe in RECIPES}
    stats: dict[str, Any] = {}
    last: dict[str, Any] = {}
    runs = [(recipe, keep) for recipe in RECIPES for keep in RATIOS]
    for recipe, keep in track(runs, "compressing and evaluating"):
        where = target / f"{recipe}-{keep:g}" if recipe == BEST else None
        with shown("none"):  # one bar for all of it
            made = compress(source, recipe, keep, calib=calib, out=where, stats=stats.get(recipe), overwrite=overwrite)
            after = evaluate(made.path or made.model, heldout, tokenizer=tokenizer)["model"]
        stats[recipe] = made.stats
        sizes = made.report["sizes"]
        rows.append(
            [
                recipe,
                keep,
                sizes["total_after"] / sizes["total_before"],
                after["bits_per_byte"],
                after["perplexity"],
                where.name if where else "",
            ]
        )
        points[recipe].append([keep, after["bits_per_byte"]])
        if (recipe, keep) == (BEST, RATIOS[0]):
            last = {"layers": made.report["layers"], "recipe": made.report["recipe"], "sizes": sizes, "after": after}
    text = continuation(target / f"{BEST}-{RATIOS[0]:g}", prompt)
    report = {
        "format": 1, "kind": "demo", "title": f"{source.name}: three recipes at three sizes", "model": seen.report["model"], "versions": seen.report["versions"],
        "verdict": _verdict(rows), "layers": last["layers"], "recipe": last["recipe"], "budget": {"keep": RATIOS[0]}, "sizes": last["sizes"], "form": "factored",
        "evaluation": [
            {"metric": "bits per byte", "before": before["bits_per_byte"], "after": last["after"]["bits_per_byte"], "better": "lower", "text": heldout.name, "note": f"{BEST} at keep {RATIOS[0]:g}"}
        ],
        "tables": [{"title": "Held-out text", "columns": ["recipe", "keep", "whole model", "bits/byte", "perplexity", "folder"], "rows": rows, "note": f"keep is the share of the targeted layers; {before['tokens']:,} tokens, context {before['context']}, BOS in front of every window"}],
        "curves": [{"title": "Quality against size", "x": "share of the targeted parameters kept", "y": "bits per byte on held-out text", "series": [{"name": r, "points": p} for r, p in points.items()]}],
        "notes": [{"title": "Continuation after a reload through AutoModelForCausalLM", "text": text}],
        "warnings": [],
    }  # fmt: skip
    save(report, target / "report.html", overwrite=True)
    return report


def continuation(folder: Path, prompt: str, tokens: int = 48) -> str:
    """What the model in a folder writes after a prompt, greedily with a repetition penalty, loaded by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.15, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def _verdict(rows: list[list[Any]]) -> list[str]:
    at = {(r[0], r[1]): r[3] for r in rows}
    keep = RATIOS[1]
    base = rows[0][3]
    return [
        f"With {keep:.0%} of the targeted parameters, plain SVD costs {at['svd', keep] - base:+.3f} bits per byte on held-out text, {BEST} {at[BEST, keep] - base:+.3f}.",
        "Every number is measured in this run, on text that neither training nor calibration saw.",
    ]
