"""A run goes on with the very files it began with: an edit that the fingerprint cannot see is noticed, and enters no byte of the result."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eckart.errors import Refused, UsageError
from eckart.store import Reader, TensorSpec, Writer, account, copied, finished, read_manifest, resume, verify, work
from eckart.store.memory import Memory
from eckart.store.resume import recorded

PRINT = {"recipe": "copy"}


class Crash(Exception):
    pass


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {"embed": torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), "norm": torch.ones(16)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_a_row(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["embed"][3] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def opened(source: Path, out: Path, **options: Any) -> Writer:
    reader = Reader(source)
    layout = [TensorSpec(n, reader.info(n).dtype, reader.info(n).shape) for n in ("embed", "norm")]
    given = {"fingerprint": {**PRINT, "source": reader.fingerprint}, "stamps": {"source": reader.stamp}} | options
    return Writer(out, layout, **given)


def run(source: Path, out: Path, stop: bool = False, notes: dict[str, bytes] | None = None, **options: Any) -> Path:
    reader = Reader(source)
    with opened(source, out, **options) as writer:
        for name in ("embed", "norm"):
            if name not in writer.done:
                writer.copy(name, reader, name)
            if stop:
                raise Crash
        return writer.commit({"a": 1}, account(reader, map(copied, ("embed", "norm"))), {}, notes)


def crash(source: Path, out: Path) -> Path:
    with contextlib.suppress(Crash):
        run(source, out, stop=True)
    (folder,) = work.siblings(out)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def result(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != "run.json"}


def test_an_edit_of_one_row_between_kill_and_resume_is_refused(tmp_path: Path, source: Path) -> None:
    before = Reader(source).fingerprint
    shutil.copytree(source, tmp_path / "kept")  # keeps the times
    folder = crash(source, tmp_path / "out")
    left = tree(folder)
    edit_a_row(source)
    assert Reader(source).fingerprint == before, "the fingerprint alone would not have seen it"
    with pytest.raises(Refused, match=r"begun on other files \(stamp\.source: was '[0-9a-f]+', is now '[0-9a-f]+'\).*remove the folder"):
        run(source, tmp_path / "out")
    assert tree(folder) == left
    shutil.copytree(tmp_path / "kept", source, dirs_exist_ok=True)
    run(source, tmp_path / "out")
    assert verify(tmp_path / "out", source).ok


def test_without_stamps_nothing_changes(tmp_path: Path, source: Path) -> None:
    with contextlib.suppress(Crash):
        run(source, tmp_path / "out", stop=True, stamps={})
    edit_a_row(source)
    out = run(source, tmp_path / "out", stamps={})
    assert not (out / "run.json").exists()


def test_no_byte_of_the_result_knows_the_stamps(tmp_path: Path, source: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", ns=(1, 1))
    shutil.move(tmp_path / "copy", tmp_path / "deep")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "deep", tmp_path / "elsewhere" / "source")
    assert Reader(source).stamp != Reader(tmp_path / "elsewhere" / "source").stamp
    first, second = run(source, tmp_path / "a"), run(tmp_path / "elsewhere" / "source", tmp_path / "b")
    assert result(first) == result(second) == result(run(source, tmp_path / "c", stamps={}))
    assert "run.json" not in read_manifest(first).files
    assert not any(name.startswith("stamp") for name in read_manifest(first).fingerprint)
    assert Reader(source).stamp.encode() in (first / "run.json").read_bytes()


def test_an_output_of_the_very_same_run_is_recognised(tmp_path: Path, source: Path) -> None:
    out, reader = run(source, tmp_path / "out"), Reader(source)
    identity, stamps = {**PRINT, "source": reader.fingerprint}, {"source": reader.stamp}
    assert finished(out, identity, stamps)
    assert finished(out, identity)
    assert not finished(out, identity, stamps | {"other": "x"})
    assert not finished(out, identity | {"seed": "1"}, stamps)
    assert not finished(out, PRINT, stamps)
    assert not finished(tmp_path / "nothing", identity, stamps)
    edit_a_row(source)
    assert Reader(source).fingerprint == reader.fingerprint
    assert not finished(out, identity, {"source": Reader(source).stamp})
    (out / "run.json").unlink()
    assert not finished(out, identity, stamps)
    assert finished(out, identity)


def test_leftovers_of_a_finished_run_are_cleared(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(folder: Path) -> None:
        raise Crash

    monkeypatch.setattr(work, "clear", stop)
    with contextlib.suppress(Crash):
        run(source, tmp_path / "out")
    monkeypatch.undo()
    assert work.siblings(tmp_path / "out")
    reader = Reader(source)
    assert finished(tmp_path / "out", {**PRINT, "source": reader.fingerprint}, {"source": reader.stamp})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'{"stamps": []}', b'{"stamps": {"source": 1}}', b'{"a":1,"a":1}', b"[" * 10**5, b"\xff"]
)
def test_a_note_that_is_damaged_is_no_proof(tmp_path: Path, source: Path, raw: bytes) -> None:
    out, reader = run(source, tmp_path / "out"), Reader(source)
    (out / "run.json").write_bytes(raw)
    assert not finished(out, {**PRINT, "source": reader.fingerprint}, {"source": reader.stamp})
    assert verify(out).ok, "it is a note, not a part of the result"


def test_a_huge_note_is_not_read(tmp_path: Path, source: Path) -> None:
    out, reader = run(source, tmp_path / "out"), Reader(source)
    with (out / "run.json").open("r+b") as file:
        file.truncate(resume.MAX_RUN + 1)
    assert not finished(out, {**PRINT, "source": reader.fingerprint}, {"source": reader.stamp})


def test_a_run_that_finished_nothing_is_begun_again(tmp_path: Path, source: Path) -> None:
    folder = crash(source, tmp_path / "out")
    (folder / work.JOURNAL).write_bytes(b"")
    edit_a_row(source)
    out = run(source, tmp_path / "out")
    assert torch.equal(Reader(out).read("embed"), Reader(source).read("embed"))
    assert verify(out, source).ok


def test_every_field_that_differs_is_named(tmp_path: Path, source: Path) -> None:
    crash(source, tmp_path / "out")
    edit_a_row(source)
    with (
        pytest.raises(Refused, match=r"unfinished run.*recipe: was 'copy', is now 'other'; stamp\.source: was"),
        opened(source, tmp_path / "out", fingerprint={"recipe": "other", "source": Reader(source).fingerprint}),
    ):
        pass
    with (
        pytest.raises(Refused, match=r"stamp\.statistics: was 'absent', is now 'x'"),
        opened(source, tmp_path / "out", stamps={"source": Reader(source).stamp, "statistics": "x"}),
    ):
        pass


def test_run_json_keeps_what_it_is_given(tmp_path: Path, source: Path) -> None:
    out = run(source, tmp_path / "out", notes={"run.json": b'{"timings": {"cut": 1.5}}', "report.html": b"x"})
    assert json.loads((out / "run.json").read_bytes()) == {"timings": {"cut": 1.5}, "stamps": {"source": Reader(source).stamp}}
    for notes in (b"[]", b"x"):
        with pytest.raises(Refused, match=r"run\.json"):
            run(source, tmp_path / "bad", notes={"run.json": notes})


def test_wrong_stamps(tmp_path: Path, source: Path) -> None:
    for options in ({"stamps": {"a": 1}}, {"stamps": {"store.x": "y"}}, {"fingerprint": {"stamp.source": "x"}}):
        with pytest.raises(UsageError, match="expected named strings"):
            opened(source, tmp_path / "out", **options)
    reader = Reader(source)
    with opened(source, tmp_path / "out") as writer:
        writer.copy("all", reader, ["embed", "norm"])
        with pytest.raises(UsageError, match=r"side file 'run\.json'"):
            writer.commit({}, account(reader, map(copied, ("embed", "norm"))), {"run.json": b"{}"})


def test_tensors_in_memory_have_a_stamp_of_their_bytes() -> None:
    one, other = Memory({"w": torch.zeros(3)}), Memory({"w": torch.ones(3)})
    assert one.stamp == Memory({"w": torch.zeros(3)}).stamp != other.stamp


def test_a_small_file_of_an_output_is_what_was_written(tmp_path: Path, source: Path) -> None:
    out = run(source, tmp_path / "out", notes={"report.html": b"x"})
    assert json.loads(recorded(out, "config.json")) == {"a": 1}
    for name in ("report.html", "run.json", "eckart.json", "../source/model.safetensors", "nothing"):
        with pytest.raises(Refused, match="knows no"):
            recorded(out, name)
    whole = (out / "config.json").read_bytes()
    for raw in (b"", whole + b" ", whole.replace(b"1", b"2")):
        (out / "config.json").write_bytes(raw)
        with pytest.raises(Refused, match="differs from what was written|expected at most"):
            recorded(out, "config.json")
    (out / "config.json").unlink()
    with pytest.raises(Refused, match="cannot be read"):
        recorded(out, "config.json")
    (out / "eckart.json").write_bytes(b"{}")
    with pytest.raises(Refused, match=r"eckart\.json"):
        recorded(out, "config.json")
