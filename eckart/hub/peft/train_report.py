"""What a fine-tune leaves behind: the adapter with its card, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...axes import Recipe
from ...axes.border import to_yaml
from ...report.words import several
from ...verbs.adapter_folder import write_folder
from ...verbs.output import versions

if TYPE_CHECKING:
    from .train import Protocol, Run, Texts


def report_of(
    model: str, runs: Sequence[Run], protocol: Protocol, texts: Texts, command: str, failed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The report of one run, or the table and the curves of several.

    Args:
        model: folder or Hub id.
        runs: at least one.
        protocol: what they share.
        texts: what they were trained and scored on.
        command: the command line, or empty.
        failed: recipe -> why it has no run.
    """
    name = Path(model).name
    first = runs[0]
    columns = [
        "recipe",
        "trained numbers",
        "peak rate",
        *(f"{r['metric']} before" for r in first.rows[:1]),
        *(r["metric"] for r in first.rows),
        "last loss",
    ]
    table = [
        [r.recipe.name, r.trained, r.lr, r.rows[0]["before"], *(row["after"] for row in r.rows), r.losses[-1][1] if r.losses else None]
        for r in runs
    ]
    best = min(runs, key=lambda r: r.rows[0]["after"])
    verdict = [
        f"{r.recipe.name}: {r.rows[0]['metric']} {r.rows[0]['before']:.4f} before, {r.rows[0]['after']:.4f} after {several(protocol.steps, 'step')}."
        for r in runs
    ]
    if len(runs) > 1:
        learnt = best.rows[0]["after"] < best.rows[0]["before"]
        lead = f"Lowest after training: {best.recipe.name}." if learnt else "No recipe is better than the model was before."
        verdict.insert(0, f"{lead} One seed; small differences mean nothing.")
    return {
        "format": 1, "kind": "adapt", "title": f"{name}: {', '.join(r.recipe.name for r in runs)}", "verdict": verdict, "layers": [],
        "model": {"name": name, "path": model, "parameters": None, "bytes": None}, "command": command or None, "evaluation": first.rows if len(runs) == 1 else [],
        "recipe": _recipe_info(first.recipe) if len(runs) == 1 else None,
        "notes": [_note(r.recipe) for r in runs] if len(runs) > 1 else [],
        "tables": [{"title": "Fine-tuning", "columns": columns, "rows": table, "note": _words(protocol, texts)}],
        "curves": [{"title": "Training loss", "x": "step", "y": "loss", "series": [{"name": r.recipe.name, "points": [[s, v] for s, v in r.losses]} for r in runs]}],
        "warnings": _warnings(runs, texts, failed or {}),
        "versions": versions(), "timings": {f"{r.recipe.name}, {k}": round(v, 3) for r in runs for k, v in r.seconds.items()},
    }  # fmt: skip


def _warnings(runs: Sequence[Run], texts: Texts, failed: Mapping[str, str]) -> list[str]:
    out = [f"{name}: {why}" for name, why in failed.items()]
    if texts.seen:
        out.append(f"{texts.seen} of {len(texts.held_out)} held-out texts are also trained on: their score says nothing of new text.")
    worse = [r for r in runs if r.rows[0]["after"] > r.rows[0]["before"]]
    if worse:
        names = ", ".join(f"{r.recipe.name} ({r.lr:g})" for r in worse)
        out.append(f"the held-out text became less likely under {names}. Lower the rate (--lr), or give more text like it.")
    if len(runs) > 1:  # what they differ in stands beside each of them
        return out
    return out + [f"{r.recipe.name} differs from its paper: {r.recipe.differs}" for r in runs if r.recipe.fidelity != "exact"]


def _note(recipe: Recipe) -> dict[str, Any]:
    from ...report.links import paper_address

    differs = f" What differs: {recipe.differs}" if recipe.differs else ""
    return {"title": recipe.name, "text": f"{recipe.title} ({recipe.paper}).{differs}", "href": paper_address(recipe.paper)}


def _recipe_info(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name, "title": recipe.title, "paper": recipe.paper, "fidelity": recipe.fidelity, "differs": recipe.differs or None, "yaml": to_yaml(recipe)
    }  # fmt: skip


def _words(protocol: Protocol, texts: Texts) -> str:
    rows = protocol.batch_size * protocol.accumulate
    return (
        f"{several(protocol.steps, 'step')} of {several(rows, 'row')} of up to {several(protocol.length, 'token')}, cosine schedule, seed {protocol.seed}; "
        f"scored on {texts.name} ({several(len(texts.held_out), 'text')})"
    )


def save_run(folder: Path, done: Run, report: dict[str, Any], base: str) -> None:
    from peft.utils.save_and_load import get_peft_model_state_dict

    from ...report.html import render, to_json
    from .offline import plain

    config = done.model.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    lasting = {k: v for k, v in report.items() if k != "timings"}
    files = {"README.md": _card(done, report, base), "report.json": to_json(lasting), "report.html": render(report)}
    files["run.json"] = json.dumps({"timings": report["timings"]}, indent=1) + "\n"
    write_folder(folder, get_peft_model_state_dict(done.model), plain(config), files)


def _card(done: Run, report: dict[str, Any], base: str) -> str:
    recipe = done.recipe
    lines = ["---", "library_name: peft", f"base_model: {base}", "tags:", "- eckart", f"- {recipe.name}", "---", ""]
    lines += [f"# {Path(base).name} + {recipe.name}", "", f"{recipe.title} ({recipe.paper}); {done.trained:,} trained numbers.", ""]
    lines += [
        "| metric | before | after |",
        "|---|---|---|",
        *(f"| {r['metric']} | {r['before']:.4f} | {r['after']:.4f} |" for r in done.rows),
        "",
    ]
    lines += [report["tables"][0]["note"] + ".", ""]
    lines += [
        "```python",
        "import eckart",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base!r})",
        'model = PeftModel.from_pretrained(base, "this folder")',
        "```",
        "",
    ]
    if recipe.differs:
        lines += [f"Differs from the paper: {recipe.differs}", ""]
    return "\n".join(lines)
