"""Coverage-guided fuzzing of every parser of bytes from elsewhere, with atheris; writes `bench/results/fuzz.json` and `.md`.

    python -m bench.fuzz                        # all parsers, a million inputs and more
    python -m bench.fuzz --only recipe --runs 20000

atheris is no dependency of eckart: `pip install atheris` into a copy of the environment (Linux, a Python that it has a wheel for).
The parsers and what must hold of their results are those of `tests/attacks/parsers.py`; the corpus of `tests/attacks/hostile.py` is where each
run starts. Each parser runs in a process of its own, in which an input that takes over `TIMEOUT` seconds, memory beyond `ROOM` above what
the imports took, or any error but our own ends the run and leaves the input in `--found`: add it to `tests/attacks/found/` with its fix.
Most mutations are libFuzzer's own, on bytes; the others (`SHARE`) change a value inside JSON or YAML, since damaged bytes rarely are either.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.machine import processor, versions

ROOT = Path(__file__).resolve().parents[1]
ATTACKS = ROOT / "tests" / "attacks"
RUNS = {"header": 1_000_000, "index": 600_000, "manifest": 400_000, "journal": 500_000, "recipe": 20_000}
LONGEST = {"header": 4096, "index": 4096, "manifest": 8192, "journal": 4096, "recipe": 2048}  # bytes of an input
TIMEOUT = 10  # seconds per input
ROOM = 256 << 20  # bytes
SHARE = 0.4  # of the mutations that change a value and not bytes
VALUES = (
    None, True, 0, 1, -1, 2, 0.5, 2**31, 2**53 + 1, 2**62, 2**63, 2**64, 1e308, "", "a", "b", "F32", "BF16", "../x", "x" * 70, "0" * 64,
    "\ud800", "\0", [], {}, [0, 16], [2, 2],
)  # fmt: skip
LIMITS = f"{TIMEOUT} s per input, {ROOM >> 20} MiB above what the imports took"


@dataclass(frozen=True)
class Row:
    """What the run of one parser did; an edge is a branch taken in our own files, a feature an edge and how often it was taken."""

    parser: str
    inputs: int
    seeds: int
    edges_of_seeds: int
    edges: int
    features: int
    corpus: int
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
    if parser == "recipe":
        return found
    bare = [b"\4" + raw[8:].rstrip(b"\0") for raw in found] if parser == "header" else []
    return [bytes([mode]) + raw for raw in found for mode in (0, 1)] + bare


def mutated(data: bytes, dice: random.Random) -> bytes | None:
    """The input with one change to the values that it holds; None where it holds none that can be read. Keeps the first byte, the mode."""
    import yaml

    mode, lines = data[:1], data[1:].split(b"\n")
    whole = dice.random() < 0.7 or len(lines) < 2
    at = dice.randrange(len(lines))
    text = data[1:] if whole else lines[at]
    try:
        made = json.dumps(changed(json.loads(text), dice)).encode()
    except (ValueError, RecursionError):
        if not data[:1].isalpha() or b"&" in data:  # no recipe, or one with anchors, which may grow without end
            return None
        try:
            return json.dumps(changed(yaml.load(data, yaml.CSafeLoader), dice)).encode()  # what JSON says is YAML too
        except Exception:  # whatever a stranger's YAML makes PyYAML raise
            return None
    return mode + (made if whole else b"\n".join([*lines[:at], made, *lines[at + 1 :]]))


def changed(value: Any, dice: random.Random) -> Any:
    """A value with one thing in it replaced, removed, doubled or renamed."""
    if not isinstance(value, dict | list) or not value or dice.random() < 0.15:
        return copy.deepcopy(dice.choice(VALUES))
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, what = dice.choice(keys), dice.random()
    if what < 0.6:
        value[key] = changed(value[key], dice)
    elif what < 0.7:
        del value[key]
    elif isinstance(value, list):
        value.insert(dice.randrange(len(value) + 1), copy.deepcopy(dice.choice([value[key], *VALUES])))
    else:
        other = value[dice.choice(keys)] if what < 0.85 else dice.choice(VALUES)
        value[dice.choice(("a", "b", "c", "__metadata__", "", *map(str, keys)))] = copy.deepcopy(other)
    return value


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

    def mutate(data: bytes, most: int, number: int) -> bytes:
        dice = random.Random(number)
        made = mutated(data, dice) if dice.random() < SHARE else None
        return atheris.Mutate(data, most) if made is None or len(made) > most else made

    atheris.Setup([sys.argv[0], folder, *arguments, "-print_final_stats=1", "-rss_limit_mb=0"], check, custom_mutator=mutate)
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
    states = [(0, 0, 0), *(tuple(map(int, found)) for found in re.findall(r"#\d+\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)/", log))]
    first = re.search(r"INITED\s+cov: (\d+)", log)
    edges, features, corpus = states[-1]
    done = re.search(r"stat::number_of_executed_units:\s*(\d+)", log)
    fault = "" if process.returncode == 0 else "\n".join(log.splitlines()[-40:])
    inputs, known = (int(found[1]) if found else 0 for found in (done, first))
    return Row(parser, inputs, len(start), known, edges, features, corpus, seconds, usage.ru_maxrss * 1024, fault)


def write(rows: list[Row], out: Path, seed: int) -> None:
    """The figures, and the table for people."""
    made = {
        "seed": seed,
        "inputs": sum(row.inputs for row in rows),
        "seconds": sum(row.seconds for row in rows),
        "limits": {"seconds_per_input": TIMEOUT, "bytes_above_imports": ROOM, "bytes_per_input": LONGEST},
        "replayed_by_the_tests": sorted(file.name for file in (ATTACKS / "found").glob("*")),
        "rows": [asdict(row) for row in rows],
        "versions": versions("atheris", "pyyaml", "pydantic"),
        "machine": f"{processor()}, {platform.system()} {platform.machine()}",
    }
    out.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")
    lines = [
        "# Fuzzing the parsers",
        "",
        f"`python -m bench.fuzz --seed {seed}`: {made['inputs']:,} inputs in {made['seconds'] / 60:.0f} minutes on one core, "
        f"{sum(bool(row.fault) for row in rows)} faults. A fault is any error but our own, a wrong result, a refusal that cannot be shown, or",
        f"more than {LIMITS}.",
        "",
        "| parser | inputs | bytes of an input | seeds | edges by the seeds | edges | features | corpus at the end | seconds | peak memory | faults |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        *(
            f"| {r.parser} | {r.inputs:,} | at most {LONGEST[r.parser]:,} | {r.seeds} | {r.edges_of_seeds} | {r.edges} | {r.features} | {r.corpus} | "
            f"{r.seconds:.0f} | {r.peak / 2**20:.0f} MiB | {'yes' if r.fault else 'none'} |"
            for r in rows
        ),
        "",
        f"What earlier runs found is fixed, and the tests replay it: {', '.join(made['replayed_by_the_tests']) or 'nothing'}. "
        "(`tests/attacks/found/`)",
        "",
        "Edges and features are those of eckart's own files and of the YAML parser, as atheris counts them; peak memory includes the imports",
        "and the corpus.",
        f"{made['machine']}; {', '.join(f'{name} {number}' for name, number in made['versions'].items())}.",
        "",
    ]
    out.with_suffix(".md").write_text("\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a comma list of parsers")
    parser.add_argument("--runs", type=int, help="inputs per parser")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, default=ROOT / "build" / "fuzz", help="where inputs that show a fault are left")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "fuzz", help="without a suffix")
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
