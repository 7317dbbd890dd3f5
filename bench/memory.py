"""Peak memory of one factorisation, measured in a fresh process, beside what `linalg.peak` promises.

    python -m bench.memory            write bench/results/memory-cpu.json and .md
    python -m bench.memory --one ...  one case, as this script calls itself

Resident memory is anonymous and file pages of /proc/self/status, sampled every 2 ms, minus what the process had before the call.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

CASES = [
    # m, n, rank, metric, method, dtype
    (1024, 1024, 8, "none", "krylov", "bfloat16"),
    (1024, 4096, 8, "none", "krylov", "bfloat16"),
    (4096, 1024, 128, "none", "krylov", "float32"),
    (1024, 4096, 700, "none", "gram", "bfloat16"),
    (4096, 11008, 8, "none", "krylov", "bfloat16"),
    (2048, 2048, 800, "none", "gram", "float32"),
    (300, 4096, 200, "none", "full", "float32"),
    (1024, 1024, 400, "in", "gram", "bfloat16"),
    (2816, 1024, 400, "in", "gram", "bfloat16"),
    (1024, 2816, 400, "in", "gram", "bfloat16"),
    (1024, 2816, 8, "in", "krylov", "bfloat16"),
    (1024, 2816, 400, "both", "gram", "bfloat16"),
    (2048, 2048, 800, "both", "gram", "float32"),
]
NAMES = ("m", "n", "rank", "metric", "method", "dtype")
RESULT = Path(__file__).parent / "results" / "memory-cpu"


def resident() -> int:
    """Bytes of anonymous and file pages."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[k].split()[0]) for k in ("RssAnon", "RssFile")) << 10


def one(m: int, n: int, rank: int, metric: str, method: str, dtype: str) -> dict[str, float]:
    """Measure one case here."""
    import torch

    from eckart.linalg import weighted
    from eckart.linalg.peak import peak_bytes
    from eckart.linalg.psd import Weight
    from eckart.seeds import generator

    gen = generator(0, f"{m} {n}")

    def moments(size: int) -> torch.Tensor:
        rows = torch.randn(size + 8, size, generator=gen, dtype=torch.float64)
        return rows.T @ rows

    W = torch.randn(m, n, generator=gen).to(getattr(torch, dtype))
    into = Weight(moments(n), 0.5, 0.0, "in") if metric in ("in", "both") else None
    out = Weight(moments(m), 0.5, 1e-4, "out") if metric == "both" else None
    weighted.solve(torch.randn(64, 80, generator=gen), rank=4)  # load what is loaded once
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    weighted.solve(W.clone(), out, into, rank=rank, method=method)
    done.set()
    watcher.join()
    promised = peak_bytes(m, n, rank, method=method, itemsize=W.element_size(), into=into is not None, out=out is not None)
    return {"measured": peak - before, "promised": promised}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        m, n, rank, metric, method, dtype = sys.argv[2:]
        print(json.dumps(one(int(m), int(n), int(rank), metric, method, dtype)))
        return
    from bench.machine import describe

    rows: list[dict[str, Any]] = []
    for case in CASES:
        done = subprocess.run([sys.executable, "-m", "bench.memory", "--one", *map(str, case)], capture_output=True, text=True, check=True)
        rows.append({**dict(zip(NAMES, case, strict=True)), **json.loads(done.stdout)})
        print(rows[-1], flush=True)
    machine = describe()
    RESULT.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    within = sum(row["measured"] <= row["promised"] for row in rows)
    lines = [
        "# Peak memory of one factorisation",
        "",
        "`python -m bench.memory`: resident memory of a fresh process during one factorisation, less what it had before, beside `linalg.peak`, the",
        f"figure that plans add up. {machine}",
        "",
        "| shape | rank | metric | method | stored as | measured, MiB | promised, MiB |",
        "|---|---:|---|---|---|---:|---:|",
        *(
            f"| {r['m']}x{r['n']} | {r['rank']} | {r['metric']} | {r['method']} | {r['dtype']} | {r['measured'] / 2**20:.0f} | {r['promised'] / 2**20:.0f} |"
            for r in rows
        ),
        "",
        f"{within} of {len(rows)} cases stay within what is promised.",
        "",
    ]
    RESULT.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
