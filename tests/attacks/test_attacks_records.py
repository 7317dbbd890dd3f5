"""Hostile manifests, journals and fingerprints: refused or ignored, never believed and never a crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import GOOD, pack

from eckart.errors import Refused
from eckart.store import Reader, TensorSpec, Writer, _json, account, copied, finished, journal, manifest_file, read_manifest, verify, work


@pytest.fixture
def out(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(pack(GOOD))
    reader = Reader(source)
    with Writer(
        tmp_path / "out", [TensorSpec(n, reader.info(n).dtype, reader.info(n).shape) for n in "ab"], fingerprint={"x": "y"}
    ) as writer:
        writer.copy("all", reader, ["a", "b"])
        return writer.commit({"k": 1}, account(reader, map(copied, "ab")))


def signed(top: dict[str, Any]) -> bytes:
    """A manifest whose checksum holds: what someone writes who knows the format."""
    import hashlib

    top = {k: v for k, v in top.items() if k != "sha256"}
    return _json.dump(top | {"sha256": hashlib.sha256(_json.dump(top)).hexdigest()})


def row(top: dict[str, Any], **changes: Any) -> None:
    top["rows"][0] |= changes


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key": (lambda t: t.update(more=1), "'more' is unknown"),
    "missing key": (lambda t: t.pop("rows"), "'rows' is missing"),
    "next version": (lambda t: t.update(format_version=2), "format_version 2.*Update eckart"),
    "version as text": (lambda t: t.update(format_version="1"), "expected an integer"),
    "source without id": (lambda t: t["source"].pop("id"), "'id' is missing"),
    "source with a negative count": (lambda t: t["source"].update(tensors=-1), "expected an integer"),
    "source with another count": (lambda t: t["source"].update(tensors=3), "name 2 tensors of the source, which has 3"),
    "rows as object": (lambda t: t.update(rows={}), "expected a list"),
    "row as text": (lambda t: t["rows"].append("x"), "expected an object"),
    "row with a key more": (lambda t: row(t, path="x"), "'path' is unknown"),
    "row without a name": (lambda t: row(t, name=""), "cannot be the name"),
    "row with a newline": (lambda t: row(t, name="a\nb"), "cannot be the name"),
    "row with another action": (lambda t: row(t, action="stolen"), "action 'stolen'"),
    "row with an unknown dtype": (lambda t: row(t, dtype="F7"), "dtype 'F7'"),
    "row with a huge shape": (lambda t: row(t, shape=[2**62, 2**62]), "2\\*\\*63"),
    "row with wrong bytes": (lambda t: row(t, bytes=17), "does not take 17 bytes"),
    "row with a short sha": (lambda t: row(t, sha256="00"), "sha256 is not one"),
    "row without sources": (lambda t: row(t, sources=[]), "copied from 0 tensors"),
    "row with a source that is a number": (lambda t: row(t, sources=[1]), "expected a string"),
    "row twice": (lambda t: t["rows"].append(t["rows"][0]), "appears twice"),
    "dropped with a sha": (lambda t: row(t, action="dropped", reason="x"), "sha256 is not one"),
    "seed as text": (lambda t: t.update(seed="0"), "expected an integer"),
    "versions with a number": (lambda t: t.update(versions={"torch": 2}), "expected a string"),
    "files as list": (lambda t: t.update(files=[]), "expected an object"),
    "file without bytes": (lambda t: t["files"]["config.json"].pop("bytes"), "'bytes' is missing"),
    "file with a bad sha": (lambda t: t["files"]["config.json"].update(sha256="z" * 64), "sha256 is not one"),
}


@pytest.mark.parametrize("name", EDITS)
def test_manifest(out: Path, name: str) -> None:
    edit, message = EDITS[name]
    top = json.loads((out / "eckart.json").read_bytes())
    edit(top)
    (out / "eckart.json").write_bytes(signed(top))
    with pytest.raises(Refused, match=message):
        read_manifest(out)
    report = verify(out)
    assert not report.ok
    assert report.tensors == 0
    assert not finished(out, {"x": "y"})


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, b'{"a":1,"a":1}', b'{"sha256":"\\ud800"}'])
def test_manifest_that_is_none(out: Path, raw: bytes) -> None:
    (out / "eckart.json").write_bytes(raw)
    assert not verify(out).ok
    with pytest.raises(Refused, match=r"eckart\.json"):
        read_manifest(out)


def test_manifest_is_bounded(out: Path) -> None:
    with (out / "eckart.json").open("r+b") as file:
        file.truncate(manifest_file.MAX_MANIFEST + 1)
    assert "expected at most" in verify(out).problems[0]


@pytest.mark.parametrize("name", ["../source/model.safetensors", "/etc/passwd", "..", "a/../../x", "a\0b"])
def test_files_of_a_manifest_lead_nowhere(out: Path, name: str) -> None:
    """A forged manifest must not make us read, and so confirm, files elsewhere."""
    top = json.loads((out / "eckart.json").read_bytes())
    top["files"][name] = top["files"]["config.json"]
    (out / "eckart.json").write_bytes(signed(top))
    report = verify(out)
    assert not report.ok
    assert not any("differs from what was written" in problem for problem in report.problems)


def test_links_in_an_output_are_not_followed_out_of_it(out: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.json").write_bytes((out / "config.json").read_bytes())
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(tmp_path / "copy.json")
    assert any("outside the folder" in problem for problem in verify(out).problems)


def entries() -> list[journal.Entry]:
    return [journal.Entry("a", {"a": "0" * 64}, {"rank": 1}), journal.Entry("b", {}, {})]


def sealed(body: Any) -> bytes:
    raw = body if isinstance(body, bytes) else _json.line(body)
    return journal._sum(raw) + b" " + raw + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        b"\n", b" \n", b"x\n", b"{}\n", sealed(b""), sealed(b"{"), sealed([]), sealed({}), sealed({"job": "c", "tensors": {}}),
        sealed({"job": 1, "tensors": {}, "record": {}}), sealed({"job": "", "tensors": {}, "record": {}}),
        sealed(b'{"job":"c","record":{"x":"\\ud800"},"tensors":{}}'), sealed(b'{"job":"c","record":{"x":1e999},"tensors":{}}'), sealed(b'{"job":"c", "record":{},"tensors":{}}'),
        sealed({"job": "c", "tensors": [], "record": {}}), sealed({"job": "c", "tensors": {"a": 1}, "record": {}}),
        sealed({"job": "c", "tensors": {}, "record": []}), sealed({"job": "c", "tensors": {}, "record": {}, "more": 1}), sealed({"job": "c" * 5000, "tensors": {}, "record": {}}),
        sealed(b'{"job":"c","job":"c","tensors":{},"record":{}}'), sealed(b"[" * 10**5), sealed(b'{"job":"\\ud800","tensors":{},"record":{}}'),
        b"0" * 16 + b" " + _json.line({"job": "c", "tensors": {}, "record": {}}) + b"\n", b"\xff" * 100 + b"\n", b"x" * 10**6,
    ],
)  # fmt: skip
def test_journal_ends_at_the_first_line_that_does_not_hold(tmp_path: Path, line: bytes) -> None:
    good = [journal.encode(entry) for entry in entries()]
    path = tmp_path / "journal.jsonl"
    path.write_bytes(good[0] + line + good[1])
    assert journal.replay(path) == (entries()[:1], len(good[0]))
    path.write_bytes(b"".join(good))
    assert journal.replay(path) == (entries(), sum(map(len, good)))


def test_a_journal_holds_whole_lines_only(tmp_path: Path) -> None:
    """What a failed append or an older run has left behind the last good line goes with the next append."""
    good, new = (journal.encode(entry) for entry in entries())
    path = tmp_path / "journal.jsonl"
    path.write_bytes(good + b"x" * 1000 + b"\n" + good)
    journal.Journal(path, len(good)).append(entries()[1])
    assert path.read_bytes() == good + new


def test_journal_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with path.open("wb") as file:
        file.truncate(journal.MAX_JOURNAL + 1)
    with pytest.raises(Refused, match="expected at most"):
        journal.replay(path)


def test_a_forged_journal_is_not_believed(tmp_path: Path) -> None:
    """Its lines hold, but the bytes on the disk are not those that it describes, or the tensors do not exist."""
    layout = [TensorSpec("a", "F32", (2,)), TensorSpec("b", "F32", (2,))]

    def writer() -> Writer:
        return Writer(tmp_path / "out", layout, fingerprint={"x": "y"})

    with writer() as first:
        first.put("a", {"a": torch.ones(2)})
    (folder,) = work.siblings(tmp_path / "out")
    lines = [journal.Entry("b", {"b": "0" * 64}), journal.Entry("c", {"c": "0" * 64}), journal.Entry("d", {"../../x": "0" * 64})]
    with (folder / work.JOURNAL).open("ab") as file:
        file.write(b"".join(map(journal.encode, lines)))
    with writer() as again:
        assert again.done == {"a"}
        assert again.missing == ("b",)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"x":1}', b'{"x":"y","x":"y"}', b"\xff", b"[" * 10**6])
def test_fingerprint(tmp_path: Path, raw: bytes) -> None:
    def writer() -> Writer:
        return Writer(tmp_path / "out", [TensorSpec("a", "F32", (2,))], fingerprint={"x": "y"})

    with writer() as first:
        first.put("a", {"a": torch.ones(2)})
    (folder,) = work.siblings(tmp_path / "out")
    (folder / work.FINGERPRINT).write_bytes(raw)
    with pytest.raises(Refused, match=r"fingerprint\.json"), writer():
        pass
    assert (folder / work.JOURNAL).stat().st_size > 0
