"""Initialising adapters beside PEFT on the same layers: time, accuracy of the kept singular values, and memory.

    python bench/adapt_init.py                       # all shapes, all contestants; some of the peers take a minute each
    python bench/adapt_init.py --quick --no-write    # shapes of a quarter of the size
    python bench/adapt_init.py --only pissa --clock process --threads 1    # on a busy machine

A stack of linear layers with singular values i^-0.4, rank 16. Every contestant builds its adapter through its public entry (`ek.adapt`,
`get_peft_model`, `preprocess_corda`, `initialize_lora_eva_weights`), one layer after the other; contestants of a layer run in turn, times are
medians. CorDA is compared at the same covariance, and with the statistics included. PEFT's EVA takes no statistics apart: ours is shown from the
covariance on, as the target has it, and with the pass over the same batches. Memory is the peak of the resident set over what the process held
before, of ours, in weight matrices. Nothing is asserted: the table says which target is met.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import eckart as ek
from bench.machine import describe

RESULTS = Path(__file__).parent / "results"
SHAPES = ((1024, 1024), (2048, 5504), (5504, 2048))  # (out, in)
RANK = 16
TOKENS = 2048
SAMPLES = 2
TARGETS = {"pissa exact": 1 / 20, "pissa niter 4": 2.0, "corda": 1 / 4, "eva": 1 / 4, "error": 1 / 100, "memory": 3.0}


def weight(m: int, n: int) -> tuple[Tensor, Tensor]:
    """(W (m, n) float32, its singular values float64)."""
    g = torch.Generator().manual_seed(m)
    k = min(m, n)
    values = torch.arange(1, k + 1, dtype=torch.float64) ** -0.4
    u, v = (torch.linalg.qr(torch.randn(size, k, generator=g))[0] for size in (m, n))
    return (u * values.float()) @ v.T, values


def layer(w: Tensor) -> nn.Module:
    out = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta"))
    out[0].weight = nn.Parameter(w.clone())
    return out


def batches(n: int, count: int) -> list[Tensor]:
    """Inputs with a decaying spectrum, (1, tokens, n) each."""
    g = torch.Generator().manual_seed(n)
    scale = torch.arange(1, n + 1) ** -0.5
    mix = torch.linalg.qr(torch.randn(n, n, generator=g))[0] * scale[:, None]
    return [torch.randn(1, TOKENS, n, generator=g) @ mix for _ in range(count)]


class Given:
    """One covariance as statistics."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.double()
        self.sites = {"0": "0"}

    def get(self, stat: Any, site: Any) -> SimpleNamespace:
        return SimpleNamespace(second=lambda: self.matrix, covariance=lambda: self.matrix)


def peft(w: Tensor, **how: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(layer(w), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], **how))


def peft_corda(w: Tensor, data: list[Tensor], covariance: Tensor | None) -> Callable[[], Any]:
    """All of it, or what follows the covariance."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import corda
    from peft.tuners.lora.config import CordaConfig

    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm")
    )

    def run() -> Any:
        model = layer(w)
        if covariance is None:
            corda.preprocess_corda(model, config, run_model=lambda: [model(x) for x in data])
        else:
            model[0].covariance_matrix, model[0].corda_method, model[0].rank = covariance, "ipm", RANK
            corda.collect_eigens(model, config, False)
            corda.crop_corda_eigens(model, config)
        return get_peft_model(model, config)

    return run


def peft_eva(w: Tensor, data: list[Tensor]) -> Callable[[], Any]:
    from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.config import EvaConfig

    config = LoraConfig(r=RANK, lora_alpha=1, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))

    def run() -> Any:
        model = get_peft_model(layer(w), copy.deepcopy(config))
        initialize_lora_eva_weights(
            model, data, forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
        )
        return model

    return run


def second(data: list[Tensor]) -> Tensor:
    """Second moment as CorDA takes it: each sample over its largest entry."""
    return torch.stack([(x := d[0] / d.max().abs()).T @ x for d in data]).mean(0)


def contestants(w: Tensor, only: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> (call, runs at most). Ours first."""
    out: dict[str, tuple[Callable[[], Any], int]] = {}
    if only in ("", "pissa"):
        out["eckart pissa"] = (lambda: ek.adapt(layer(w), "pissa", RANK), 99)
        out["peft pissa"] = (lambda: peft(w, init_lora_weights="pissa"), 1)
        out["peft pissa_niter_4"] = (lambda: peft(w, init_lora_weights="pissa_niter_4"), 99)
        out["peft olora"] = (lambda: peft(w, init_lora_weights="olora"), 1)
    if only in ("", "corda"):
        data = batches(w.shape[1], SAMPLES)
        covariance = second(data)
        given = Given(covariance)
        rows = [d[0] for d in data]
        out["eckart corda"] = (lambda: ek.adapt(layer(w), "corda", RANK, stats=given), 99)
        out["peft corda"] = (peft_corda(w, data, covariance), 1)
        out["eckart corda, with statistics"] = (lambda: ek.adapt(layer(w), "corda", RANK, calib=rows), 99)
        out["peft corda, with statistics"] = (peft_corda(w, data, None), 1)
    if only in ("", "eva"):
        data = batches(w.shape[1], 4)
        rows = [d[0] for d in data]
        flat = torch.cat(rows)
        covariance = Given(torch.cov(flat.T, correction=0))
        out["eckart eva"] = (lambda: ek.adapt(layer(w), "eva", RANK, stats=covariance), 99)
        out["peft eva"] = (peft_eva(w, data), 1)
        out["eckart eva, with statistics"] = (lambda: ek.adapt(layer(w), "eva", RANK, calib=rows), 99)
    return out


def measure(
    calls: dict[str, tuple[Callable[[], Any], int]], runs: int, clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, Any]]:
    times: dict[str, list[float]] = {k: [] for k in calls}
    made: dict[str, Any] = {}
    for turn in range(runs):
        for name, (call, most) in calls.items():
            if turn < min(runs, most):
                began = clock()
                made[name] = call()
                times[name].append(clock() - began)
    return {k: statistics.median(v) for k, v in times.items()}, made


def error(model: Any, values: Tensor) -> float:
    """Largest relative error of the kept singular values, with the floor of float32."""
    if hasattr(model.base_model.model[0], "eckart_branch"):
        branch = model.base_model.model[0].branch("default")
        left, right = branch.left.detach(), branch.right.detach()
    else:
        found = model.base_model.model[0]
        left, right = found.lora_B["default"].weight.detach(), found.lora_A["default"].weight.detach()
    qa, ra = torch.linalg.qr(left.double())
    qb, rb = torch.linalg.qr(right.double().T)
    del qa, qb
    kept = torch.linalg.svdvals(ra @ rb.T)
    return max(1e-6, float(((kept - values[:RANK]) / values[:RANK]).abs().max()))


def resident(key: str) -> int:
    """Bytes of the resident set: "VmRSS" now, "VmHWM" at its peak."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def memory(w: Tensor) -> float | None:
    """Peak of ours over what was held before, in weight matrices; None where the kernel does not tell."""
    try:
        model = layer(w)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        ek.adapt(model, "pissa", RANK)
        return (resident("VmHWM") - before) / (w.numel() * w.element_size())
    except (OSError, StopIteration):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shapes of a quarter of the size")
    parser.add_argument("--only", default="", choices=["", "pissa", "corda", "eva"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=["wall", "process"])
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    shapes = [(m // 4, n // 4) for m, n in SHAPES] if args.quick else list(SHAPES)
    ek.adapt(layer(torch.randn(8, 8)), "pissa", 2)  # imports
    rows: list[dict[str, Any]] = []
    for m, n in shapes:
        w, values = weight(m, n)
        times, made = measure(contestants(w, args.only), args.runs, clock)
        errors = {k: error(v, values) for k, v in made.items() if "pissa" in k}
        rows.append({"shape": [m, n], "seconds": times, "errors": errors, "memory": memory(w) if args.only in ("", "pissa") else None})
        print(f"{m}x{n}: " + ", ".join(f"{k} {v:.3f}" for k, v in times.items()), flush=True)
    report = summary(rows, args)
    print(report["table"])
    if not args.no_write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "adapt_init.json").write_text(json.dumps({k: v for k, v in report.items() if k != "table"}, indent=1) + "\n")
        (RESULTS / "adapt_init.md").write_text(report["table"] + "\n")


def summary(rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Sums over the stack, ratios, and which targets are met."""
    names = list(rows[0]["seconds"])
    total = {k: sum(r["seconds"][k] for r in rows) for k in names}
    worst = {k: max(r["errors"][k] for r in rows) for k in rows[0]["errors"]}
    checks: list[list[Any]] = []

    def check(label: str, found: float, target: float) -> None:
        checks.append([label, found, target, bool(found <= target)])

    if "eckart pissa" in total:
        check("time, of peft pissa", total["eckart pissa"] / total["peft pissa"], TARGETS["pissa exact"])
        check("time, of peft pissa_niter_4", total["eckart pissa"] / total["peft pissa_niter_4"], TARGETS["pissa niter 4"])
        check("error of singular values, of peft pissa_niter_4", worst["eckart pissa"] / worst["peft pissa_niter_4"], TARGETS["error"])
        peaks = [r["memory"] for r in rows if r["memory"] is not None]
        if peaks:
            check("peak extra memory, in weights", max(peaks), TARGETS["memory"])
    for name in ("corda", "eva"):
        if f"eckart {name}" in total:
            check(f"time of {name}, of peft's", total[f"eckart {name}"] / total[f"peft {name}"], TARGETS[name])
    lines = [
        "# Initialising adapters",
        "",
        f"{describe('peft')} Clock: {args.clock}; {args.runs} runs, peers over a second one; rank {RANK}, s_i = i^-0.4.",
        "",
    ]
    lines += ["| layer (out x in) | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines += [f"| {r['shape'][0]}x{r['shape'][1]} | " + " | ".join(f"{r['seconds'][k]:.3f}" for k in names) + " |" for r in rows]
    lines += [
        "| all | " + " | ".join(f"{total[k]:.3f}" for k in names) + " |",
        "",
        "Seconds. Largest relative error of the kept singular values:",
        "",
    ]
    lines += [f"- {k}: {v:.1e}" for k, v in worst.items()]
    lines += ["", "| target | found | wanted | met |", "|---|---|---|---|"]
    lines += [f"| {a} | {b:.3g} | <= {c:.3g} | {'yes' if d else 'no'} |" for a, b, c, d in checks]
    return {
        "rows": rows,
        "total": total,
        "worst": worst,
        "targets": checks,
        "machine": describe("peft"),
        "clock": args.clock,
        "table": "\n".join(lines),
    }


if __name__ == "__main__":
    main()
