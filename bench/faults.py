"""A thousand SIGKILLs at random moments of small runs; writes `bench/results/faults.json` and `.md`.

    python -m bench.faults                # 1000 kills, on the disk of --folder
    python -m bench.faults --kills 20     # of each kind, writes nothing

The same loop as in `tests/faults/test_faults_kill.py`: start a run, kill it, start it again until it is done, from the beginning until enough were
killed. After every kill the output is absent or passes `verify`; after every end its bytes are those of a run that nobody
disturbed, nothing lies beside it, and at the very end the source is as it was, times included. Anything else ends the script with an error.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.machine import describe

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "faults"
OUT = ROOT / "bench" / "results" / "faults"
KINDS = (("compress", False, 500), ("compress", True, 250), ("store", False, 150), ("store", True, 100))
WHAT = {"compress": "`ek.compress`, recipe svd", "store": "the store alone: put, copy, commit"}


def system_of(folder: Path) -> str:
    """Type of the file system that a folder is on, "unknown" where nothing says it."""
    mounts = Path("/proc/mounts")
    found = [line.split()[1:3] for line in mounts.read_text().splitlines()] if mounts.exists() else []
    over = [(place, kind) for place, kind in found if folder.resolve().is_relative_to(place)]
    return max(over, key=lambda pair: len(pair[0]), default=("", "unknown"))[1]


def run(folder: Path, kinds: tuple[tuple[str, bool, int], ...], seed: int) -> list[dict[str, Any]]:
    """One row per kind of run."""
    sys.path.insert(0, str(FAULTS))
    from kills import Forker, kill_at_random

    rows: list[dict[str, Any]] = []
    with Forker.started() as forker:
        for number, (how, overwrite, kills) in enumerate(kinds):
            began = time.monotonic()
            with tempfile.TemporaryDirectory(dir=folder) as place:
                name = f"{how}{' over an older output' if overwrite else ''}"
                found = kill_at_random(
                    forker, how, Path(place), kills, seed + number, overwrite,
                    tell=lambda count, name=name: None if count % 25 else print(f"{name}: {count} kills", file=sys.stderr, flush=True),
                )  # fmt: skip
            seen = asdict(found) | {"left": dict(sorted(found.left.items(), key=lambda item: -item[1]))}
            rows.append({"run": how, "overwrite": overwrite, "seed": seed + number, **seen, "seconds": time.monotonic() - began})
    return rows


def write(rows: list[dict[str, Any]], where: str) -> None:
    """The figures, and the tables for people."""
    total = {key: sum(row[key] for row in rows) for key in ("kills", "finished", "resumed", "runs", "seconds")}
    made = {
        "total": total,
        "rows": rows,
        "file_system": where,
        "system": f"{platform.system()} {platform.release()}",
        "machine": describe(),
    }
    OUT.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")
    lines = [
        "# Killed at random moments",
        "",
        f"`python -m bench.faults`: {total['kills']} SIGKILLs in {total['runs']} runs, {total['resumed']} of which went on with what a killed one had",
        f"finished; {total['finished']} came to their end. Every output had the bytes of an undisturbed run (all files but `run.json` and `report.html`),",
        "after every kill the output was absent, the older one, or passed `verify`, and the source was unchanged.",
        "",
        "| run | over an older output | kills | runs | of these resumed | of these finished | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(
            f"| {WHAT[r['run']]} | {'yes' if r['overwrite'] else 'no'} | {r['kills']} | {r['runs']} | {r['resumed']} | {r['finished']} | {r['seconds']:.0f} |"
            for r in rows
        ),
        "",
        "What a kill left behind:",
        "",
        "| run | over an older output | left behind | times |",
        "|---|---|---|---:|",
        *(f"| {r['run']} | {'yes' if r['overwrite'] else 'no'} | {what} | {count} |" for r in rows for what, count in r["left"].items()),
        "",
        "A kill ends the process, not the machine: bytes that were written but not synced survive it. Power cuts are simulated in",
        "`tests/faults/test_faults_machine.py`.",
        f"File system {made['file_system']}, {made['system']}. {made['machine']}",
        "",
    ]
    OUT.with_suffix(".md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="of each kind; writes nothing")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk that is tried")
    args = parser.parse_args()
    kinds = tuple((how, overwrite, args.kills or kills) for how, overwrite, kills in KINDS)
    rows = run(args.folder, kinds, args.seed)
    for row in rows:
        print(row)
    if args.kills is None:
        write(rows, system_of(args.folder))


if __name__ == "__main__":
    main()
