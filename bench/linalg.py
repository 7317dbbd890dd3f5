"""The core beside its peers: time against `torch.linalg.svd` on the same matrix as given, and the error beyond the best one.

    python bench/linalg.py                      # the table of targets, all peers, results in bench/results/
    python bench/linalg.py --cases r16 --runs 3 --no-write
    python bench/linalg.py --device cuda
    python bench/linalg.py --calibrate          # an entry for eckart/linalg/thresholds.json
    python bench/linalg.py --threads 1 --clock process    # on a busy machine: processor time of one thread

Contestants of a case run in turn, `--runs` times; times are medians. Nothing is asserted: the table says which target is met.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eckart.linalg as el
from bench.machine import processor, versions

RESULTS = Path(__file__).parent / "results"
REST = 0.2  # seconds before each contestant: the threads of another BLAS (numpy's, scipy's) spin on for tens of milliseconds after a call
SPIKES = 64  # of the "spiked" spectrum: a power law from 6 times the bulk's edge down to 1.02 times


@dataclass(frozen=True)
class Case:
    """One line of the table. `rank` None is the full decomposition; `limit` and `excess` are the targets."""

    name: str
    shape: tuple[int, int]
    spectrum: str
    rank: int | None
    tol: float = 1e-3
    limit: float = math.inf
    excess: float = 1e-6
    kind: str = "svd"  # svd, svdvals, refresh, spectral, optimum


WIDE, LARGE = (1024, 4096), (2048, 5504)
CASES = (
    Case("r16 power", WIDE, "power", 16, 1e-6, 0.06),
    Case("r16 spiked", WIDE, "spiked", 16, 1e-6, 0.06),
    Case("r16 flat", WIDE, "flat", 16, 1e-6, 0.15),
    Case("r16 spiked large", LARGE, "spiked", 16, 1e-6, 0.03),
    Case("r128 power", WIDE, "power", 128, 1e-6, 0.12),
    Case("r128 flat", WIDE, "flat", 128, 1e-6, 0.45),
    Case("r128 spiked", WIDE, "spiked", 128, 1e-6, 0.45),
    Case("full power", WIDE, "power", None, limit=0.5),
    Case("full flat", WIDE, "flat", None, limit=0.5),
    Case("full spiked", WIDE, "spiked", None, limit=0.5),
    Case("values power", WIDE, "power", None, limit=0.3, kind="svdvals"),
    Case("values flat", WIDE, "flat", None, limit=0.3, kind="svdvals"),
    Case("values spiked", WIDE, "spiked", None, limit=0.3, kind="svdvals"),
    Case("refresh r128 power", WIDE, "power", 128, 1e-2, 0.03, 1e-4, "refresh"),
    Case("refresh r128 flat", WIDE, "flat", 128, 1e-2, 0.03, 1e-4, "refresh"),
    Case("refresh r128 spiked", WIDE, "spiked", 128, 1e-2, 0.03, 1e-4, "refresh"),
    Case("spectral certificate r16", WIDE, "spiked", 16, 1e-6, 0.05, kind="spectral"),
    Case("optimum certificate r16", WIDE, "spiked", 16, 1e-6, 0.30, kind="optimum"),
    Case("r16 power square", (1024, 1024), "power", 16, 1e-6),
    Case("r128 power square", (1024, 1024), "power", 128, 1e-6),
)


def build(spectrum: str, m: int, n: int, seed: int = 0) -> Tensor:
    """float32 (m, n) made in float64 as U diag(s) V^T."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    if spectrum == "power":
        values = 1 / torch.arange(1, k + 1, dtype=torch.float64)
    else:
        gauss = torch.randn(m, n, generator=g, dtype=torch.float64)
        if spectrum == "flat":
            return gauss.float()
        values = torch.linalg.eigvalsh(gauss @ gauss.T if m <= n else gauss.T @ gauss).flip(0).clamp_min(0).sqrt()
        spikes = 6 * torch.arange(1, SPIKES + 1, dtype=torch.float64) ** (-math.log(6 / 1.02) / math.log(SPIKES))
        values = torch.cat([values[0] * spikes, values[: k - SPIKES]])
    u = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]
    return ((u * values) @ v.T).float()


Triple = tuple[Tensor, Tensor, Tensor]


def contestants(case: Case, A: Tensor, peers: bool) -> dict[str, Callable[[], Any]]:
    """What runs for a case. The first is ours, the second the baseline of the ratio."""
    r = case.rank
    runs: dict[str, Callable[[], Any]] = {}
    if case.kind == "svdvals":
        return {"eckart": lambda: el.svdvals(A), "torch.linalg.svdvals": lambda: torch.linalg.svdvals(A)}
    if case.kind == "refresh":
        noise = torch.randn(A.shape, generator=torch.Generator().manual_seed(5)).to(A.device)
        old = el.svd(A + 0.01 * A.norm() / noise.norm() * noise, r, tol=1e-6)
        runs["eckart"] = lambda: el.svd(A, r, warm=old, tol=case.tol)
    elif case.kind in ("spectral", "optimum"):
        runs["eckart"] = lambda: el.svd(A, r, tol=case.tol, method="krylov", certify=case.kind)
        runs["torch.linalg.svd"] = lambda: torch.linalg.svd(A, full_matrices=False)
        return runs | {"eckart free": lambda: el.svd(A, r, tol=case.tol, method="krylov")}
    else:
        runs["eckart"] = lambda: el.svd(A, r, tol=case.tol)
    runs["torch.linalg.svd"] = lambda: torch.linalg.svd(A, full_matrices=False)
    if not peers or r is None:
        return runs
    for niter in (2, 4):
        runs[f"svd_lowrank niter={niter}"] = lambda niter=niter: lowrank(A, r, niter)
    if A.device.type == "cpu":
        from scipy.sparse.linalg import svds
        from sklearn.utils.extmath import randomized_svd

        array = A.numpy()
        runs["sklearn randomized_svd"] = lambda: randomized_svd(array, r, random_state=0)
        if case.kind == "svd":
            import numpy as np

            runs["scipy svds propack"] = lambda: svds(array, k=r, solver="propack", tol=1e-4, rng=np.random.default_rng(0))
    return runs


def lowrank(A: Tensor, rank: int, niter: int) -> Triple:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(A, q=rank + 10, niter=niter)
    return u[:, :rank], s[:rank], v[:, :rank].T


def triple(result: Any, device: torch.device) -> Triple:
    parts = (result.U, result.S, result.Vh) if isinstance(result, el.Factors) else tuple(result)
    u, s, vh = (torch.as_tensor(p.copy() if not isinstance(p, Tensor) else p).to(device, torch.float64) for p in parts)
    order = torch.argsort(s, descending=True)
    return u[:, order], s[order], vh[order]


def excess_of(case: Case, A: Tensor, result: Any, squares: Tensor) -> float:
    """(error - best) / best; full rank: error over norm; values: largest error over the largest; refresh: missed share of the best energy."""
    if case.kind == "svdvals":
        return float((result.double() - squares.sqrt()).abs().max() / squares[0].sqrt())
    r = case.rank or len(squares)
    u, s, vh = (t[..., :r] if i < 2 else t[:r] for i, t in enumerate(triple(result, A.device)))
    error = float(torch.linalg.norm(A.double() - (u * s) @ vh))
    if case.rank is None:
        return error / float(squares.sum().sqrt())
    best = float(squares[r:].sum().sqrt())
    if case.kind == "refresh":
        return (error**2 - best**2) / float(squares[:r].sum())
    return (error - best) / best


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    m, n = case.shape
    A = build(case.spectrum, m, n).to(args.device)
    squares = torch.linalg.eigvalsh(A.double() @ A.double().T).flip(0).clamp_min(0)
    runs = contestants(case, A, not args.no_peers)
    times: dict[str, list[float]] = {k: [] for k in runs}
    results: dict[str, Any] = {}
    clock = time.process_time if args.clock == "process" else time.perf_counter
    for turn in range(args.runs + 1):  # the first turn warms up
        for name, run in runs.items():
            wait(A.device)
            time.sleep(REST)
            start = clock()
            results[name] = run()
            wait(A.device)
            if turn:
                times[name].append(clock() - start)
    base = statistics.median(times[list(runs)[1]])
    rows = {
        name: {
            "seconds": statistics.median(t),
            "fastest": min(t),
            "ratio": statistics.median(t) / base,
            "excess": excess_of(case, A, results[name], squares),
        }
        for name, t in times.items()
    }
    ours = rows["eckart"]
    share = ours["ratio"] - (rows["eckart free"]["ratio"] if "eckart free" in rows else 0.0)
    limit = None if math.isinf(case.limit) else case.limit
    allowed = 2e-6 if case.rank is None and case.kind == "svd" else case.excess
    certificate = results["eckart"].certificate.as_dict() if isinstance(results["eckart"], el.Factors) else None
    met = None if limit is None else share <= limit and abs(ours["excess"]) <= allowed
    return {
        "case": case.name, "shape": [m, n], "spectrum": case.spectrum, "rank": case.rank, "tol": case.tol, "kind": case.kind,
        "limit": limit, "ratio": share, "excess": ours["excess"], "allowed": allowed, "met": met, "rows": rows, "certificate": certificate,
    }  # fmt: skip


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def calibrate(device: str) -> dict[str, Any]:
    """Rates for thresholds.json, in seconds and Gflop/s on this machine."""
    return {f"{device}/{name}": rates_of(dtype, device) for name, dtype in (("float32", torch.float32), ("float64", torch.float64))}


def rates_of(dtype: torch.dtype, device: str) -> dict[str, Any]:
    m, n = 1024, 4096
    sizes = (64, 128, 256, 512, 1024)
    A = torch.randn(m, n, dtype=dtype, device=device)
    wide = A.double()

    def product(width: int) -> float:
        X, Y = torch.randn(n, width, dtype=dtype, device=device), torch.randn(width, m, dtype=dtype, device=device)
        return three(4 * m * n * width / (fastest(lambda: A @ X, device) + fastest(lambda: Y @ A, device)) / 1e9)

    def small(solver: Callable[[Tensor], Any], size: int) -> float:
        root = torch.randn(size, size, dtype=torch.float64, device=device)
        return three(fastest(lambda: solver(root @ root.T), device, 3))

    def dense(size: int, stretch: int) -> float:
        tall = torch.randn(size * stretch, size, dtype=dtype, device=device)
        return three(fastest(lambda: torch.linalg.svd(tall, full_matrices=False), device, 2))

    tiny = torch.randn(16, 16, device=device)
    return {
        "measured": True,
        "provenance": f"{processor(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "gemm": {str(b): product(b) for b in (1, 16, 32, 64, 128, 1024)},
        "gram": three(2 * m * m * n / fastest(lambda: wide @ wide.T, device) / 1e9),
        "eigh": {str(d): small(torch.linalg.eigh, d) for d in sizes},
        "eigvalsh": {str(d): small(torch.linalg.eigvalsh, d) for d in sizes},
        "svd": {str(d): dense(d, 1) for d in sizes},
        "svd4": {str(d): dense(d, 4) for d in sizes},
        "step": three(40 * fastest(lambda: tiny @ tiny, device, 50)),  # about 40 small calls in a step
    }


def fastest(run: Callable[[], Any], device: str, times: int = 5) -> float:
    best = math.inf
    for _ in range(times + 1):
        wait(torch.device(device))
        start = time.perf_counter()
        run()
        wait(torch.device(device))
        best = min(best, time.perf_counter() - start)
    return best


def three(x: float) -> float:
    return float(f"{x:.3g}")


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| case | matrix | target | ours | excess (allowed) | met | method | others: time ratio, excess |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        target = "-" if one["limit"] is None else f"{one['limit']:.2f}"
        met = {True: "yes", False: "NO", None: "-"}[one["met"]]
        certificate = one["certificate"]
        how = f"{certificate['method']}, {certificate['passes']} passes" if certificate else "Gram"
        others = "; ".join(f"{k} {v['ratio']:.3f}, {v['excess']:.0e}" for k, v in one["rows"].items() if k != "eckart")
        shape = "x".join(map(str, one["shape"]))
        lines.append(
            f"| {one['case']} | {shape} {one['spectrum']} | {target} | {one['ratio']:.3f} | {one['excess']:.0e} ({one['allowed']:.0e}) | {met} | {how} | {others} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cases", default="", help="only cases whose name holds this text")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--calibrate", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.calibrate:
        print(json.dumps(calibrate(args.device), indent=2))
        return
    results: list[dict[str, Any]] = []
    for case in CASES:
        if args.cases in case.name:
            results.append(measure(case, args))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    setting = {
        "machine": processor(args.device),
        "device": args.device,
        "threads": args.threads,
        "runs": args.runs,
        "clock": args.clock,
        "versions": versions("scipy", "scikit-learn"),
    }
    text = f"# eckart.linalg against its peers\n\n{setting['machine']}, {args.threads} threads, medians of {args.runs} runs in turn, {args.clock} time. "
    text += f"Versions: {', '.join(f'{k} {v}' for k, v in setting['versions'].items())}.\n"
    text += (
        "Times are ratios to torch.linalg.svd (or svdvals) on the same float32 matrix as given. Excess: (error - best) / best; error over norm where "
        "all triples are kept; largest absolute error over the largest value for values; missed share of the best energy for a refresh. "
        "A certificate's time is what it adds.\n\n"
    )
    text += table(results) + "\n"
    print("\n" + table(results))
    if not args.no_write and not args.cases:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"linalg-{args.device}.json").write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n")
        (RESULTS / f"linalg-{args.device}.md").write_text(text)


if __name__ == "__main__":
    main()
