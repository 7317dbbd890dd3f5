"""Time and memory of `ek.inspect` on weights, beside WeightWatcher's `analyze()` in turn; writes `bench/results/inspect-speed-<device>`.

    python -m bench.inspect_speed --peer PEER/bin/python                  # MiniLM, one and two threads, and peak memory
    python -m bench.inspect_speed --peer PEER/bin/python --device cuda    # a stack of 4096 x 4096, ours on the GPU, WeightWatcher on the CPU

bench/weightwatcher_peer.py says how to make PEER. Not called inspect.py, which would hide the standard library's from every script here.

Both get the same float32 linear layers in memory. "The same measures" are those that `analyze()` computes: alpha by Clauset's scan,
alpha-hat, the log norms, stable rank. Contestants run in turn; times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import eckart as ek
from bench.inspect_parity import minilm
from bench.machine import describe, versions
from bench.weightwatcher_peer import Peer

RESULTS = Path(__file__).parent / "results"
SAME = ("alpha", "alpha_hat", "alpha_norm", "norms", "stable_rank")
LIMITS = {1: 0.5, 2: 0.8}  # of WeightWatcher's time, by threads
GPU_LIMIT = 0.05  # of its time on the CPU
REST = 0.3  # seconds before each contestant: the threads of another BLAS spin on for a while after a call
SHAPES = ((4096, 4096, "float32"), (4096, 4096, "bfloat16"), (2048, 8192, "bfloat16"))  # of the memory table
HOLDS = {
    "MALLOC_MMAP_THRESHOLD_": "1000000"
}  # glibc gives freed blocks back at once: what is held is measured, not what it keeps for later


def network(weights: dict[str, Tensor], device: str) -> nn.Module:
    """The matrices as linear layers, in the order of their names."""
    layers: list[nn.Module] = []
    for name in sorted(weights):
        layer = nn.Linear(weights[name].shape[1], weights[name].shape[0], bias=False)
        layer.weight.data.copy_(weights[name])
        layers.append(layer)
    return nn.Sequential(*layers).to(device)


def duel(weights: dict[str, Tensor], python: str, threads: int, runs: int, device: str, clock: str) -> dict[str, Any]:
    """Medians of both sides, in turn, the first turn to warm up."""
    torch.set_num_threads(threads)
    net, peer = network(weights, device), Peer(python, threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({k: v.float().contiguous() for k, v in weights.items()}, path)
        layers = peer.ask("load", path=str(path))
    found: dict[str, list[float]] = {"same": [], "default": [], "weightwatcher": []}
    now = time.perf_counter if clock == "wall" else time.process_time
    for turn in range(runs + 1):
        for name, values in found.items():
            time.sleep(REST)
            if name == "weightwatcher":
                seconds = peer.ask("analyze", table=False)[clock]
            else:
                start = now()
                ek.inspect(net, measures=SAME if name == "same" else None)
                seconds = now() - start
            if turn:
                values.append(seconds)
    peers = peer.ask("versions")
    peer.close()
    median = {k: statistics.median(v) for k, v in found.items()}
    ratio = {k: median[k] / median["weightwatcher"] for k in ("same", "default")}
    return {"threads": threads, "layers": layers, "runs": runs, "seconds": found, "median": median, "ratio": ratio, "peer": peers}


def resident() -> int:
    """Bytes of anonymous pages: mapped files are not counted."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


def one_memory(folder: str, measures: tuple[str, ...] | None) -> None:
    """In a fresh process: peak of resident bytes while a checkpoint is inspected, beyond what they were before."""
    ek.inspect(folder, measures=measures)  # imports, and the buffers of BLAS, which it keeps for good: some 14 MiB at these sizes
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            peak[0] = max(peak[0], resident())

    before = resident()
    thread = threading.Thread(target=watch)
    thread.start()
    ek.inspect(folder, measures=measures)
    stop.set()
    thread.join()
    print(json.dumps(peak[0] - before))


def memory() -> list[dict[str, Any]]:
    """Peaks on checkpoints of two matrices, beside the size of one of them, its float64 copy and its Gram."""
    rows: list[dict[str, Any]] = []
    for m, n, dtype in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            g = torch.Generator().manual_seed(0)
            kind = getattr(torch, dtype)
            save_file({f"layers.{i}.weight": torch.randn(m, n, generator=g).to(kind) for i in range(2)}, Path(folder) / "model.safetensors")
            (Path(folder) / "config.json").write_text("{}")
            command = [sys.executable, "-m", "bench.inspect_speed", "--one-memory", folder, "--which"]
            measured = {}
            for which in ("same", "default"):
                done = subprocess.run([*command, which], capture_output=True, text=True, check=True, env=os.environ | HOLDS)
                measured[which] = json.loads(done.stdout.strip().splitlines()[-1])
        promised = m * n * (kind.itemsize + 8) + 8 * min(m, n) ** 2
        rows.append({"shape": [m, n], "dtype": dtype, "measured": measured, "promised": promised})
        print(rows[-1], flush=True)
    return rows


def table(result: dict[str, Any]) -> str:
    lines = [
        "| matrices | threads | WeightWatcher, s | same measures, s | ratio (target) | met | full default set, s | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for d in result["duels"]:
        limit = GPU_LIMIT if result["device"] != "cpu" else LIMITS.get(d["threads"])
        target, met = (f"{limit}", "yes" if d["ratio"]["same"] <= limit else "NO") if limit else ("-", "-")
        m = d["median"]
        lines.append(
            f"| {d['layers']} of {d['what']} | {d['threads']} | {m['weightwatcher']:.3f} | {m['same']:.3f} | {d['ratio']['same']:.2f} ({target}) | {met} "
            f"| {m['default']:.3f} | {d['ratio']['default']:.2f} |"
        )
    if result["memory"]:
        lines += [
            "",
            "Peak memory of a second pass beyond what the process held before it (the first one leaves about 14 MiB of BLAS's own buffers behind), two "
            "matrices in a checkpoint; the last column is one matrix, its float64 copy and its Gram. glibc was told to return freed blocks at once; by "
            "default it may keep some tens of MiB more.",
            "",
        ]
        lines += ["| matrix | stored as | same measures, MiB | full default set, MiB | that sum, MiB |", "|---|---|---|---|---|"]
        for r in result["memory"]:
            same, full = (r["measured"][k] / 2**20 for k in ("same", "default"))
            lines.append(f"| {r['shape'][0]} x {r['shape'][1]} | {r['dtype']} | {same:.0f} | {full:.0f} | {r['promised'] / 2**20:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of the environment that bench/weightwatcher_peer.py describes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, action="append", help="repeat for several; default 1 and 2 (of the device's host: 1)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: of one thread, on a busy machine")
    parser.add_argument("--stack", type=int, default=4, help="matrices of --size with --device cuda")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--one-memory", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--which", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_memory:
        torch.set_num_threads(1)
        one_memory(args.one_memory, SAME if args.which == "same" else None)
        return
    if not args.peer:
        parser.error("--peer PYTHON is needed")
    if args.device == "cpu":
        weights, what = minilm(), "all-MiniLM-L6-v2"
    else:
        g = torch.Generator().manual_seed(0)
        weights = {f"{i}": torch.randn(args.size, args.size, generator=g) for i in range(args.stack)}
        what = f"{args.size} x {args.size}"
    threads = args.threads or ([1, 2] if args.device == "cpu" else [torch.get_num_threads()])
    duels = [duel(weights, args.peer, t, args.runs, args.device, args.clock) | {"what": what} for t in threads]
    found = memory() if args.device == "cpu" and not args.no_memory else []
    result = {"device": args.device, "versions": versions(), "duels": duels, "memory": found}
    peer = ", ".join(f"{k} {v}" for k, v in duels[0]["peer"].items())
    text = f"# `ek.inspect` on weights against WeightWatcher\n\n{describe(device=args.device)} Peer: {peer}. Medians of {args.runs} runs in turn, {args.clock} time.\n\n{table(result)}"
    print(text)
    if not args.no_write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"inspect-speed-{args.device}.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / f"inspect-speed-{args.device}.md").write_text(text)


if __name__ == "__main__":
    main()
