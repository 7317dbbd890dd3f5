"""The experiment of Sagun et al. (arXiv:1706.04454): the Hessian of a classifier is a bulk at zero and about as many outliers as classes.

    python bench/sagun.py              # all networks; writes bench/results/sagun.json and .md
    python bench/sagun.py --quick      # one small network of each kind, no file

Tight Gaussian blobs of k classes in ten dimensions, 1000 points; networks 10-h-k with tanh, cross-entropy, gradient descent with momentum.
Exact Hessian H and Gauss-Newton matrix G from the library's own products, eigenvalues by numpy. An outlier is an eigenvalue above 5% of the
largest; the bulk is what lies within 0.1% of zero, relative to the largest. What the count follows is the rank of the confusions: at a minimum a
class that is confused with c others adds c directions to G. So three kinds of labels:

- "next": 20% of the labels are those of the next class. One confusion per class: k outliers are expected.
- "any": 10% are random. Up to k (k - 1) are expected, k of them large.
- "none": separable, stopped at a fixed loss, since softmax saturates later. No minimum is reached, and nothing is expected of the count.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from eckart.stats.curvature import GaussNewton, Hessian
from eckart.stats.objective import Objective
from eckart.verbs.output import versions

RESULTS = Path(__file__).parent / "results"
CLASSES, HIDDEN = (2, 5, 10), (10, 30, 70)
POINTS, SIZE, WIDTH = 1000, 10, 0.1  # standard deviation of a blob; centres are standard normal
KINDS = {"next": (0.2, (0, 1, 2)), "any": (0.1, (0,)), "none": (0.0, (0,))}  # share of changed labels, seeds
STEPS, LOSS = 3000, 0.05
OUTLIER, BULK = 0.05, 1e-3


def blobs(k: int, kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and labels."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, SIZE, generator=g, dtype=torch.float64)
    true = torch.arange(POINTS) % k
    x = centres[true] + WIDTH * torch.randn(POINTS, SIZE, generator=g, dtype=torch.float64)
    changed = torch.rand(POINTS, generator=g) < KINDS[kind][0]
    other = torch.randint(0, k, (POINTS,), generator=g) if kind == "any" else (true + 1) % k
    return x, torch.where(changed, other, true)


def train(k: int, h: int, kind: str, seed: int, x: torch.Tensor, y: torch.Tensor) -> tuple[nn.Module, float, float]:
    """(network, its loss, norm of its gradient)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(SIZE, h), nn.Tanh(), nn.Linear(h, k)).double()
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        if kind == "none" and loss.item() <= LOSS:
            break
        opt.step()
    slope = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    return net, loss.item(), slope.norm().item()


def measure(k: int, h: int, kind: str, seed: int) -> dict[str, Any]:
    """The spectra of one network."""
    x, y = blobs(k, kind, seed)
    net, loss, slope = train(k, h, kind, seed, x, y)
    objective = Objective(net, [(x, y)], loss=lambda z, b: nn.functional.cross_entropy(z, b[1]))
    H, G = (op(objective, hold=True).to_dense().numpy() for op in (Hessian, GaussNewton))
    values, part = (np.linalg.eigvalsh((M + M.T) / 2)[::-1] for M in (H, G))
    top = values[0]
    ratios = values[: 3 * k] / np.maximum(values[1 : 3 * k + 1], 1e-300)
    return {
        "kind": kind,
        "classes": k,
        "hidden": h,
        "seed": seed,
        "parameters": len(values),
        "loss": loss,
        "gradient": slope,
        "largest": float(top),
        "outliers": int((values > OUTLIER * top).sum()),
        "gap_after": int(ratios.argmax()) + 1,
        "gap": float(ratios.max()),
        "bulk": float((np.abs(values) < BULK * top).mean()),
        "lowest": float(values[-1] / top),
        "rest": float(np.linalg.norm(H - G) / np.linalg.norm(H)),
        "top_k_off": float(np.abs(part[:k] / values[:k] - 1).max()),
        "values": [float(v / top) for v in values[: 2 * k + 5]],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line per network: each seed's count, means of the rest."""
    lines = [
        "| labels | classes | hidden | parameters | outliers (each seed) | largest gap after | bulk | lowest / largest | ‖H - G‖ / ‖H‖ | G and H differ in the top k by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        for k in CLASSES:
            for h in HIDDEN:
                found = [r for r in rows if (r["kind"], r["classes"], r["hidden"]) == (kind, k, h)]
                if found:
                    mean = {n: float(np.mean([r[n] for r in found])) for n in ("bulk", "lowest", "rest", "top_k_off")}
                    counts, gaps = (", ".join(str(r[n]) for r in found) for n in ("outliers", "gap_after"))
                    lines.append(
                        f"| {kind} | {k} | {h} | {found[0]['parameters']} | {counts} | {gaps} | {mean['bulk']:.2f} | {mean['lowest']:.4f} | "
                        f"{mean['rest']:.3f} | {mean['top_k_off']:.1%} |"
                    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    start = time.perf_counter()
    rows = []
    for kind, (_, seeds) in KINDS.items():
        for k in CLASSES[:2] if quick else CLASSES:
            for h in HIDDEN[:1] if quick else HIDDEN:
                for seed in seeds[:1] if quick else seeds:
                    rows.append(measure(k, h, kind, seed))
                    print({n: v for n, v in rows[-1].items() if n != "values"}, flush=True)
    print(table(rows))
    if quick:
        return
    data = {
        "setup": {"points": POINTS, "dimensions": SIZE, "width": WIDTH, "steps": STEPS, "loss": LOSS, "outlier": OUTLIER, "bulk": BULK},
        "rows": rows,
        "machine": platform.machine(),
        "seconds": round(time.perf_counter() - start),
        "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sagun.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    about = __doc__.split("--quick      # one small network of each kind, no file\n\n")[1]
    (RESULTS / "sagun.md").write_text(
        f"# {__doc__.splitlines()[0]}\n\nWritten by `bench/sagun.py`.\n\n{about}\n{table(rows)}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
