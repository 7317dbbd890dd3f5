"""Our SVD beside its peers on matrices whose optimum is known; writes `bench/results/linalg-<device>.json` and `.md`.

    python -m bench.linalg                    # CPU, two threads, five rounds
    python -m bench.linalg --device cuda

Time is the ratio of medians to `torch.linalg.svd(A, full_matrices=False)` on the same float32 matrix as given (wide), all contestants taking
turns within a round. Error is the plain Frobenius error beyond the best one at that rank, relative to it, in float64 on the very float32 matrix.
Spectra: flat (Gaussian), power (s_i = 1/i), spiked (the bulk of a Gaussian, and 64 power-law spikes from 6 times down to 1.02 times its edge).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eckart as ek

RESULTS = Path(__file__).parent / "results"
CASES = (  # shape, rank, spectrum, tolerance, largest time ratio, largest excess
    ((1024, 4096), 16, "power", 1e-6, 0.06, 1e-6),
    ((1024, 4096), 16, "spiked", 1e-6, 0.06, 1e-6),
    ((1024, 4096), 16, "flat", 1e-6, 0.15, 1e-6),
    ((2048, 5504), 16, "spiked", 1e-6, 0.03, 1e-6),
    ((1024, 4096), 128, "power", 1e-6, 0.12, 1e-6),
    ((1024, 4096), 128, "flat", 1e-6, 0.45, 1e-6),
    ((1024, 4096), 128, "spiked", 1e-6, 0.45, 1e-6),
)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64))[0]


def matrix(shape: tuple[int, int], spectrum: str, seed: int = 0) -> Tensor:
    """A float32 matrix with that spectrum, built in float64."""
    m, n = shape
    gauss = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if spectrum == "flat":
        return gauss.float()
    values = 1 / torch.arange(1, m + 1, dtype=torch.float64)
    if spectrum == "spiked":
        values = torch.linalg.eigvalsh(gauss @ gauss.T).flip(0).clamp_min(0).sqrt()
        values = values / values[0]
        rate = torch.log(torch.tensor(6 / 1.02)) / torch.log(torch.tensor(64.0))
        values[:64] = 6 * torch.arange(1, 65, dtype=torch.float64) ** -rate
    return ((orthonormal(m, m, seed + 1) * values) @ orthonormal(n, m, seed + 2).T).float()


def tail(a: Tensor, rank: int) -> float:
    """The best possible error at that rank, from the float64 Gram of the float32 matrix."""
    wide = a.double()
    values = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0)
    return float(values[rank:].sum()) ** 0.5


def excess(a: Tensor, found: tuple[Tensor, Tensor, Tensor], best: float) -> float:
    u, s, vh = (t.double() for t in found)
    return float(torch.linalg.norm(a.double() - (u * s) @ vh)) / best - 1


def clock(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    sync()
    began = time.perf_counter()
    out = run()
    sync()
    return time.perf_counter() - began, out


def ours(a: Tensor, rank: int, tol: float) -> Callable[[], Any]:
    def run() -> Any:
        f = ek.svd(a, rank, tol=tol)
        return f.U, f.S, f.Vh

    return run


def sampled(a: Tensor, rank: int, niter: int) -> Callable[[], Any]:
    def run() -> Any:
        u, s, v = torch.svd_lowrank(a, q=rank + 10, niter=niter)
        return u[:, :rank], s[:rank], v[:, :rank].T

    return run


def contestants(a: Tensor, rank: int, tol: float, device: str) -> dict[str, Callable[[], Any]]:
    out: dict[str, Callable[[], Any]] = {
        "torch.linalg.svd": lambda: torch.linalg.svd(a, full_matrices=False),
        "eckart": ours(a, rank, tol),
        "svd_lowrank niter=2": sampled(a, rank, 2),
        "svd_lowrank niter=4": sampled(a, rank, 4),
    }
    if device == "cpu":
        from scipy.sparse.linalg import svds
        from sklearn.utils.extmath import randomized_svd

        array = a.numpy()

        def sklearn() -> Any:
            return tuple(torch.from_numpy(x.copy()) for x in randomized_svd(array, rank, random_state=0))

        def propack() -> Any:
            u, s, vh = svds(array, rank, solver="propack", tol=1e-4, rng=0)
            return tuple(torch.from_numpy(x.copy()) for x in (u[:, ::-1], s[::-1], vh[::-1]))

        out["sklearn randomized_svd"] = sklearn
        if rank <= 16:
            out["scipy svds propack"] = propack
    return out


def race(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds and last result of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    last: dict[str, Any] = {}
    for name, run in runs.items():
        last[name] = clock(run, device)[1]  # warm
    for _ in range(rounds):
        for name, run in runs.items():
            seconds, last[name] = clock(run, device)
            times[name].append(seconds)
    return {name: statistics.median(t) for name, t in times.items()}, last


def low_rank(device: str, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for shape, rank, spectrum, tol, most_time, most_excess in CASES:
        a = matrix(shape, spectrum).to(device)
        best = tail(a, rank)
        times, last = race(contestants(a, rank, tol, device), rounds, device)
        base = times["torch.linalg.svd"]
        for name, seconds in times.items():
            found = (
                last[name] if name != "torch.linalg.svd" else tuple(t[..., :rank] if i < 2 else t[:rank] for i, t in enumerate(last[name]))
            )
            row = {"case": f"{shape[0]}x{shape[1]} r={rank} {spectrum}", "who": name, "seconds": seconds, "ratio": seconds / base}
            row["excess"] = excess(a, found, best)
            if name == "eckart":
                f = ek.svd(a, rank, tol=tol)
                c = f.certificate
                assert c is not None
                row |= {"method": c.method, "gap": c.gap, "gap_kind": c.gap_kind, "target": [most_time, most_excess]}
                row["met"] = row["ratio"] <= most_time and row["excess"] <= most_excess
            rows.append(row)
            show(row)
    return rows


def whole(device: str, rounds: int) -> list[dict[str, Any]]:
    """Full SVD, all singular values, and a refresh from a stale basis."""
    a = matrix((1024, 4096), "spiked").to(device)
    wide = a.double()
    exact = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0).sqrt()
    times, last = race({"torch": lambda: torch.linalg.svd(a, full_matrices=False), "eckart": lambda: ek.svd(a)}, rounds, device)
    f = last["eckart"]
    apart = float((a - f.dense()).norm() / a.norm())
    rows = [
        {
            "case": "full SVD 1024x4096",
            "who": "eckart",
            "seconds": times["eckart"],
            "ratio": times["eckart"] / times["torch"],
            "excess": apart,
            "target": [0.5, 1e-5],
        }
    ]
    base = times["torch"]
    times, last = race({"torch": lambda: torch.linalg.svdvals(a), "eckart": lambda: ek.svdvals(a)}, rounds, device)
    off = float((last["eckart"].double() - exact).abs().max() / exact[0])
    rows.append(
        {
            "case": "all singular values 1024x4096",
            "who": "eckart",
            "seconds": times["eckart"],
            "ratio": times["eckart"] / times["torch"],
            "excess": off,
            "target": [0.3, 1e-6],
        }
    )
    old = ek.svd(a, 128, tol=1e-6)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(9)).to(device)
    moved = a + noise * (0.01 * a.norm() / noise.norm())
    best = tail(moved, 128)
    times, last = race({"eckart": lambda: ek.svd(moved, 128, warm=old)}, rounds, device)
    total = float(moved.double().square().sum())
    held = 1 - float((moved.double() - last["eckart"].dense().double()).square().sum()) / total
    rows.append(
        {
            "case": "refresh, 1% stale, 1024x4096 r=128",
            "who": "eckart",
            "seconds": times["eckart"],
            "ratio": times["eckart"] / base,
            "excess": (1 - best**2 / total) - held,
            "target": [0.03, 1e-4],
        }
    )
    for row in rows:
        row["met"] = row["ratio"] <= row["target"][0] and row["excess"] <= row["target"][1]
        show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    mark = "" if "met" not in row else " met" if row["met"] else " MISSED"
    print(
        f"{row['case']:38} {row['who']:24} {row['seconds']:8.4f} s  ratio {row['ratio']:.4f}  excess {row['excess']:.1e}{mark}", flush=True
    )


def markdown(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    lines = [
        f"{machine['cpu']}, {machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}; medians of {machine['rounds']} rounds.",
        "",
    ]
    lines += ["| case | who | time / torch | excess error | target | |", "|---|---|---|---|---|---|"]
    for r in rows:
        target = f"{r['target'][0]:g}, {r['target'][1]:g}" if "target" in r else ""
        lines.append(
            f"| {r['case']} | {r['who']} | {r['ratio']:.3f} | {r['excess']:.0e} | {target} | {'' if 'met' not in r else 'met' if r['met'] else 'missed'} |"
        )
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor()


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    rows = low_rank(args.device, args.rounds) + whole(args.device, args.rounds)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "numpy", "scipy", "scikit-learn", "eckart")}
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    machine = {"cpu": cpu_name(), "device": device, "threads": args.threads, "rounds": args.rounds, "versions": versions}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"linalg-{args.device}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    (RESULTS / f"linalg-{args.device}.md").write_text(markdown(rows, machine))


if __name__ == "__main__":
    main()
