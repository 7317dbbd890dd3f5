"""SIGKILL at every call and at random moments, and a journal cut at every byte: the next runs give the bytes of an uninterrupted one."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faultlib import Failing, compress, result, store, times, tree, writer_of
from kills import Forker, kill_at_random

from eckart.errors import Incomplete
from eckart.store import Reader, _os, verify, work

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork")


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker.started() as process:
        yield process


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_killed_at_calls(forker: Forker, source: Path, place: Path, overwrite: bool) -> None:
    compress(source, place / "whole")
    compress(source, place / "older", recipe="older")
    expected, before = result(place / "whole"), (tree(source), times(source))
    for at in range(1 + 4 * overwrite, 1000, 8):
        box = place / f"box{at}"
        box.mkdir()
        out = box / "out"
        if overwrite:
            shutil.copytree(place / "older", out)
        forker.start("compress", source, out, overwrite, at)
        status = forker.join()
        assert status in (0, -signal.SIGKILL)
        if out.exists():
            assert verify(out).ok
        compress(source, out, overwrite=overwrite)
        assert result(out) == expected, f"call {at}"
        assert [p.name for p in box.iterdir() if not p.name.endswith("-lock")] == ["out"]
        if status == 0:
            break
        shutil.rmtree(box)
    else:
        pytest.fail("the run never came to its end")
    assert at > 150
    assert (tree(source), times(source)) == before


@pytest.mark.parametrize(("how", "kills"), [("compress", 40), ("store", 15)])
def test_killed_at_random_moments_until_done(forker: Forker, tmp_path: Path, how: str, kills: int) -> None:
    """On a real disk, where syncs take their time. `bench/faults.py` does the same a thousand times."""
    found = kill_at_random(forker, how, tmp_path, kills, seed=0)
    assert found.kills == kills
    assert found.finished > 0
    assert found.resumed > 0


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
        store(source, out, pause=pause)
    (folder,) = work.siblings(out)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_os, "fsync", lambda fd: None)
    monkeypatch.setattr(_os, "fsync_dir", lambda path: None)


def test_journal_cut_at_every_byte(source: Path, place: Path, quick: None) -> None:
    store(source, place / "whole")
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
            store(source, out)
            assert tree(out) == expected, f"{length} bytes of the journal"
            shutil.rmtree(out)


def test_journal_of_compress_cut(source: Path, place: Path, quick: None) -> None:
    compress(source, place / "whole")
    expected = result(place / "whole")
    (place / "box").mkdir()
    out = place / "box" / "out"
    with pytest.raises(Incomplete), Failing(1, errno.EIO, ops=("rename",)).installed():
        compress(source, out)
    (folder,) = work.siblings(out)
    kept = place / "kept"
    shutil.copytree(folder, kept)
    journal = (kept / work.JOURNAL).read_bytes()
    ends = {i + 1 for i, byte in enumerate(journal) if byte == ord("\n")}
    assert len(ends) == 3
    for length in sorted(
        {0, *range(5, len(journal), 23), *ends, *(end - 1 for end in ends), *(min(end + 1, len(journal)) for end in ends)}
    ):
        if not folder.exists():
            shutil.copytree(kept, folder)
        (folder / work.JOURNAL).write_bytes(journal[:length])
        compress(source, out)
        assert result(out) == expected, f"{length} bytes of the journal"
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out)


def test_journal_and_data_damaged(source: Path, place: Path, quick: None) -> None:
    """Any damage to the work folder of an interrupted run is found, and what it touches is done again."""
    store(source, place / "whole")
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
        store(source, out)
        assert tree(out) == expected, victim.name
        shutil.rmtree(out)
