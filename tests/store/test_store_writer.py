"""Jobs in any order, over several runs, into the same bytes; and everything that a writer refuses."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eckart.engine import Local
from eckart.errors import Incomplete, Refused, UsageError
from eckart.store import Reader, TensorSpec, Writer, account, copied, finished, read_manifest, transformed, verify, work

NAMES = tuple(f"t{i}" for i in range(6))
LAYOUT = [TensorSpec(name, "F32", (4, 3)) for name in NAMES]
PRINT = {"recipe": "r", "seed": "0"}


class Crash(Exception):
    pass


@pytest.fixture
def source(tmp_path: Path) -> Reader:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(
        {name: torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(NAMES)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "tokenizer.json").write_text("{}")
    return Reader(folder)


def value(name: str) -> torch.Tensor:
    return torch.full((4, 3), float(NAMES.index(name)))


def opened(out: Path, **options) -> Writer:
    return Writer(out, LAYOUT, **{"fingerprint": PRINT, "max_shard_bytes": 100} | options)


def finish(writer: Writer, source: Reader, names=NAMES) -> Path:
    for name in names:
        if name not in writer.done:
            writer.put(name, {name: value(name)}, {"rank": NAMES.index(name)})
    return writer.commit(source.config, account(source, [transformed(n, [n]) for n in NAMES]), source.carry())


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def whole(tmp_path: Path, source: Reader) -> dict[str, bytes]:
    with opened(tmp_path / "whole") as writer:
        return tree(finish(writer, source))


def crash(out: Path, count: int = 3, **options) -> Path:
    """A run that ends after `count` jobs; returns its work folder."""
    with contextlib.suppress(Crash), opened(out, **options) as writer:
        for name in NAMES[:count]:
            writer.put(name, {name: value(name)}, {"rank": NAMES.index(name)})
        raise Crash
    assert not out.exists()
    (folder,) = work.siblings(out)
    return folder


def test_order_and_threads_do_not_change_a_byte(tmp_path: Path, source: Reader, whole: dict[str, bytes]) -> None:
    for seed in range(3):
        names = list(NAMES)
        random.Random(seed).shuffle(names)
        with opened(tmp_path / f"order{seed}") as writer:
            assert tree(finish(writer, source, names)) == whole
    with opened(tmp_path / "threads") as writer:
        list(Local(workers=4).run(lambda name: writer.put(name, {name: value(name)}, {"rank": NAMES.index(name)}), NAMES))
        assert tree(finish(writer, source)) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["order0", "order1", "order2", "source", "threads", "whole"]


def test_files_have_their_full_length_from_the_start(tmp_path: Path) -> None:
    with contextlib.suppress(Crash), opened(tmp_path / "out") as writer:
        writer.put("t0", {"t0": value("t0")})
        for shard in writer.layout.shards:
            file = work.siblings(tmp_path / "out")[0] / work.NEW / shard.file
            assert file.stat().st_size == shard.size
            assert file.stat().st_blocks * 512 >= shard.size
            load_file(file)
        raise Crash


def test_resume(tmp_path: Path, source: Reader, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    crash(out, 2)
    crash(out, 4)
    with opened(out) as writer:
        assert writer.done == frozenset(NAMES[:4])
        assert writer.records == {name: {"rank": NAMES.index(name)} for name in NAMES[:4]}
        assert writer.missing == NAMES[4:]
        assert tree(finish(writer, source)) == whole
    assert finished(out, PRINT)
    assert not finished(out, PRINT | {"seed": "1"})
    assert not finished(tmp_path / "nothing", PRINT)


def test_resume_redoes_what_is_damaged(tmp_path: Path, source: Reader, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    folder = crash(out, 5)
    file = sorted((folder / work.NEW).iterdir())[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    sorted((folder / work.NEW).iterdir())[1].unlink()
    with opened(out) as writer:
        assert writer.done == {"t0", "t4"}
        assert tree(finish(writer, source)) == whole


def test_what_does_not_read_back_is_not_committed(tmp_path: Path, source: Reader, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    with pytest.raises(Incomplete, match="tensor 't5' does not read back as it was written"), opened(out) as writer:  # noqa: PT012
        for name in NAMES:
            writer.put(name, {name: value(name)}, {"rank": NAMES.index(name)})
        file = sorted((work.siblings(out)[0] / work.NEW).iterdir())[-1]
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        finish(writer, source)
    assert not out.exists()
    with opened(out) as writer:
        assert writer.missing == ("t5",)
        assert tree(finish(writer, source)) == whole


@pytest.mark.parametrize("field", [*PRINT, "more"])
def test_never_resumes_something_else(tmp_path: Path, field: str) -> None:
    out = tmp_path / "out"
    folder = crash(out)
    before = tree(folder)
    with (
        pytest.raises(Refused, match=f"unfinished run.*{field}: was .*, is now 'x'.*remove .*partial-"),
        opened(out, fingerprint=PRINT | {field: "x"}),
    ):
        pass
    with pytest.raises(Refused, match=r"unfinished run.*store\.layout: was"), opened(out, max_shard_bytes=1000):
        pass
    assert tree(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.name]


def test_a_fingerprint_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    folder = crash(tmp_path / "out")
    print_file = folder / work.FINGERPRINT
    print_file.write_text(print_file.read_text().replace('"0"', '"1"'))
    with pytest.raises(Refused, match="belongs to another run.*seed: was '1', is now '0'"), opened(tmp_path / "out"):
        pass


def test_a_run_without_finished_jobs_is_in_nobodys_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with contextlib.suppress(Crash), opened(out):
        raise Crash
    assert list(tmp_path.iterdir()) == []
    folder = crash(out, 1)
    (folder / work.JOURNAL).write_bytes(b"")
    with contextlib.suppress(Crash), opened(out, fingerprint={"other": "x"}) as writer:
        assert writer.done == frozenset()
        assert work.siblings(out) != [folder]
        raise Crash


def test_a_folder_that_is_only_named_like_a_work_folder_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "out.partial-20260101"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(Refused, match=r"named like a work folder.*thesis\.txt.*Move it away"), opened(tmp_path / "out"):
        pass
    assert (mine / "thesis.txt").exists()


def test_two_runs_never_share_an_output(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as writer:
        for options in ({}, {"fingerprint": {"other": "x"}}):
            with pytest.raises(Refused, match="another run is writing it"), opened(tmp_path / "out", **options):
                pass
        writer.put("t0", {"t0": value("t0")})


def test_a_lock_on_a_file_that_is_gone_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our open and our lock the run before us removes the file, and a third one makes and locks a new one."""
    out, real = tmp_path / "out", work._os.lock
    others: list[int] = []

    def lock(fd: int) -> bool:
        monkeypatch.setattr(work._os, "lock", real)
        (tmp_path / "out.partial-lock").unlink()
        others.append(work.acquire(out))
        return real(fd)

    monkeypatch.setattr(work._os, "lock", lock)
    with pytest.raises(Refused, match="another run is writing it"):
        work.acquire(out)
    work.release(out, *others)
    work.release(out, work.acquire(out))


def test_many_starts_at_once_leave_one_writer(tmp_path: Path) -> None:
    barrier, inside, most = threading.Barrier(8), [], []

    def start() -> None:
        barrier.wait()
        for _ in range(20):
            with contextlib.suppress(Refused), opened(tmp_path / "out") as writer:
                inside.append(1)
                most.append(len(inside))
                writer.put("t0", {"t0": value("t0")})
                inside.pop()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most
    assert max(most) == 1


def test_an_existing_output_is_only_replaced_on_demand_and_at_the_end(tmp_path: Path, source: Reader, whole: dict[str, bytes]) -> None:
    out = tmp_path / "whole"
    with pytest.raises(Refused, match="exists and is not empty"), opened(out):
        pass
    with opened(out, overwrite=True, fingerprint={"recipe": "new"}) as writer:
        for name in NAMES:
            writer.put(name, {name: value(name) + 1})
            assert tree(out) == whole
        finish(writer, source)
    assert torch.equal(Reader(out).read("t3"), value("t3") + 1)
    assert verify(out).ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "whole"]


def test_what_is_not_ours_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(Refused, match="is not an output of eckart"), opened(tmp_path / "out", overwrite=True):
        pass
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path, source: Reader) -> None:
    out = tmp_path / "out"
    with pytest.raises(Refused, match="exists and is not empty"), opened(out) as writer:  # noqa: PT012
        out.mkdir()
        (out / "thesis.txt").write_text("x")
        finish(writer, source)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    assert len(work.siblings(out)) == 1


def test_an_empty_folder_is_used(tmp_path: Path, source: Reader, whole: dict[str, bytes]) -> None:
    (tmp_path / "out").mkdir()
    with opened(tmp_path / "out") as writer:
        assert tree(finish(writer, source)) == whole


@pytest.fixture
def swapping(tmp_path: Path, source: Reader, whole: dict[str, bytes]) -> tuple[Path, Path]:
    """An overwrite that stopped between its two renames: (output, work folder)."""
    out = tmp_path / "whole"
    with contextlib.suppress(Crash), opened(out, overwrite=True, fingerprint={"recipe": "new"}) as writer:
        real = os.rename

        def rename(old: Path, new: Path) -> None:
            real(old, new)
            if Path(new).name == work.OLD:
                raise Crash

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work._os, "rename", rename)
            finish(writer, source)
    assert not out.exists()
    (folder,) = work.siblings(out)
    assert tree(folder / work.OLD) == whole
    return out, folder


def restart(out: Path) -> None:
    with contextlib.suppress(Refused), opened(out, fingerprint={"recipe": "another"}):
        pass


def test_an_interrupted_swap_is_brought_to_its_end_by_any_next_run(swapping: tuple[Path, Path]) -> None:
    out, folder = swapping
    new = tree(folder / work.NEW)
    restart(out)
    assert tree(out) == new
    assert work.siblings(out) == []


def test_an_interrupted_swap_is_taken_back_when_the_new_output_is_damaged(swapping: tuple[Path, Path], whole: dict[str, bytes]) -> None:
    out, folder = swapping
    file = next((folder / work.NEW).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    restart(out)
    assert tree(out) == whole


def test_an_interrupted_swap_never_loses_the_only_copy(swapping: tuple[Path, Path], whole: dict[str, bytes]) -> None:
    out, folder = swapping
    shutil.rmtree(folder / work.NEW)
    restart(out)
    assert tree(out) == whole


def test_half_a_former_output_never_comes_back(
    swapping: tuple[Path, Path], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former output is being removed, everything stops, and the new one is moved elsewhere by hand."""
    out, folder = swapping
    real, left = work._os.unlink, [2]

    def unlink(path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Crash
        real(path)

    monkeypatch.setattr(work._os, "unlink", unlink)
    with contextlib.suppress(Crash):
        restart(out)
    monkeypatch.undo()
    assert 0 < len(tree(folder / work.GONE)) < len(whole)
    out.rename(out.with_name("elsewhere"))
    restart(out)
    assert not out.exists()
    assert not folder.exists()


def test_an_output_made_by_hand_during_a_swap_is_kept(swapping: tuple[Path, Path], whole: dict[str, bytes]) -> None:
    out, folder = swapping
    out.mkdir()
    with (
        pytest.raises(Refused, match="appeared while it was being overwritten"),
        opened(out, fingerprint={"recipe": "new"}, overwrite=True),
    ):
        pass
    assert tree(folder / work.OLD) == whole
    (folder / work.FINGERPRINT).unlink()
    with pytest.raises(Refused, match="holds a former output"), opened(out, fingerprint={"recipe": "new"}, overwrite=True):
        pass
    assert tree(folder / work.OLD) == whole


def test_wrong_calls(tmp_path: Path, source: Reader) -> None:
    writer = opened(tmp_path / "out")
    with pytest.raises(UsageError, match="not open"):
        writer.put("t0", {"t0": value("t0")})
    with writer:
        cases = {
            r"'t0' is F32 \[3, 4\], the layout has F32 \[4, 3\]": {"t0": value("t0").T},
            r"'t0' is F16 \[4, 3\], the layout has F32": {"t0": value("t0").half()},
            "'t00' is not in the layout.*Did you mean 't0'": {"t00": value("t0")},
            "cannot be stored; expected a plain dense": {"t0": value("t0").to_sparse()},
            "on meta cannot be stored": {"t0": value("t0").to("meta")},
        }
        for message, tensors in cases.items():
            with pytest.raises(UsageError, match=message):
                writer.put("job", tensors)
        for record in ({"x": object()}, {"x": float("nan")}, {"x": {1, 2}}):
            with pytest.raises(UsageError, match="record cannot be written as JSON"):
                writer.put("job", {}, record)
        with pytest.raises(UsageError, match="job: expected a name"):
            writer.put("", {})
        writer.put("job", {"t0": value("t0")})
        with pytest.raises(UsageError, match="'t0' belongs to job 'job'"):
            writer.put("other", {"t0": value("t0")})
        writer.put("job", {"t0": value("t0")})
        with pytest.raises(Refused, match="not deterministic"):
            writer.put("job", {"t0": value("t0") + 1})
        bad = Writer(tmp_path / "bad", [TensorSpec("t1", "F16", (4, 3))], fingerprint={})
        with pytest.raises(UsageError, match=r"'t1' is F32 \[4, 3\], the layout has"):
            bad.copy("copy", source, "t1")
        with pytest.raises(Incomplete, match=r"tensor 't1' and 4 more not written[\s\S]*Go on with"):
            writer.commit({}, account(source, [transformed(n, [n]) for n in NAMES]))
        for fingerprint in ({"a": 1}, {1: "a"}, {"store.layout": "x"}):
            with pytest.raises(UsageError, match="fingerprint: expected named strings"):
                opened(tmp_path / "out2", fingerprint=fingerprint)
    assert not (tmp_path / "out").exists()


def test_side_files_notes_and_their_names(tmp_path: Path, source: Reader) -> None:
    manifest = account(source, [transformed(n, [n]) for n in NAMES])
    with opened(tmp_path / "out") as writer:
        for name in NAMES:
            writer.put(name, {name: value(name)})
        for name in (
            "../x",
            "/x",
            "a/../x",
            "C:x",
            "eckart.json",
            "config.json",
            "model.safetensors.index.json",
            "model-00001-of-00003.safetensors",
            "",
            "a//b",
            "nul.txt",
            "a\\b",
        ):
            with pytest.raises((UsageError, Refused), match="file"):
                writer.commit({}, manifest, {name: b""})
        with pytest.raises(UsageError, match="given once"):
            writer.commit({}, manifest, {"a": b""}, {"a": b""})
        with pytest.raises(Refused, match="cannot be read"):
            writer.commit({}, manifest, {"a": tmp_path / "missing"})
        (tmp_path / "big.txt").write_bytes(os.urandom(1000))
        out = writer.commit({"x": float("inf")}, manifest, {"a/b/c.txt": b"deep", "big.txt": tmp_path / "big.txt"}, {"run.json": b"{}"})
    assert (out / "a" / "b" / "c.txt").read_bytes() == b"deep"
    assert (out / "big.txt").read_bytes() == (tmp_path / "big.txt").read_bytes()
    assert json.loads((out / "config.json").read_text()) == {"x": float("inf")}
    assert "run.json" not in read_manifest(out).files
    assert verify(out).extra == ("run.json",)


def test_nothing_of_an_earlier_attempt_to_commit_stays(tmp_path: Path, source: Reader, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    folder = crash(out, 6)
    (folder / work.NEW / "stale.txt").write_text("x")
    (folder / work.NEW / "sub").mkdir()
    (folder / work.NEW / "sub" / "stale.txt").write_text("x")
    with opened(out) as writer:
        assert tree(finish(writer, source)) == whole


def test_shards_are_not_written_through_links(tmp_path: Path, source: Reader) -> None:
    out = tmp_path / "out"
    folder = crash(out)
    victim = source.path / "model.safetensors"
    before = victim.read_bytes()
    shard = sorted((folder / work.NEW).iterdir())[0]
    shard.unlink()
    os.link(victim, shard)
    with pytest.raises(Refused, match="is linked to another file"), opened(out):
        pass
    shard.unlink()
    shard.symlink_to(victim)
    with pytest.raises(Incomplete, match="(?i)symbolic link"), opened(out):
        pass
    assert victim.read_bytes() == before


def test_copies_under_other_names(tmp_path: Path, source: Reader) -> None:
    with Writer(tmp_path / "out", [TensorSpec("new", "F32", (4, 3)), TensorSpec("t1", "F32", (4, 3))], fingerprint={}) as writer:
        writer.copy("job", source, {"new": "t0", "t1": "t1"})
        writer.copy("job", source, {"new": "t0", "t1": "t1"})
        from eckart.store import dropped

        manifest = account(source, [copied("new", "t0"), copied("t1"), *(dropped(n, "not needed") for n in NAMES[2:])])
        out = writer.commit({}, manifest)
    assert torch.equal(Reader(out).read("new"), source.read("t0"))
    assert verify(out, source).ok
