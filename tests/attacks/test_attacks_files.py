"""Hostile checkpoints: each is refused, with the file and the tensor named, before anything is allocated for it."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hostile import GOOD, HEADERS, INDEXES, index, pack

from eckart.errors import Refused
from eckart.store import Reader, header


@pytest.mark.parametrize("name", HEADERS)
def test_header(tmp_path: Path, name: str) -> None:
    data, message = HEADERS[name]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(Refused) as caught:
        Reader(tmp_path)
    assert message in str(caught.value)
    assert "model.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_the_good_one_is_good(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(pack(GOOD))
    assert Reader(tmp_path).read("b").tolist() == [0, 0, 0]
    (tmp_path / "model.safetensors").write_bytes(
        pack({"__metadata__": {"x": "y"}} | GOOD | {"empty": {"dtype": "U8", "shape": [0], "data_offsets": [16, 16]}})
    )
    assert Reader(tmp_path).keys() == ("a", "b", "empty")


@pytest.mark.parametrize("name", [n for n in HEADERS if "million" not in n and "deep" not in n])
def test_the_package_refuses_them_too_unless_we_are_stricter(tmp_path: Path, name: str) -> None:
    """Where the reference accepts what we refuse, it is on this list and on purpose."""
    from safetensors import SafetensorError, safe_open

    stricter = {
        "another key", "an empty name", "a name with a newline", "a name with NUL", "a name with an escape sequence", "a name of 2000 characters",
        "a thousand dimensions", "product overflows around a zero", "a name twice",
    }  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(HEADERS[name][0])
    try:
        with safe_open(tmp_path / "model.safetensors", "pt") as opened:
            opened.keys()
        accepted = True
    except (SafetensorError, OSError, ValueError):
        accepted = False
    assert accepted == (name in stricter)


@pytest.mark.parametrize("name", [n for n in HEADERS if "exabyte" in n or "million" in n or "2**6" in n or "limit" in n])
def test_nothing_large_is_allocated(name: str) -> None:
    data = HEADERS[name][0]
    tracemalloc.start()
    try:
        with pytest.raises(Refused):
            header.parse_header(data, len(data), "model.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20 + 60 * len(data)


def test_a_header_is_not_read_further_than_its_length_allows(tmp_path: Path) -> None:
    """A sparse file of an exabyte costs nothing to make; its header must not be believed."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((99_999_999).to_bytes(8, "little") + b"x")
        file.truncate(1 << 40)
    with pytest.raises(Refused, match="does not start with"):
        Reader(tmp_path)
    with path.open("r+b") as file:
        file.write((1 << 39).to_bytes(8, "little"))
    with pytest.raises(Refused, match="expected 2 to 100000000"):
        Reader(tmp_path)


def shards(folder: Path) -> None:
    extra = {"a": GOOD["a"], "extra": {"dtype": "U8", "shape": [1], "data_offsets": [16, 17]}}
    (folder / "model-1.safetensors").write_bytes(pack({"a": GOOD["a"]}, 16))
    (folder / "model-2.safetensors").write_bytes(pack({"b": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}, 6))
    (folder / "model-extra.safetensors").write_bytes(pack(extra, 17))


@pytest.mark.parametrize("name", INDEXES)
def test_index(tmp_path: Path, name: str) -> None:
    shards(tmp_path)
    data, message = INDEXES[name]
    if "does not know" in name:
        os.replace(tmp_path / "model-extra.safetensors", tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    with pytest.raises(Refused, match=message) as caught:
        Reader(tmp_path)
    assert "safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_a_good_index_is_good(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(index({"a": "model-1.safetensors", "b": "model-2.safetensors"}))
    assert Reader(tmp_path).keys() == ("a", "b")


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(index({"a": "model-1.safetensors", "extra": "model-extra.safetensors"}))
    with pytest.raises(Refused, match=r"'a' is in model-1\.safetensors and in model-extra\.safetensors"):
        Reader(tmp_path)


def test_an_index_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eckart.store import index as module

    shards(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(module.MAX_INDEX + 1)
    with pytest.raises(Refused, match="expected at most 100000000"):
        Reader(tmp_path)
    monkeypatch.setattr(module, "MAX_FILES", 1)
    path.write_bytes(index({"a": "model-1.safetensors", "b": "model-2.safetensors"}))
    with pytest.raises(Refused, match="2 files, expected at most 1"):
        Reader(tmp_path)


@pytest.mark.parametrize("target", ["../outside.safetensors", "/dev/zero", "loop.safetensors", "missing"])
def test_links_out_of_the_folder(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside.safetensors").write_bytes(pack(GOOD))
    (folder / "loop.safetensors").symlink_to("model.safetensors")
    (folder / "model.safetensors").symlink_to(target)
    with pytest.raises(Refused, match="outside the folder|cannot be read"):
        Reader(folder)
    (folder / "model.safetensors").unlink()
    (folder / "loop.safetensors").unlink()
    (folder / "config.json").symlink_to("../outside.safetensors" if target == "missing" else target)
    (folder / "model.safetensors").write_bytes(pack(GOOD))
    with pytest.raises(Refused, match="outside the folder|cannot be read"):
        Reader(folder)


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "model-00001.safetensors").write_bytes(pack(GOOD))
    (tmp_path / "model.safetensors").symlink_to("model-00001.safetensors")
    assert Reader(tmp_path).keys() == ("a", "b")


def test_what_looks_like_a_cache_and_is_none(tmp_path: Path) -> None:
    """`snapshots/<revision>` gives access to `blobs/` beside it and to nothing else."""
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "secret").write_bytes(pack(GOOD))
    (folder / "model.safetensors").symlink_to("../../blobs/../secret")
    with pytest.raises(Refused, match="outside the folder"):
        Reader(folder)
    (folder / "model.safetensors").unlink()
    (tmp_path / "blobs" / "1").symlink_to("../secret")
    (folder / "model.safetensors").symlink_to("../../blobs/1")
    with pytest.raises(Refused, match="outside the folder"):
        Reader(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_folders_and_pipes_instead_of_files(tmp_path: Path, name: str, kind: str) -> None:
    """Opening a pipe that nobody writes to would hang for ever."""
    if name == "config.json":
        (tmp_path / "model.safetensors").write_bytes(pack(GOOD))
    (tmp_path / name).mkdir() if kind == "folder" else os.mkfifo(tmp_path / name)
    with pytest.raises(Refused, match="expected a regular file|cannot be read"):
        Reader(tmp_path)


def test_a_bool_that_is_neither(tmp_path: Path) -> None:
    data = pack({"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, 0)
    (tmp_path / "model.safetensors").write_bytes(data + b"\x00\x01\x02")
    with pytest.raises(Refused, match="'a' is BOOL and holds bytes other than 0 and 1"):
        Reader(tmp_path).read("a")
    (tmp_path / "model.safetensors").write_bytes(data + b"\x00\x01\x01")
    assert Reader(tmp_path).read("a").tolist() == [False, True, True]


@pytest.mark.parametrize(
    "raw", [b"[]", b"{", b'{"a":1,"a":2}', b"[" * 100_000, b"\xff", b'{"a":' * 5000 + b"1" + b"}" * 5000, b"null", b'"x"']
)
def test_config(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(pack(GOOD))
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(Refused, match=r"config\.json"):
        Reader(tmp_path)


def test_names_are_never_paths(tmp_path: Path) -> None:
    """A tensor may be called anything printable; no file is ever named after it."""
    name = "../../etc/passwd"
    (tmp_path / "model.safetensors").write_bytes(pack({name: GOOD["a"]}, 16))
    reader = Reader(tmp_path)
    assert reader.keys() == (name,)
    assert json.dumps(reader.read(name).tolist()) == "[[0.0, 0.0], [0.0, 0.0]]"
