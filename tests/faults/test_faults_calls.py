"""Every system call that can fail does, one after another: no output or a valid one, the source untouched, and the next run completes."""

from __future__ import annotations

import contextlib
import errno
import shutil
from pathlib import Path

import pytest
from faultlib import RUNS, WRITES, Disk, Failing, PowerCut, Short, Stop, result, times, tree, writer_of

from eckart.errors import EckartError, Incomplete, Refused
from eckart.store import Reader, verify


def reference(how: str, source: Path, out: Path, recipe: str = "svd") -> dict[str, str]:
    RUNS[how](source, out, recipe=recipe)
    return result(out)


def check_valid_or_absent(out: Path) -> None:
    if out.exists():
        report = verify(out)
        assert report.ok, report.problems


def each_fault(how: str, source: Path, place: Path, make, overwrite: bool, step: int = 1) -> int:
    """Run once per call, with that call going wrong; returns the number of calls."""
    run = RUNS[how]
    new, older = reference(how, source, place / "new"), reference(how, source, place / "older", "older")
    before = tree(source), times(source)
    at = 1 - step
    while True:
        at += step
        box = place / f"box{at}"
        box.mkdir()
        out = box / "out"
        if overwrite:
            shutil.copytree(place / "older", out)
        disk: Disk = make(at)
        failed: BaseException | None = None
        try:
            with disk.installed():
                run(source, out, overwrite=overwrite)
        except (EckartError, Stop) as err:
            failed = err
        if not disk.hit:
            assert failed is None
            assert result(out) == new
            return at - 1
        assert not isinstance(failed, Refused) or disk.hit in ("open", "pread_into", "close"), f"call {at} ({disk.hit})"
        if not isinstance(failed, Stop | Refused):
            assert failed is None or isinstance(failed, Incomplete)
        check_valid_or_absent(out)
        if overwrite and isinstance(disk, Failing) and not disk.forever:
            assert out.exists(), "an error between the two renames is taken back at once"
        if overwrite and out.exists():
            assert result(out) in (older, new)
        run(source, out, overwrite=overwrite)
        assert result(out) == new, f"call {at} ({disk.hit})"
        assert [p.name for p in box.iterdir() if not p.name.endswith("-lock")] == ["out"], f"call {at} ({disk.hit})"
        assert (tree(source), times(source)) == before
        shutil.rmtree(box)


def test_every_call_of_compress_fails_once(source: Path, place: Path) -> None:
    assert each_fault("compress", source, place, lambda at: Failing(at, errno.ENOSPC), overwrite=False) > 150


def test_every_other_call_of_an_overwriting_compress_fails_once(source: Path, place: Path) -> None:
    """`bench/faults.py` takes every call, with either error."""
    assert each_fault("compress", source, place, lambda at: Failing(at, errno.EIO), overwrite=True, step=2) > 150


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_the_disk_fails_from_every_call_on(source: Path, place: Path, overwrite: bool) -> None:
    assert each_fault("store", source, place, lambda at: Failing(at, errno.ENOSPC, forever=True, ops=WRITES), overwrite) > 40


def test_the_disk_fills_up_during_compress(source: Path, place: Path) -> None:
    assert each_fault("compress", source, place, lambda at: Failing(at, errno.ENOSPC, forever=True, ops=WRITES), True, step=6) > 60


@pytest.mark.parametrize(("seed", "overwrite"), [(0, False), (0, True), (1, True)], ids=["new", "overwrite-0", "overwrite-1"])
def test_power_is_cut_at_every_call(source: Path, place: Path, seed: int, overwrite: bool) -> None:
    assert each_fault("store", source, place, lambda at: PowerCut(at, seed), overwrite) > 80


def test_power_is_cut_during_compress(source: Path, place: Path) -> None:
    assert each_fault("compress", source, place, lambda at: PowerCut(at), True, step=10) > 150


@pytest.mark.parametrize("how", RUNS)
def test_short_reads_and_writes(source: Path, place: Path, how: str) -> None:
    expected = reference(how, source, place / "reference")
    with Short(0).installed():
        RUNS[how](source, place / "out")
    assert result(place / "out") == expected


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


@pytest.mark.parametrize("how", RUNS)
def test_a_failed_run_says_how_to_go_on(source: Path, place: Path, how: str) -> None:
    with (
        pytest.raises(Incomplete, match=r"No space left on device[\s\S]*kept in .*out\.partial-[\s\S]*Go on with:") as caught,
        Failing(12, errno.ENOSPC, forever=True, ops=("pwrite",)).installed(),
    ):
        RUNS[how](source, place / "out")
    assert caught.value.exit_code == 4
