"""Runs that are killed at random moments until they are done. The tests do it some fifty times, `bench/faults.py` a thousand times."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from faultlib import RUNS, make_source, result, times, tree

from eckart.store import journal, verify, work


class Forker:
    """Starts runs that can be killed, each a fork of a process that has imported everything."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    @classmethod
    @contextlib.contextmanager
    def started(cls) -> Iterator[Forker]:
        here = Path(__file__).parent
        path = os.pathsep.join(map(str, (here, here.parents[1], *filter(None, [os.environ.get("PYTHONPATH")]))))
        command = [sys.executable, str(here / "forker.py")]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
        ) as process:
            yield cls(process)
            process.communicate()

    def start(self, how: str, source: Path, out: Path, overwrite: bool = False, at: int = 0) -> int:
        """Begin a run, one that kills itself at a call if `at` is not 0; returns its process id."""
        assert self.process.stdin is not None
        print(json.dumps([how, str(source), str(out), overwrite, at]), file=self.process.stdin, flush=True)
        return self._number()

    def join(self) -> int:
        """The exit status of the run."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self._number()

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@dataclass
class Killed:
    """What happened: kills, runs that came to their end, runs that began with finished jobs, runs in all, and what a kill left behind -> how
    often."""

    kills: int = 0
    finished: int = 0
    resumed: int = 0
    runs: int = 0
    left: Counter[str] = field(default_factory=Counter)


def kill_at_random(
    forker: Forker,
    how: str,
    place: Path,
    kills: int,
    seed: int,
    overwrite: bool = False,
    tell: Callable[[int], object] = lambda count: None,
) -> Killed:
    """Start, kill, start again, until enough were killed. Checks after every kill and every end, and raises AssertionError.

    Args:
        forker: starts the runs.
        how: "store" or "compress".
        place: an empty folder, on the disk that is to be tried.
        kills: how many.
        seed: of the moments.
        overwrite: every sequence begins with an older output in place.
        tell: called with the number of kills so far.
    """
    run = RUNS[how]
    source, box = make_source(place / "source"), place / "box"
    out = box / "out"
    box.mkdir()
    run(source, place / "older", recipe="older")
    run(source, place / "whole")
    forker.start(how, source, place / "timed")  # returns when everything is imported
    start = time.monotonic()
    assert forker.join() == 0
    length = time.monotonic() - start
    expected, older, before = result(place / "whole"), result(place / "older"), (tree(source), times(source))
    dice, found = random.Random(seed), Killed()

    def begin() -> None:
        shutil.rmtree(box)
        box.mkdir()
        if overwrite:
            shutil.copytree(place / "older", out)

    begin()
    while found.kills < kills:
        has_jobs = any((folder / work.JOURNAL).exists() and journal.replay(folder / work.JOURNAL)[0] for folder in work.siblings(out))
        pid = forker.start(how, source, out, overwrite)
        time.sleep(dice.uniform(0, 1.3 * length))
        os.kill(pid, signal.SIGKILL)
        status = forker.join()
        found.runs += 1
        found.resumed += has_jobs
        assert status in (0, -signal.SIGKILL), f"a run failed with status {status}"
        assert found.runs < 20 * kills + 100, "most runs end before they are killed"
        if out.exists():
            report = verify(out)
            assert report.ok, report.problems
            assert result(out) in ((expected, older) if overwrite else (expected,))
        if status == 0:
            found.finished += 1
            assert result(out) == expected
            assert [p.name for p in box.iterdir()] == ["out"], "something was left beside the output"
            begin()
            continue
        found.kills += 1
        found.left[_left(out, older if overwrite else None)] += 1
        tell(found.kills)
    run(source, out, overwrite=overwrite)
    assert result(out) == expected
    assert (tree(source), times(source)) == before, "the source was changed"
    return found


def _left(out: Path, older: dict[str, str] | None) -> str:
    """What a kill left behind, in words."""
    folders = work.siblings(out)
    if out.exists() and (older is None or result(out) != older):
        return "the new output, and its work folder" if folders else "the new output"
    if not folders or not (folders[0] / work.JOURNAL).exists():
        return "nothing begun"
    if not out.exists() and (folders[0] / work.OLD).exists():
        return "between the two renames of an overwrite"
    return f"{len(journal.replay(folders[0] / work.JOURNAL)[0])} finished jobs"
