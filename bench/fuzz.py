"""Coverage-guided fuzzing of every parser of bytes from elsewhere, with atheris; writes `bench/results/fuzz.md`.

    python -m bench.fuzz                        # all parsers, a million inputs and more
    python -m bench.fuzz --only recipe --runs 20000

atheris is no dependency of eckart: `pip install atheris` into a copy of the environment (Linux, a Python that it has a wheel for).
The parsers and what must hold of their results are those of `tests/attacks/parsers.py`; the corpus of `tests/attacks/hostile.py` is where each
run starts. Each parser runs in a process of its own, in which an input that takes over `TIMEOUT` seconds, memory beyond `ROOM` above what
the imports took, or any error but our own ends the run and leaves the input in `--found`: add it to `tests/attacks/found/` with its fix.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ATTACKS = ROOT / "tests" / "attacks"
RUNS = {"header": 350_000, "index": 250_000, "manifest": 250_000, "journal": 200_000, "recipe": 30_000}
LONGEST = {"header": 4096, "index": 4096, "manifest": 8192, "journal": 4096, "recipe": 2048}  # bytes of an input
TIMEOUT = 10  # seconds per input
ROOM = 256 << 20  # bytes
LIMITS = f"{TIMEOUT} s per input, {ROOM >> 20} MiB above what the imports took"


@dataclass(frozen=True)
class Row:
    """What the run of one parser did."""

    parser: str
    inputs: int
    seeds: int
    corpus: int
    features: int
    edges: int
    seconds: float
    peak: int  # bytes
    fault: str


def seeds(parser: str) -> list[bytes]:
    """The corpus of the tests, and one good input each."""
    sys.path.insert(0, str(ATTACKS))
    import hostile

    from eckart.axes.border import to_yaml
    from eckart.registry import get_recipe, list_recipes
    from eckart.store import _json, journal

    plain = {
        "header": [hostile.pack(hostile.GOOD), *(raw for raw, _ in hostile.HEADERS.values())],
        "index": [
            hostile.index({"a": "model-1.safetensors"}),
            hostile.index({"a": "x.bin"}),
            *(raw for raw, _ in hostile.INDEXES.values()),
        ],
        "manifest": hostile.manifests(),
        "journal": [
            _json.line({"job": "a", "tensors": {"t": "0" * 64}, "record": {"rank": 1}}),
            journal.encode(journal.Entry("b", {"t": "0" * 64}, {"x": [1, None, {"y": 0.5}]})),
        ],
        "recipe": [
            *(to_yaml(get_recipe(name)).encode() for name in list_recipes()),
            *(raw if isinstance(raw, bytes) else raw.encode("utf-8", "replace") for raw, _ in hostile.RECIPES.values()),
        ],
    }[parser]
    found = [raw for raw in plain if len(raw) < LONGEST[parser]]
    return found if parser == "recipe" else [bytes([mode]) + raw for raw in found for mode in (0, 1)]


def fuzz(parser: str, runs: int, folder: str, found: str, seed: int) -> None:
    """The process of one parser; ends with the process."""
    import atheris

    sys.path.insert(0, str(ATTACKS))
    with atheris.instrument_imports(include=["eckart.store", "eckart.axes.border", "eckart.errors", "yaml", "parsers"]):
        from parsers import PARSERS

        import eckart.axes.border
        import eckart.store._yaml  # noqa: F401
    check = PARSERS[parser]
    for raw in seeds(parser)[:4]:
        check(raw)  # what is imported at first use
    taken = 1024 * int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (taken + ROOM, taken + ROOM))
    words = Path(f"{folder}.words")
    tokens = {token for raw in seeds(parser) for token in re.findall(rb"[A-Za-z_][\w.-]{0,24}|[^\w\s]{1,2}|\d{1,6}", raw)}
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in token) + '"\n' for token in sorted(tokens)[:2000]))
    options = {
        "runs": runs,
        "max_len": LONGEST[parser],
        "timeout": TIMEOUT,
        "seed": seed,
        "dict": words,
        "artifact_prefix": f"{found}/{parser}-",
    }
    arguments = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], folder, *arguments, "-print_final_stats=1", "-rss_limit_mb=0"], check)
    atheris.Fuzz()


def run(parser: str, runs: int, found: Path, seed: int) -> Row:
    """Fuzz one parser in a process of its own and read what it prints."""
    with tempfile.TemporaryDirectory() as place:
        folder = f"{place}/corpus"
        Path(folder).mkdir()
        start = seeds(parser)
        for number, raw in enumerate(start):
            (Path(folder) / str(number)).write_bytes(raw)
        command = [sys.executable, "-m", "bench.fuzz", "--child", parser, "--runs", str(runs), "--corpus", folder, "--found", str(found)]
        began = time.monotonic()
        process = subprocess.Popen([*command, "--seed", str(seed)], stderr=subprocess.PIPE, text=True, errors="replace", cwd=ROOT)
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("#") and (lines[-1].split()[1] == "pulse"):
                print(f"{parser}: {line.strip()}", file=sys.stderr, flush=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
    log = "".join(lines)
    last = re.findall(r"#\d+\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)/", log)
    edges, features, corpus = map(int, last[-1]) if last else (0, 0, 0)
    done = re.search(r"stat::number_of_executed_units:\s*(\d+)", log)
    fault = "" if process.returncode == 0 else "\n".join(log.splitlines()[-40:])
    return Row(parser, int(done[1]) if done else 0, len(start), corpus, features, edges, seconds, usage.ru_maxrss * 1024, fault)


def write(rows: list[Row], path: Path, seed: int) -> None:
    """The table, for people."""
    total = sum(row.inputs for row in rows)
    names = ("atheris", "pyyaml", "pydantic", "torch")
    lines = [
        "# Fuzzing the parsers",
        "",
        f"`python -m bench.fuzz --seed {seed}`: {total:,} inputs in {sum(row.seconds for row in rows) / 60:.0f} minutes, "
        f"{sum(bool(row.fault) for row in rows)} faults. A fault is any error but our own, a wrong result, a refusal that cannot be shown, or",
        f"more than {LIMITS}.",
        "",
        "| parser | inputs | seeds | corpus at the end | features | edges | seconds | peak memory | faults |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
        *(
            f"| {r.parser} | {r.inputs:,} | {r.seeds} | {r.corpus} | {r.features} | {r.edges} | {r.seconds:.0f} | {r.peak / 2**20:.0f} MiB | "
            f"{'yes' if r.fault else 'none'} |"
            for r in rows
        ),
        "",
        "Edges and features are those of eckart's own files as atheris counts them; peak memory includes the imports and the corpus.",
        f"Python {platform.python_version()}, {', '.join(f'{n} {version(n)}' for n in names)}; {platform.system()} {platform.machine()}.",
        "",
    ]
    path.write_text("\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a comma list of parsers")
    parser.add_argument("--runs", type=int, help="inputs per parser")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, default=ROOT / "build" / "fuzz", help="where inputs that show a fault are left")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "fuzz.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.found.mkdir(parents=True, exist_ok=True)
    if args.child:
        fuzz(args.child, args.runs, args.corpus, str(args.found), args.seed)
        return 0
    rows = []
    for name in args.only.split(",") if args.only else RUNS:
        rows.append(run(name, args.runs or RUNS[name], args.found, args.seed))
        print(rows[-1])
    if not args.only:
        write(rows, args.out, args.seed)
    for row in rows:
        if row.fault:
            print(f"--- {row.parser}\n{row.fault}", file=sys.stderr)
    return any(row.fault for row in rows)


if __name__ == "__main__":
    sys.exit(main())
