"""SIGKILL at every call and at random moments, and a journal cut at every byte: the next runs give the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faultlib import make_source, run, times, tree, writer_of

from eckart.store import Reader, _os, verify, work

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork")


class Forker:
    """Starts runs that can be killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(self, source: Path, out: Path, overwrite: bool = False, at: int = 0) -> int:
        assert self.process.stdin is not None
        print(json.dumps([str(source), str(out), overwrite, at]), file=self.process.stdin, flush=True)
        return self._number()

    def join(self) -> int:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self._number()

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parents[1], *filter(None, [os.environ.get("PYTHONPATH")]))))}
    command = [sys.executable, str(here / "forker.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        yield Forker(process)
        process.communicate()


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_killed_at_calls(forker: Forker, source: Path, place: Path, overwrite: bool) -> None:
    run(source, place / "whole")
    expected, before = tree(place / "whole"), (tree(source), times(source))
    for at in range(1 + overwrite, 1000, 6):
        box = place / f"box{at}"
        box.mkdir()
        out = box / "out"
        if overwrite:
            run(source, out, recipe="older")
        forker.start(source, out, overwrite, at)
        status = forker.join()
        assert status in (0, -signal.SIGKILL)
        if out.exists():
            assert verify(out).ok
        run(source, out, overwrite=overwrite)
        assert tree(out) == expected, f"call {at}"
        assert [p.name for p in box.iterdir() if not p.name.endswith("-lock")] == ["out"]
        if status == 0:
            break
        shutil.rmtree(box)
    else:
        pytest.fail("the run never came to its end")
    assert at > 80
    assert (tree(source), times(source)) == before


def test_killed_at_random_moments_until_done(forker: Forker, tmp_path: Path) -> None:
    """On a real disk, where syncs take their time."""
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    run(source, tmp_path / "warm")
    start = time.monotonic()
    run(source, tmp_path / "whole")
    length = time.monotonic() - start
    expected, before = tree(tmp_path / "whole"), (tree(source), times(source))
    dice, kills, runs = random.Random(0), 0, 0
    while kills < 12:
        pid = forker.start(source, out)
        time.sleep(dice.uniform(0, 1.5 * length))
        os.kill(pid, signal.SIGKILL)
        status = forker.join()
        assert status in (0, -signal.SIGKILL)
        kills += status == -signal.SIGKILL
        runs += 1
        assert runs < 500
        if out.exists():
            assert verify(out).ok
        if status == 0:
            assert tree(out) == expected
            shutil.rmtree(out)
    run(source, out)
    assert tree(out) == expected
    assert (tree(source), times(source)) == before


def interrupted(source: Path, out: Path) -> Path:
    """A work folder with every job finished and nothing committed."""

    class Enough(Exception):
        pass

    left = [7]

    def pause() -> None:
        left[0] -= 1
        if left[0] == 1:
            raise Enough

    with pytest.raises(Enough):
        run(source, out, pause=pause)
    (folder,) = work.siblings(out)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_os, "fsync", lambda fd: None)
    monkeypatch.setattr(_os, "fsync_dir", lambda path: None)


def test_journal_cut_at_every_byte(source: Path, place: Path, quick: None) -> None:
    run(source, place / "whole")
    expected = tree(place / "whole")
    (place / "box").mkdir()
    out = place / "box" / "out"
    folder = interrupted(source, out)
    kept = place / "kept"
    shutil.copytree(folder, kept)
    journal = (kept / work.JOURNAL).read_bytes()
    assert journal.count(b"\n") == 5
    jobs = ["decide", "a", "embed.weight", "b.weight", "b.bias"]
    ends = [i + 1 for i, byte in enumerate(journal) if byte == ord("\n")]
    for length in range(len(journal) + 1):
        if not folder.exists():
            shutil.copytree(kept, folder)
        (folder / work.JOURNAL).write_bytes(journal[:length])
        with writer_of(Reader(source), out) as writer:
            left = {job for job, end in zip(jobs, ends, strict=True) if end <= length}
            assert writer.done == left
            writer.put("more", {}, {"length": length})
        with writer_of(Reader(source), out) as writer:
            assert writer.done == left | {"more"}, "what is appended after a torn line counts"
        (folder / work.JOURNAL).write_bytes(journal[:length])
        if length % 8 == 0 or {length - 1, length, length + 1} & set(ends):
            run(source, out)
            assert tree(out) == expected, f"{length} bytes of the journal"
            shutil.rmtree(out)


def test_journal_and_data_damaged(source: Path, place: Path, quick: None) -> None:
    """Any damage to the work folder of an interrupted run is found, and what it touches is done again."""
    run(source, place / "whole")
    expected = tree(place / "whole")
    (place / "box").mkdir()
    out = place / "box" / "out"
    folder = interrupted(source, out)
    kept = place / "kept"
    shutil.copytree(folder, kept)
    dice = random.Random(1)
    names = [work.JOURNAL, *(f"{work.NEW}/{p.name}" for p in sorted((kept / work.NEW).iterdir()))]
    for _ in range(60):
        if not folder.exists():
            shutil.copytree(kept, folder)
        victim = folder / dice.choice(names)
        data = bytearray(victim.read_bytes())
        for _ in range(dice.choice((1, 1, 8))):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        if dice.random() < 0.3:
            del data[dice.randrange(len(data)) :]
        victim.write_bytes(data)
        run(source, out)
        assert tree(out) == expected, victim.name
        shutil.rmtree(out)
