"""Where an output may not go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eckart.errors import Refused
from eckart.store import Reader, check_output


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "source"
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.mark.parametrize("kind", ["path", "reader", "file"])
def test_a_new_folder_beside_the_source_is_fine(tmp_path: Path, source: Path, kind: str) -> None:
    given = {"path": source, "reader": Reader(source), "file": source / "model.safetensors"}[kind]
    before = sorted(tmp_path.rglob("*"))
    assert check_output(tmp_path / "models" / "out", [given], nbytes=1000) == tmp_path / "models" / "out"
    assert check_output(tmp_path / "models" / "source-2", [given]) == tmp_path / "models" / "source-2"
    assert sorted(tmp_path.rglob("*")) == before


def refused(out: object, source: object, message: str, **options: object) -> None:
    with pytest.raises(Refused, match=message):
        check_output(out, [source] if source else [], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["path", "reader"])
def test_the_source_itself(tmp_path: Path, source: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = source if kind == "path" else Reader(source)
    for overwrite in (False, True):
        refused(source, given, "is the source", overwrite=overwrite)
        refused(f"{source}/../source/", given, "is the source", overwrite=overwrite)
        refused(source / "out", given, "lies in the source", overwrite=overwrite)
        refused(tmp_path / "models", given, "holds the source", overwrite=overwrite)
    monkeypatch.chdir(source)
    refused(".", given, "is the source")
    refused("out", given, "lies in the source")
    refused("..", given, "holds the source")


def test_links(tmp_path: Path, source: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    refused(tmp_path / "link", source, "is a link to")
    refused(tmp_path / "link" / "out", source, "lies in the source")
    refused(source, tmp_path / "link", "is the source")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "dangling", source, "is a link to")
    out = tmp_path / "out"
    out.mkdir()
    os.link(source / "model.safetensors", out / "model.safetensors")
    refused(out, source, "hard link", overwrite=True)
    (out / "model.safetensors").unlink()
    shutil.move(source / "model.safetensors", out / "real.safetensors")
    (source / "model.safetensors").symlink_to(out / "real.safetensors")
    refused(out, source, "holds the source", overwrite=True)


def test_what_is_there_already(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert check_output(out, [source]) == out
    (out / "thesis.txt").write_text("x")
    refused(out, source, r"not empty \(it has thesis.txt\)")
    refused(out, source, "not an output of eckart", overwrite=True)
    (out / "eckart.json").write_text("{}")
    refused(out, source, "not empty")
    assert check_output(out, [source], overwrite=True) == out
    refused(out / "thesis.txt", source, "not a folder", overwrite=True)
    refused(tmp_path / "a" / "b", source, "no such folder. Make it first: mkdir -p")
    refused("/", source, "name of a new folder")
    refused(tmp_path / ("x" * 201), source, "at most 200")


def test_caches_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "anywhere" / "models--org--name"
    for part in ("blobs", "snapshots/abc"):
        (repository / part).mkdir(parents=True)
    for place in (repository, repository / "blobs", repository / "snapshots", repository / "snapshots" / "abc"):
        refused(place / "out", None, "Hugging Face cache")
    (tmp_path / "hf" / "hub").mkdir(parents=True)
    refused(tmp_path / "hf" / "hub" / "out", None, "Hugging Face cache")
    assert check_output(tmp_path / "hf" / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    refused(tmp_path / "elsewhere" / "out", None, "Hugging Face cache")


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1_000_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * free, free, free))  # type: ignore[attr-defined]
    refused(tmp_path / "out", None, r"1\.00 GB free, 1\.04 GB needed", nbytes=free - (30 << 20))
    assert check_output(tmp_path / "out", nbytes=free - (64 << 20))
    work = tmp_path / "out.partial-0123abcd" / "out"
    work.mkdir(parents=True)
    (work / "model.safetensors").write_bytes(bytes(40 << 20))  # an interrupted run has reserved a part already
    assert check_output(tmp_path / "out", nbytes=free - (30 << 20))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(tmp_path / "locked" / "out", None, "not writable")
