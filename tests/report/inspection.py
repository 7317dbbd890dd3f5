"""Sample reports of measures: every number follows from formulas. `inspection()` has every part that such a report can have."""

from __future__ import annotations

import math
from typing import Any

from tests.report.sample import ENCODER, ENCODER_REST, LLAMA, places, wobble

# measure, its numbers, whether a run shows the first of them at once
MEASURES = (
    ("relative_change", ("frobenius", "cosine"), True),
    ("outlier_ratio", ("",), True),
    ("alpha", ("",), True),
    ("bulk_edge", ("outliers", "edge", "noise"), True),
    ("energy_ranks", ("50%", "90%", "99%"), False),
    ("stable_rank", ("",), False),
)
MANY = tuple((f"made_up_{k}", ("one", "two", "three", "four"), False) for k in range(8))


def inspection(
    blocks: int = 6, *, roles: tuple[tuple[str, tuple[int, int]], ...] = ENCODER + ENCODER_REST, more: tuple[Any, ...] = ()
) -> dict[str, Any]:
    """A report over `blocks` x roles matrices and a head of another size."""
    measures = MEASURES + more
    layers = [_layer(b, k, role, shape, measures) for b in range(blocks) for k, (role, shape) in enumerate(roles)]
    layers.append(_layer(-1, 0, "head", (2048, 256), measures))
    columns = [
        {"key": f"{name}.{part}" if part else name, "measure": name, "title": f"{name} {part}".strip().replace("_", " "), "main": main and part == parts[0]}
        for name, parts, main in measures
        for part in parts
    ]  # fmt: skip
    columns[2]["unit"] = "%"
    bad = sum("alpha" in x.get("doubt", {}) for x in layers)
    methods = [
        {
            "name": name, "title": name.replace("_", " ").capitalize(), "paper": "arXiv:0706.1062", "estimator": f"how {name} is computed",
            "note": f"what {name} does not say", "settings": "a = 1", "fidelity": "exact", "differs": "from `released code` in rounding", "unit": "",
            "valid": len(layers) - bad * (name == "alpha"), "invalid": bad * (name == "alpha"), "reasons": ["only 4 values in the tail (2)"] if name == "alpha" else [],
        }
        for name, _, _ in measures
    ]  # fmt: skip
    other = {"name": "tuned", "path": "models/tuned", "parameters": 1000, "bytes": 4000}
    return {
        "format": 1, "kind": "inspect", "title": "encoder beside tuned", "verdict": ["Thirty-seven matrices hold 99% of the parameters.", "Alpha says little."],
        "model": {"name": "encoder", "path": "models/encoder", "parameters": 1000, "bytes": 4000}, "other": other, "layers": layers, "columns": columns,
        "methods": methods, "depth": _depth(blocks, [r for r, _ in roles]), "facts": _facts(), "profiles": _profiles(blocks), "curves": [
            {"title": "Path between the models", "x": "at", "y": "loss", "series": [{"name": "loss", "points": [[0.0, 1.0], [0.5, 1.5], [1.0, 1.1]]}]}
        ],
        "advice": {
            "suggestions": [
                {"action": "compress", "module": layers[1]["name"], "reason": "stable rank 3.1, lowest of 36", "measures": ["stable_rank"]},
                {"action": "keep", "module": layers[0]["name"], "reason": "stable rank 30, highest of 36", "measures": ["stable_rank"]},
            ],
            "basis": ["compress and keep: ranked by stable rank (small +0.61 [+0.40, +0.77]).", "protect: no suggestion. No measure predicted it."],
        },
        "warnings": ["Not measured, 3 of 9 values are NaN or Inf: layers.0.broken."], "versions": {"eckart": "0.1.0"}, "timings": {"weights": 1.5},
    }  # fmt: skip


def large_inspection() -> dict[str, Any]:
    """1,009 matrices with 43 numbers each."""
    return inspection(126, roles=LLAMA, more=MANY)


def _layer(block: int, k: int, role: str, shape: tuple[int, int], measures: tuple[Any, ...]) -> dict[str, Any]:
    at = places(min(shape), 48)
    spectrum = [8.0 * i ** -(0.3 + 0.05 * k) * (1 - 0.9 * (i / min(shape)) ** 4) for i in at]
    numbers = {
        f"{n}.{p}" if p else n: round(2 + wobble(block + 2, k, j, i), 4)
        for j, (n, parts, _) in enumerate(measures)
        for i, p in enumerate(parts)
    }
    name = f"encoder.layers.{block}.{role}" if block >= 0 else role
    row: dict[str, Any] = {
        "name": name, "block": block, "role": role, "shape": list(shape), "rank": None, "state": "dense", "reason": "", "params_before": math.prod(shape),
        "params_after": math.prod(shape), "spectrum": spectrum, "spectrum_at": at, "measures": numbers, "spread": {"alpha": 0.25},
        "other": {"spectrum": [v * (1 + 0.05 / i) for v, i in zip(spectrum, at, strict=True)], "spectrum_at": at},
        "edge": spectrum[len(at) // 3], "outliers": at[len(at) // 3] - 1, "lists": {"relative_change.list": [1.0, None, 0.5, 0.25]},
    }  # fmt: skip
    if (block + k) % 4 == 0:
        row["doubt"] = {"alpha": "only 4 values in the tail"}
    else:
        row["tail"] = [[1.0, spectrum[0]], [float(at[20]), spectrum[20]]]
        row["remarks"] = {"stable_rank": "close to one"}
    return row


def _depth(blocks: int, roles: list[str]) -> list[dict[str, Any]]:
    def points(seed: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"block": b, "value": 2 + wobble(seed, b), "spread": 0.1} for b in range(blocks)]
        found[0]["doubt"] = "too few tokens"
        return found

    by_role = [{"name": r, "points": [{"block": b, "value": 10.0 ** wobble(i, b)} for b in range(blocks)]} for i, r in enumerate(roles)]
    return [
        {"key": "lim", "measure": "lim", "title": "lim", "main": True, "traces": [{"name": "block", "points": points(1)}]},
        {"key": "outlier_ratio", "measure": "outlier_ratio", "title": "outlier ratio", "unit": "%", "main": True, "traces": by_role},
        {"key": "lim.more", "measure": "lim", "title": "lim more", "main": False, "traces": [{"name": "attention", "points": points(2)}]},
    ]


def _facts() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"module": "", "measure": "stable_rank", "part": f"part {i}", "value": float(i), "note": "of all texts"} for i in range(15)
    ]
    found[0]["spread"] = 0.5
    return [*found, {"module": "encoder.layers", "measure": "alpha", "part": "order", "value": "0, 3, 1", "doubt": "one text alone"}]


def _profiles(blocks: int) -> list[dict[str, Any]]:
    at = [1, 2, 4, 8, 16]
    lines = [{"module": f"encoder.layers.{b}", "block": b, "at": at, "values": [3.0 / i ** (1 + b / 9) for i in at]} for b in range(blocks)]
    return [{"key": "kv/key", "measure": "kv", "title": "kv key", "lines": lines}]
