"""Verification finds every changed byte, and every way in which an output and its source can disagree."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eckart.errors import Refused, UsageError
from eckart.store import Reader, TensorSpec, Writer, account, copied, dropped, manifest_file, read_manifest, transformed, verify
from eckart.store.manifest import Manifest, Row, check_accounts
from eckart.store.source import infos_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "vocab.txt").write_text("x\ny\n")
    return folder


@pytest.fixture
def out(tmp_path: Path, source: Path) -> Path:
    reader = Reader(source)
    layout = [TensorSpec("a.up", "F32", (2, 1)), TensorSpec("a.down", "F32", (1, 3)), TensorSpec("b", "BF16", (4,))]
    with Writer(tmp_path / "out", layout, fingerprint={"recipe": "x"}, max_shard_bytes=16) as writer:
        writer.put("a", {"a.up": torch.ones(2, 1), "a.down": torch.ones(1, 3)}, {"error": 0.5})
        writer.copy("b", reader, "b")
        rows = [transformed("a.up", ["a"]), transformed("a.down", ["a"]), copied("b"), dropped("c", "not used")]
        return writer.commit(reader.config, account(reader, rows, recipe={"name": "x"}, seed=3), reader.carry(), {"notes.txt": b"anything"})


def forge(out: Path, **changes: object) -> None:
    """Rewrite the manifest consistently with itself."""
    (out / "eckart.json").write_bytes(manifest_file.encode(replace(read_manifest(out), **changes)))


def test_the_manifest_says_what_became_of_every_tensor(out: Path, source: Path) -> None:
    found = read_manifest(out)
    assert [(row.name, row.action, row.sources, row.bytes) for row in found.rows] == [
        ("a.down", "transformed", ("a",), 12),
        ("a.up", "transformed", ("a",), 8),
        ("b", "copied", ("b",), 8),
        ("c", "dropped", ("c",), 8),
    ]
    assert found.source == {"id": "source", "fingerprint": Reader(source).fingerprint, "tensors": 3, "bytes": 40}
    assert (found.seed, found.recipe, found.records) == (3, {"name": "x"}, {"a": {"error": 0.5}})
    assert set(found.files) == {p.relative_to(out).as_posix() for p in out.rglob("*")} - {"eckart.json", "notes.txt"}
    assert (found.count("copied"), found.count("dropped")) == (1, 1)


def test_a_whole_output_passes(out: Path, source: Path) -> None:
    report = verify(out, source)
    assert report.ok
    assert report.problems == ()
    assert (report.tensors, report.extra) == (3, ("notes.txt",))
    assert verify(out, Reader(source)) == report
    assert report.bytes == sum(p.stat().st_size for p in out.rglob("*") if p.name not in ("eckart.json", "notes.txt")) + 8


def test_any_flipped_byte_is_found(out: Path) -> None:
    (out / "notes.txt").unlink()
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        data = file.read_bytes()
        for at in range(0, len(data), 1 if file.suffix == ".safetensors" or len(data) < 100 else 5):
            file.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
            report = verify(out)
            assert not report.ok, f"{file.name}: byte {at}"
            assert report.problems
        for changed in (data[:-1], data + b"\n", b""):
            file.write_bytes(changed)
            assert not verify(out).ok, f"{file.name}: {len(changed)} bytes"
        file.unlink()
        if file.name != "eckart.json":
            assert not verify(out).ok
        file.write_bytes(data)
    assert verify(out).ok


def test_problems_name_the_tensor(out: Path) -> None:
    file = next(f for f in out.glob("*.safetensors") if "b" in load_file(f))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert verify(out).problems == (f"tensor 'b' in {file.name}: its bytes differ from what was written.",)


@pytest.mark.parametrize("name", ["more.safetensors", "evil.py", "sub/pytorch_model.bin", "other.safetensors.index.json"])
def test_weights_and_code_that_appear_later_are_reported(out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"x")
    report = verify(out)
    assert not report.ok
    assert any(name in problem for problem in report.problems)


def test_folders_that_cannot_be_verified(tmp_path: Path, source: Path) -> None:
    with pytest.raises(Refused, match="no such folder"):
        verify(tmp_path / "nothing")
    with pytest.raises(Refused, match=r"has no eckart\.json"):
        verify(source)


def test_another_source_is_noticed(out: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "moved")
    assert verify(out, tmp_path / "moved").ok
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    problems = verify(out, tmp_path / "moved").problems
    assert any("fingerprint differs" in p for p in problems)
    assert any("'b': is not the copy" in p for p in problems)
    save_file(tensors | {"d": torch.zeros(1)}, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    assert any("'d' of the source is neither" in p for p in verify(out, tmp_path / "moved").problems)
    del tensors["c"]
    save_file(tensors, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    assert any("made from 'c', which the source does not have" in p for p in verify(out, tmp_path / "moved").problems)


def test_a_forged_manifest_is_caught_by_the_source(out: Path, source: Path) -> None:
    rows = read_manifest(out).rows
    forge(out, source=read_manifest(out).source | {"bytes": 41})
    assert any("the manifest says 3 of 41" in p for p in verify(out, source).problems)
    forge(out, rows=tuple(replace(r, sources=("c",), action="transformed", reason="") if r.name == "b" else r for r in rows))
    assert not verify(out, source).ok


def test_manifest_and_files_must_agree(out: Path) -> None:
    whole = read_manifest(out)
    by_name = {row.name: row for row in whole.rows}
    forge(out, rows=tuple(r for r in whole.rows if r.name != "a.up"))
    assert any("'a.up': in model" in p for p in verify(out).problems)
    forge(out, rows=(*whole.rows, replace(by_name["a.up"], name="a.new")))
    assert any("'a.new': in the manifest, not in" in p for p in verify(out).problems)
    forge(out, rows=tuple(replace(r, shape=(1, 2)) if r.name == "a.up" else r for r in whole.rows))
    assert any("is F32 [2, 1], was written as F32 [1, 2]" in p for p in verify(out).problems)
    forge(out, files={name: row for name, row in whole.files.items() if name != "vocab.txt"})
    assert verify(out).extra == ("notes.txt", "vocab.txt")


def row(name: str = "a", action: str = "copied", sources: tuple[str, ...] = ("a",), **rest: object) -> Row:
    return Row(name, action, sources, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([copied("a"), copied("b")], "'c' of the source is neither transformed, copied nor dropped"),
        ([copied("a"), copied("b"), dropped("c", "")], "'c': dropped without a reason"),
        ([copied("a"), copied("b"), dropped("c", "x"), dropped("c", "y")], "'c': dropped twice"),
        ([copied("a"), copied("b"), copied("c"), dropped("c", "x")], "'c' is dropped and also used by 'c'"),
        ([copied("a"), copied("b"), copied("c"), transformed("a", ["b"])], "'a': appears twice"),
        ([copied("a"), copied("b"), copied("c"), transformed("d", ["e"])], "'d': made from 'e', which the source does not have"),
        ([copied("a"), copied("b"), copied("c"), transformed("d", [])], "'d': transformed from 0 tensors"),
        ([row(sources=("a", "b")), copied("b"), copied("c")], "'a': copied from 2 tensors"),
        ([row(action="lost"), copied("b"), copied("c")], "'a': lost from 1 tensors"),
    ],
)
def test_every_tensor_is_accounted_for(source: Path, rows: list[Row], message: str) -> None:
    with pytest.raises(Refused, match=message):
        account(Reader(source), rows)


def test_copies_keep_type_and_shape(source: Path) -> None:
    infos = infos_of(Reader(source))
    rows = [replace(copied(n), dtype=infos[n].dtype, shape=infos[n].shape, bytes=infos[n].nbytes) for n in infos]
    check_accounts(rows, infos)
    with pytest.raises(Refused, match=r"'a': copied as F32 \[3, 2\], but 'a' of the source is F32 \[2, 3\]"):
        check_accounts([replace(rows[0], shape=(3, 2)), *rows[1:]], infos)


def test_rows_and_layout_must_agree(tmp_path: Path, source: Path) -> None:
    reader = Reader(source)
    everything = [TensorSpec(n, reader.info(n).dtype, reader.info(n).shape) for n in "abc"]
    with Writer(tmp_path / "out", everything, fingerprint={}) as writer:
        writer.copy("all", reader, ["a", "b", "c"])
        with pytest.raises(UsageError, match="'c' of the layout has no row"):
            writer.commit({}, account(reader, [copied("a"), copied("b"), dropped("c", "x")]))
        with pytest.raises(UsageError, match="'d' is not in the layout"):
            writer.commit({}, account(reader, [copied("a"), copied("b"), copied("c"), transformed("d", ["c"])]))
        with pytest.raises(UsageError, match=r"'a' is copied as BF16 \[4\], the layout has F32 \[2, 3\]"):
            writer.commit({}, account(reader, [copied("a", "b"), transformed("b", ["a"]), copied("c")]))
        with pytest.raises(UsageError, match="cannot be written as JSON"):
            writer.commit({}, account(reader, map(copied, "abc"), recipe={"x": float("nan")}))
        with pytest.raises(UsageError, match="seed"):
            account(reader, map(copied, "abc"), seed=-1)
    assert not (tmp_path / "out").exists()


def test_the_manifest_round_trips(out: Path) -> None:
    found = read_manifest(out)
    assert isinstance(found, Manifest)
    assert manifest_file.decode(manifest_file.encode(found), "x") == found
    assert manifest_file.encode(found) == (out / "eckart.json").read_bytes()
