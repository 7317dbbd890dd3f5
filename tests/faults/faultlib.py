"""Two small runs, over the store and through `ek.compress`, and disks that fail: an error at the Nth call, a full disk, a kill, a power cut."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import eckart as ek
from eckart.progress import shown
from eckart.store import Reader, TensorSpec, Writer, _os, account, copied, dropped, finished, transformed

OPS = (
    "open",
    "close",
    "pread_into",
    "pwrite",
    "ftruncate",
    "allocate",
    "fsync",
    "fsync_dir",
    "rename",
    "replace",
    "mkdir",
    "unlink",
    "rmdir",
    "lock",
)
WRITES = tuple(op for op in OPS if op not in ("pread_into", "lock", "close"))


def make_source(folder: Path, seed: int = 0) -> Path:
    """A checkpoint of two files with an index, a tokenizer and a module folder."""
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    first = {"embed.weight": torch.randn(700, 4, generator=g).bfloat16(), "a.weight": torch.randn(6, 5, generator=g)}
    second = {
        "b.weight": torch.randn(5, 6, generator=g).half(),
        "b.bias": torch.randn(5, generator=g),
        "gone": torch.ones(3, dtype=torch.int64),
    }
    names = {}
    for number, tensors in enumerate((first, second), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(tensors, folder / file)
        names |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text('{"hidden": 4}')
    (folder / "tokenizer.json").write_text('{"vocab": ["a", "b"]}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"mean": true}')
    return folder


def edit_a_row(source: Path) -> None:
    """A change that the fingerprint, which samples 4 KiB of each tensor, does not see."""
    before = Reader(source).fingerprint
    file = source / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    tensors["embed.weight"][0] += 1
    save_file(tensors, file)
    assert Reader(source).fingerprint == before


def fingerprint(reader: Reader, recipe: str = "svd") -> dict[str, str]:
    return {"recipe": recipe, "seed": "0", "source": reader.fingerprint}


def writer_of(reader: Reader, out: Path, *, overwrite: bool = False, recipe: str = "svd") -> Writer:
    layout = [
        TensorSpec("embed.weight", "BF16", (700, 4)),
        TensorSpec("a.down.weight", "F32", (2, 5)),
        TensorSpec("a.up.weight", "F32", (6, 2)),
        TensorSpec("a.weight", "F32", (1,)),
        TensorSpec("b.weight", "F16", (5, 6)),
        TensorSpec("b.bias", "F32", (5,)),
    ]
    stamps = {"source": reader.stamp}
    return Writer(out, layout, fingerprint=fingerprint(reader, recipe), stamps=stamps, overwrite=overwrite, max_shard_bytes=120)


def store(source: Path, out: Path, *, overwrite: bool = False, recipe: str = "svd", pause: Callable[[], None] = lambda: None) -> None:
    """A run over the store alone: it goes on where the last one stopped, and does nothing when the output is complete."""
    reader = Reader(source)
    scale = 2.0 if recipe == "svd" else 3.0
    if not overwrite and finished(out, fingerprint(reader, recipe), {"source": reader.stamp}):
        return
    a = {"a.down.weight": torch.full((2, 5), scale), "a.up.weight": torch.arange(12.0).reshape(6, 2), "a.weight": torch.zeros(1)}
    with writer_of(reader, out, overwrite=overwrite, recipe=recipe) as writer:
        pause()
        if "decide" not in writer.done:
            writer.put("decide", {}, {"rank": 2})
        if "a" not in writer.done:
            pause()
            writer.put("a", a, {"error": 0.25, "rank": writer.records["decide"]["rank"]})
        for name in ("embed.weight", "b.weight", "b.bias"):
            if name not in writer.done:
                pause()
                writer.copy(name, reader, name)
        pause()
        rows = [transformed(n, ["a.weight"]) for n in a] + [copied(n) for n in ("embed.weight", "b.weight", "b.bias")]
        manifest = account(reader, [*rows, dropped("gone", "not needed")], recipe={"name": recipe})
        writer.commit(reader.config, manifest, reader.carry(), {"run.json": b"{}\n"})


def compress(source: Path, out: Path, *, overwrite: bool = False, recipe: str = "svd") -> None:
    """The whole verb, data-free, on both matrices of the checkpoint."""
    rank = {"svd": 2, "older": 1}[recipe]
    with shown("none"):
        ek.compress(source, "svd", out=out, settings=(f"budget.rank={rank}",), overwrite=overwrite, max_shard_bytes=120, threads=1)


RUNS: dict[str, Callable[..., None]] = {"store": store, "compress": compress}
NOTES = ("run.json", "report.html")  # clocks and stamps: outside the promise of equal bytes


def tree(folder: Path) -> dict[str, str]:
    """{relative name: sha256} of all files."""
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def result(folder: Path) -> dict[str, str]:
    """{relative name: sha256} of what equal runs have in common."""
    return {name: sha for name, sha in tree(folder).items() if name not in NOTES}


def times(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


class Stop(BaseException):
    """The machine is gone: nothing that runs afterwards reaches the disk."""


class Disk:
    """Stands between the store and the system; `at` is the number of the call that goes wrong, counted from 1."""

    def __init__(self, at: int, ops: tuple[str, ...] = OPS) -> None:
        self.at, self.ops = at, ops
        self.count = 0
        self.hit = ""
        self.real = {op: getattr(_os, op) for op in OPS}

    def call(self, op: str, *args: Any) -> Any:
        if op in self.ops:
            self.count += 1
            if self.count == self.at:
                self.hit = op
        return self.act(op, *args)

    def act(self, op: str, *args: Any) -> Any:
        return self.real[op](*args)

    @contextlib.contextmanager
    def installed(self) -> Iterator[Disk]:
        for op in OPS:
            setattr(_os, op, lambda *args, op=op: self.call(op, *args))
        try:
            yield self
        finally:
            for op in OPS:
                setattr(_os, op, self.real[op])


class Failing(Disk):
    """The call fails with an error number; once, or from then on. A failing close closes, as on Linux."""

    def __init__(self, at: int, code: int, forever: bool = False, ops: tuple[str, ...] = OPS) -> None:
        super().__init__(at, ops)
        self.code, self.forever = code, forever

    def act(self, op: str, *args: Any) -> Any:
        broken = op in self.ops and (self.count == self.at or (self.forever and self.count > self.at))
        if not broken:
            return super().act(op, *args)
        if op == "close":
            super().act(op, *args)
        if op == "pwrite" and len(args[1]) > 1:
            super().act(op, args[0], args[1][: len(args[1]) // 2], args[2])  # half of it had reached the disk
        raise OSError(self.code, os.strerror(self.code))


class Killing(Disk):
    """The process kills itself at the call, as the kernel would."""

    def act(self, op: str, *args: Any) -> Any:
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().act(op, *args)


class Short(Disk):
    """Every read and write moves at most three bytes."""

    def act(self, op: str, *args: Any) -> Any:
        if op in ("pwrite", "pread_into"):
            args = (args[0], args[1][:3], args[2])
        return super().act(op, *args)


class PowerCut(Disk):
    """At the call everything stops. Bytes that were not synced are kept, lost or turned to noise, and the latest entries of folders that
    were not synced vanish or go back to their old name, as a seeded die says. Removals always reach the disk."""

    def __init__(self, at: int, seed: int = 0) -> None:
        super().__init__(at)
        self.dice = random.Random(seed * 1000 + at)
        self.dead = False
        self.open: dict[int, Path] = {}
        self.dirty: dict[Path, list[tuple[int, int]]] = {}
        self.entries: list[tuple[Path, Path | None]] = []  # (entry, its old name or None when it is new)

    def act(self, op: str, *args: Any) -> Any:
        if self.dead:
            raise Stop
        if self.count == self.at:
            self.dead = True
            self._lose()
            raise Stop
        new = op == "open" and not args[0].exists()
        result = super().act(op, *args)
        if op == "open":
            self.open[result] = args[0]
        elif op == "close":
            self.open.pop(args[0])
        elif op == "pwrite":
            self.dirty.setdefault(self.open[args[0]], []).append((args[2], result))
        elif op == "fsync":
            self.dirty.pop(self.open[args[0]], None)
        elif op == "fsync_dir":
            self.entries = [(entry, old) for entry, old in self.entries if entry.parent != args[0]]
        if new or op == "mkdir":
            self.entries.append((args[0], None))
        elif op in ("rename", "replace"):
            old, name = args
            self.dirty = {_moved(path, old, name): spans for path, spans in self.dirty.items()}
            self.entries = [(_moved(entry, old, name), was) for entry, was in self.entries]
            self.entries.append((name, old))
        return result

    def _lose(self) -> None:
        for path, spans in self.dirty.items():
            if not path.exists():
                continue
            with path.open("r+b") as file:
                for offset, length in spans:
                    fate = self.dice.choice(("kept", "lost", "noise"))
                    if fate != "kept":
                        file.seek(offset)
                        file.write(bytes(length) if fate == "lost" else self.dice.randbytes(length))
        for _ in range(self.dice.randint(0, len(self.entries))):
            entry, old = self.entries.pop()
            if not entry.exists():
                continue
            if old is not None:
                old.parent.mkdir(parents=True, exist_ok=True)
                entry.rename(old)
                self.entries = [(_moved(other, entry, old), was) for other, was in self.entries]
            elif entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    @contextlib.contextmanager
    def installed(self) -> Iterator[Disk]:
        try:
            with super().installed():
                yield self
        finally:
            for fd in self.open:  # the locks of a dead process end
                os.close(fd)


def _moved(path: Path, old: Path, new: Path) -> Path:
    return new / path.relative_to(old) if path.is_relative_to(old) else path
