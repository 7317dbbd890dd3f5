"""Which files are read, what travels with them, and how a checkpoint is told from another."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model

from eckart.errors import Refused
from eckart.store import Reader


def make(folder: Path, shards: int = 1, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors or {"w": torch.arange(12.0).reshape(4, 3), "b": torch.ones(3)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        index = {}
        for number, (name, tensor) in enumerate(tensors.items(), 1):
            file = f"model-{number:05d}-of-{len(tensors):05d}.safetensors"
            save_file({name: tensor}, folder / file)
            index[name] = file
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text('{"model_type": "toy"}')
    return folder


def test_one_file_shards_and_a_named_file(tmp_path: Path) -> None:
    single, sharded = Reader(make(tmp_path / "a")), Reader(make(tmp_path / "b", shards=2))
    assert single.keys() == sharded.keys() == ("b", "w")
    assert torch.equal(single.read("w"), sharded.read("w"))
    assert single.config == {"model_type": "toy"}
    assert (single.nbytes, len(single), "w" in single, "x" in single) == (60, 2, True, False)
    save_file({"other": torch.zeros(2)}, tmp_path / "a" / "adapter.safetensors")
    assert Reader(tmp_path / "a").keys() == ("b", "w")
    assert Reader(tmp_path / "a" / "adapter.safetensors").keys() == ("other",)
    (tmp_path / "a" / "model.safetensors").unlink()
    assert Reader(tmp_path / "a").keys() == ("other",)
    save_file({"more": torch.zeros(2)}, tmp_path / "a" / "second.safetensors")
    with pytest.raises(Refused, match=r"2 \.safetensors files and no model\.safetensors\.index\.json"):
        Reader(tmp_path / "a")


def test_transformers_order_is_kept_when_both_forms_are_there(tmp_path: Path) -> None:
    make(tmp_path / "a", shards=2)
    make(tmp_path / "a", w=torch.zeros(1))
    reader = Reader(tmp_path / "a")
    assert reader.keys() == ("w",)
    assert set(reader.left_behind) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }


def test_rows(tmp_path: Path) -> None:
    reader = Reader(make(tmp_path / "a"))
    assert torch.equal(reader.read("w", rows=(1, 3)), reader.read("w")[1:3])
    assert reader.read("w", rows=(2, 2)).shape == (0, 3)
    for rows in ((0, 5), (-1, 2), (3, 2)):
        with pytest.raises(Refused, match="rows"):
            reader.read("w", rows=rows)


def test_unknown_names_are_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no tensor 'weigth'.*Did you mean 'weight'"):
        Reader(make(tmp_path / "a", weight=torch.ones(1))).read("weigth")


def test_nothing_stays_mapped_or_open(tmp_path: Path) -> None:
    reader = Reader(make(tmp_path / "a"))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    tensor = reader.read("w")
    next(reader.raw("w")), reader.fingerprint
    shutil.rmtree(tmp_path / "a")
    assert float(tensor.sum()) == 66.0
    if Path("/proc/self/maps").exists():
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        assert len(os.listdir("/proc/self/fd")) == before


def test_threads_read_at_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((500, 40), float(i)) for i in range(8)}
    reader = Reader(make(tmp_path / "a", **tensors))
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(name for _ in range(10) for name in tensors if not torch.equal(reader.read(name), tensors[name]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    reader = Reader(folder)
    reader.read("w")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(Refused, match="has changed since"):
        reader.read("w")
    with pytest.raises(Refused, match="has changed since"):
        list(reader.raw("b"))


def test_identity(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", w=torch.zeros(50, 100), b=torch.zeros(3))
    first = Reader(folder)
    shutil.copytree(folder, tmp_path / "copy")
    copy = Reader(tmp_path / "copy")
    assert copy.fingerprint == first.fingerprint
    os.utime(tmp_path / "copy" / "model.safetensors", ns=(1, 1))
    assert Reader(tmp_path / "copy").stamp != first.stamp == Reader(folder).stamp
    make(tmp_path / "tuned", w=torch.full((50, 100), 1e-3), b=torch.zeros(3))
    assert Reader(tmp_path / "tuned").fingerprint != first.fingerprint
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "other"}')
    assert Reader(tmp_path / "copy").fingerprint != first.fingerprint
    make(tmp_path / "sharded", shards=2, w=torch.zeros(50, 100), b=torch.zeros(3))
    sharded = Reader(tmp_path / "sharded")
    assert sharded.fingerprint != first.fingerprint
    assert sharded.content_hash() == first.content_hash()
    one_row = torch.zeros(50, 100)
    one_row[-1, -1] = 1e-3
    assert Reader(make(tmp_path / "row", w=one_row, b=torch.zeros(3))).content_hash() != first.content_hash()


def test_ties_recorded_by_save_model(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    save_model(Tied(), str(tmp_path / "model.safetensors"), {"format": "pt"})
    reader = Reader(tmp_path)
    ((alias, stored),) = reader.aliases.items()
    assert {alias, stored} == {"embed.weight", "head.weight"}
    assert stored in reader
    assert alias not in reader


def test_side_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    for name in (
        "tokenizer.json",
        "vocab.txt",
        "spiece.model",
        "chat_template.jinja",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "LICENSE",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    behind = (
        "modeling_x.py",
        "pytorch_model.bin",
        "a.pt",
        "b.pkl",
        "c.CKPT",
        "tf_model.h5",
        "flax.msgpack",
        "onnx/model.onnx",
        "2_Dense/pytorch_model.bin",
    )
    for name in (*behind, ".git/config", ".gitattributes", "pytorch_model.bin.index.json", "consolidated.safetensors", "a/b/c/d/deep.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("x")
    (folder / "eckart.json").write_text("{}")
    (tmp_path / "secret.txt").write_text("x")
    (folder / "escape.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "here.txt").symlink_to("vocab.txt")
    (folder / "dangling.txt").symlink_to("nowhere")
    (folder / "all").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.txt")
    reader = Reader(folder)
    assert set(reader.side_files) == {
        "tokenizer.json", "vocab.txt", "spiece.model", "chat_template.jinja", "1_Pooling/config.json", "2_Dense/model.safetensors", "LICENSE", "here.txt",
    }  # fmt: skip
    assert set(reader.left_behind) == {
        *behind, ".git", ".gitattributes", "pytorch_model.bin.index.json", "consolidated.safetensors", "escape.txt", "dangling.txt", "all", "pipe.txt", "a/b/c/d",
    }  # fmt: skip
    assert reader.side_path("vocab.txt").read_text() == "x"
    with pytest.raises(Refused, match="not a side file"):
        reader.side_path("../secret.txt")


def test_large_side_files_stay_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eckart.store import side

    monkeypatch.setattr(side, "MAX_FILE", 10)
    folder = make(tmp_path / "a")
    (folder / "corpus.txt").write_bytes(bytes(11))
    assert Reader(folder).left_behind == {"corpus.txt": "larger than 10 bytes"}
    monkeypatch.setattr(side, "MAX_FILES", 2)
    for i in range(3):
        (folder / f"{i}.txt").write_text("x")
    with pytest.raises(Refused, match="more than 2 files"):
        _ = Reader(folder).side_files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pth", "pytorch_model.bin.index.json"])
def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "it's old"
    folder.mkdir()
    (folder / name).write_bytes(b"\x80\x02")
    with pytest.raises(Refused, match=r"can run code") as caught:
        Reader(folder)
    assert name in str(caught.value)
    command = shlex.split(str(caught.value).splitlines()[-1])
    assert command == ["eckart", "convert", str(folder), "-o", f"{folder}-safetensors"]
    if not name.endswith(".json"):
        with pytest.raises(Refused, match=r"expected a folder or a \.safetensors file[\s\S]*eckart convert"):
            Reader(folder / name)


def test_missing_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no \.safetensors file found"):
        Reader(tmp_path)
    with pytest.raises(Refused, match="no such folder or file"):
        Reader(tmp_path / "nowhere")
    with pytest.raises(Refused, match="no such folder or file"):
        Reader("./nowhere")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(Refused, match=r"expected a folder or a \.safetensors file[\s\S]*eckart convert"):
        Reader(tmp_path / "weights.bin")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(Refused, match=r"expected a folder or a \.safetensors file\.$"):
        Reader(tmp_path / "notes.txt")


def fake_hub(cache: Path, source: Path) -> Path:
    """The layout of the Hub's cache: a snapshot of links into blobs."""
    snapshot = cache / "models--org--name" / "snapshots" / "abc123"
    blobs = cache / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        shutil.copy(file, blobs / str(number))
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    source = make(tmp_path / "a", shards=2)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    snapshot = fake_hub(tmp_path / "cache", source)
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    reader = Reader("org/name@v1")
    assert (reader.id, asked["name"], asked["revision"]) == ("org/name@abc123", "org/name", "v1")
    assert not any("py" in pattern or "bin" in pattern for pattern in asked["allow_patterns"])
    assert reader.keys() == ("b", "w")
    assert torch.equal(reader.read("w"), Reader(source).read("w"))
    assert reader.side_files == ("1_Pooling/config.json",)
    assert reader.fingerprint == Reader(source).fingerprint
    assert Reader(snapshot).id == reader.id

    def broken(name: str, **options: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot be reached\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(Refused, match=r"org/name: no such folder here.*\(cannot be reached\)"):
        Reader("org/name")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub as its own client lays it out, without a network."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def test_hub_ids_come_from_the_cache_without_a_network(tmp_path: Path, cache: Path) -> None:
    source = make(tmp_path / "a", shards=2)
    snapshot = fake_hub(cache, source)
    snapshot.rename(snapshot.with_name("c" * 40))
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text("c" * 40)
    for name in ("org/name", "org/name@main", "org/name@" + "c" * 40):
        reader = Reader(name)
        assert reader.id == "org/name@" + "c" * 40
        assert torch.equal(reader.read("w"), Reader(source).read("w"))
        assert (reader.config, reader.fingerprint) == ({"model_type": "toy"}, Reader(source).fingerprint)
    assert Reader("org/name", revision="main").id == reader.id
    for name, command in (("org/name@v2", "hf download org/name --revision v2"), ("org/other", "hf download org/other")):
        with pytest.raises(Refused, match="not in the cache of the Hugging Face Hub, and the Hub cannot be reached") as caught:
            Reader(name)
        assert str(caught.value).endswith(command)


def test_a_cache_without_weights_says_so(tmp_path: Path, cache: Path) -> None:
    """Only the tokenizer was fetched, or the repository has nothing but pickles, which are never fetched."""
    snapshot = fake_hub(cache, make(tmp_path / "a"))
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(
        Refused, match=r"org/name@abc123: no \.safetensors file in the cache[\s\S]*eckart convert org/name@abc123 -o name-safe"
    ):
        Reader(snapshot)
    (snapshot / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(Refused, match=r"can run code[\s\S]*eckart convert org/name@abc123 -o name-safetensors$"):
        Reader(snapshot)


def test_links_between_repositories_of_a_cache_are_refused(tmp_path: Path) -> None:
    snapshot = fake_hub(tmp_path / "cache", make(tmp_path / "a"))
    other = tmp_path / "cache" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(snapshot / "model.safetensors", other / "0")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../models--org--other/blobs/0")
    with pytest.raises(Refused, match="outside the folder"):
        Reader(snapshot)


def test_config_may_hold_what_transformers_writes(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    (folder / "config.json").write_text('{"limit": [0.0, Infinity], "nan": NaN}')
    assert Reader(folder).config["limit"] == [0.0, float("inf")]
    assert isinstance(Reader(folder).fingerprint, str)
    (folder / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(Refused, match="'a' is given twice"):
        Reader(folder)
    (folder / "config.json").unlink()
    assert Reader(folder).config == {}
