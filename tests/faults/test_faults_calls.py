"""Every system call that can fail does, one after another: no output or a valid one, the source untouched, and the next run completes."""

from __future__ import annotations

import contextlib
import errno
import shutil
from pathlib import Path

import pytest
from faultlib import WRITES, Disk, Failing, PowerCut, Short, Stop, run, times, tree, writer_of

from eckart.errors import EckartError, Incomplete, Refused
from eckart.store import Reader, verify


def reference(source: Path, place: Path, recipe: str = "svd") -> dict[str, str]:
    run(source, place / "reference", recipe=recipe)
    found = tree(place / "reference")
    shutil.rmtree(place / "reference")
    return found


def check_valid_or_absent(out: Path) -> None:
    if out.exists():
        report = verify(out)
        assert report.ok, report.problems


def each_fault(source: Path, place: Path, make, overwrite: bool) -> int:
    """Run once per call, with that call going wrong; returns the number of calls."""
    new = reference(source, place)
    older = reference(source, place, recipe="older") if overwrite else {}
    before = tree(source), times(source)
    at = 0
    while True:
        at += 1
        box = place / f"box{at}"
        box.mkdir()
        out = box / "out"
        if overwrite:
            run(source, out, recipe="older")
        disk: Disk = make(at)
        failed: BaseException | None = None
        try:
            with disk.installed():
                run(source, out, overwrite=overwrite)
        except (EckartError, Stop) as err:
            failed = err
        if not disk.hit:
            assert failed is None
            assert tree(out) == new
            return at - 1
        assert not isinstance(failed, Refused) or disk.hit in ("open", "pread_into", "close"), f"call {at} ({disk.hit})"
        if not isinstance(failed, Stop | Refused):
            assert failed is None or isinstance(failed, Incomplete)
        check_valid_or_absent(out)
        if overwrite and isinstance(disk, Failing) and not disk.forever:
            assert out.exists(), "an error between the two renames is taken back at once"
        if overwrite and out.exists():
            assert tree(out) in (older, new)
        run(source, out, overwrite=overwrite)
        assert tree(out) == new, f"call {at} ({disk.hit})"
        assert [p.name for p in box.iterdir() if not p.name.endswith("-lock")] == ["out"], f"call {at} ({disk.hit})"
        assert (tree(source), times(source)) == before
        shutil.rmtree(box)


@pytest.mark.parametrize(("code", "overwrite"), [(errno.ENOSPC, False), (errno.EIO, True)], ids=["ENOSPC", "EIO-overwrite"])
def test_every_call_fails_once(source: Path, place: Path, code: int, overwrite: bool) -> None:
    assert each_fault(source, place, lambda at: Failing(at, code), overwrite) > 80


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_the_disk_fails_from_every_call_on(source: Path, place: Path, overwrite: bool) -> None:
    assert each_fault(source, place, lambda at: Failing(at, errno.ENOSPC, forever=True, ops=WRITES), overwrite) > 40


@pytest.mark.parametrize(("seed", "overwrite"), [(0, False), (0, True), (1, True)], ids=["new", "overwrite-0", "overwrite-1"])
def test_power_is_cut_at_every_call(source: Path, place: Path, seed: int, overwrite: bool) -> None:
    assert each_fault(source, place, lambda at: PowerCut(at, seed), overwrite) > 80


def test_short_reads_and_writes(source: Path, place: Path) -> None:
    expected = reference(source, place)
    with Short(0).installed():
        run(source, place / "out")
    assert tree(place / "out") == expected


def test_what_put_has_returned_from_survives_a_power_cut(source: Path, place: Path) -> None:
    for seed in range(10):
        out = place / f"out{seed}"
        disk = PowerCut(0, seed)
        with contextlib.suppress(Stop), disk.installed(), writer_of(Reader(source), out) as writer:
            writer.put("decide", {}, {"rank": 2})
            writer.copy("b.bias", Reader(source), "b.bias")
            disk.at = disk.count + 1
            writer.copy("b.weight", Reader(source), "b.weight")
        with writer_of(Reader(source), out) as writer:
            assert writer.done == {"decide", "b.bias"}
            assert writer.records["decide"] == {"rank": 2}


def test_a_failed_run_says_how_to_go_on(source: Path, place: Path) -> None:
    with (
        pytest.raises(Incomplete, match=r"No space left on device[\s\S]*kept in .*out\.partial-[\s\S]*Go on with:") as caught,
        Failing(12, errno.ENOSPC, forever=True, ops=("pwrite",)).installed(),
    ):
        run(source, place / "out")
    assert caught.value.exit_code == 4
