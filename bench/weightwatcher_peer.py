"""WeightWatcher and powerlaw in an interpreter of their own, driven line by line through a pipe. Imports nothing but the standard library.

Their requirements do not fit beside the library's, so they get an environment:

    python -m venv PEER
    PEER/bin/pip install torch==2.13.0
    PEER/bin/pip install weightwatcher==0.7.7 powerlaw==1.5

powerlaw 2.0.0 renamed an argument of `Fit`; with it WeightWatcher's `fix_fingers="xmin_peak"` fails, and it reports alpha -1 without a word
of why. PEER/bin/python is what the benchmarks take as `--peer`. This file is also what that interpreter runs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Peer:
    """The other interpreter, with its number of threads fixed. Ask it one thing at a time."""

    def __init__(self, python: str, threads: int) -> None:
        fixed = {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        command = [python, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | fixed, cwd="/"
        )

    def ask(self, what: str, **options: Any) -> Any:
        """Its answer; a RuntimeError where it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, options]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer interpreter stopped; run it by hand to see why: {' '.join(map(str, self._process.args))}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"peer: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        """End the other process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


class _Server:
    """What runs there."""

    def __init__(self) -> None:
        import logging
        import warnings

        import torch
        import weightwatcher

        warnings.simplefilter("ignore")
        logging.getLogger("weightwatcher").setLevel(logging.ERROR)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.net: Any = None
        self.names: list[str] = []
        self.watcher = weightwatcher

    def versions(self) -> dict[str, str]:
        import platform
        from importlib.metadata import version

        return {"python": platform.python_version()} | {p: version(p) for p in ("weightwatcher", "powerlaw", "torch", "numpy", "scipy")}

    def load(self, path: str) -> int:
        """All matrices of a safetensors file as linear layers, in float32, in the order of their names."""
        import torch
        from safetensors.torch import load_file

        weights = load_file(path)
        self.names = sorted(weights)
        layers = [torch.nn.Linear(weights[k].shape[1], weights[k].shape[0], bias=False) for k in self.names]
        for layer, name in zip(layers, self.names, strict=True):
            layer.weight.data.copy_(weights[name])
        self.net = torch.nn.Sequential(*layers)
        return len(layers)

    def analyze(self, table: bool = True, **options: Any) -> dict[str, Any]:
        """Wall and processor seconds of one `analyze()`, and its table by layer."""
        start, busy = time.perf_counter(), time.process_time()
        details = self.watcher.WeightWatcher(model=self.net).analyze(**options)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        rows = {self.names[int(r["longname"])]: r for r in json.loads(details.to_json(orient="records", double_precision=15))}
        return {"wall": seconds, "process": busy, "rows": rows if table else {}}

    def fit(self, data: list[float]) -> dict[str, float]:
        """powerlaw's own scan."""
        import numpy as np
        import powerlaw

        found = powerlaw.Fit(np.array(data), verbose=False)
        return {"alpha": float(found.alpha), "xmin": float(found.xmin), "D": float(found.D), "sigma": float(found.sigma)}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the packages print goes elsewhere
    server = _Server()
    for line in sys.stdin:
        what, options = json.loads(line)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answer = {"value": getattr(server, what)(**options)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
