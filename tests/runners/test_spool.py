"""Tensors put away and taken back, in memory and in files; what a full disk, a cut file or a killed run does."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eckart.axes.protocols import Stat
from eckart.errors import Refused
from eckart.runners import blocks, spool
from eckart.runners.spool import PREFIX, Spool
from eckart.stats import collect
from tests.runners.chains import make, opened, rows


def test_what_fits_stays_in_memory_and_the_rest_goes_to_files(tmp_path) -> None:
    with Spool(100, tmp_path) as kept:
        kept.put("a", torch.arange(20, dtype=torch.float32))  # 80 bytes
        kept.put("b", torch.arange(6, dtype=torch.float64))  # 48 bytes
        assert (kept.in_memory, kept.on_disk) == (80, 48)
        assert kept.get("a").tolist() == list(range(20))
        assert kept.get("b").tolist() == list(range(6))
        kept.drop("a")
        kept.put("b", torch.arange(6, dtype=torch.float64))
        assert (kept.in_memory, kept.on_disk) == (48, 0)
        with pytest.raises(KeyError):
            kept.get("a")
        (folder,) = tmp_path.glob(PREFIX + "*")
        assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (1, 5), (3, 2, 4)])
def test_every_type_and_shape_comes_back(dtype, shape, tmp_path) -> None:
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    with Spool(0, tmp_path) as kept:
        kept.put(("x", 1), value)
        again = kept.get(("x", 1))
        assert again.dtype == dtype
        assert again.shape == value.shape
        assert torch.equal(again, value)


def on(room: int) -> Any:
    """`open`, on a disk with room for so many bytes."""
    return lambda *args, **options: Full(open(*args, **options), room)


class Full:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: min(len(data), self.room)]
        self.room -= len(part)
        return self.file.write(part)

    def readinto(self, buffer: Any) -> int:
        return self.file.readinto(buffer[:3])  # in small pieces


def test_a_full_disk_is_refused_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    given = rows()
    _, sites, chain = opened(make("llama", tmp_path / "model"), given)
    monkeypatch.setattr(spool, "open", on(1000), raising=False)
    (tmp_path / "spool").mkdir()
    with pytest.raises(Refused, match="cannot be spooled there .*No space left"):
        blocks.collect(chain, given, {Stat("moments")}, sites, model_id="x", memory=0, folder=tmp_path / "spool")
    assert list((tmp_path / "spool").iterdir()) == []
    assert all(p.is_meta for p in chain.model.parameters())


def test_writes_and_reads_in_pieces_are_put_together(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(spool, "open", on(1 << 20), raising=False)
    value = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    with Spool(0, tmp_path) as kept:
        kept.put("x", value)
        assert torch.equal(kept.get("x"), value)


def test_a_cut_file_is_refused(tmp_path) -> None:
    with Spool(0, tmp_path) as kept:
        kept.put("x", torch.ones(10))
        (file,) = (f for f in next(tmp_path.glob(PREFIX + "*")).iterdir() if f.name != "lock")
        file.write_bytes(file.read_bytes()[:7])
        with pytest.raises(Refused, match="7 bytes, expected 40"):
            kept.get("x")


def test_no_folder_to_write_in_is_refused(tmp_path) -> None:
    with Spool(0, tmp_path / "missing") as kept, pytest.raises(Refused, match="cannot be spooled there"):
        kept.put("x", torch.ones(1))


KILLED = """
import os, signal, sys, torch
from eckart.runners.spool import Spool
kept = Spool(0, sys.argv[1])
kept.put("x", torch.ones(1000))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_is_removed_and_what_lives_stays(tmp_path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    (dead,) = tmp_path.iterdir()
    with Spool(0, tmp_path) as living, Spool(0, tmp_path) as second:
        living.put("x", torch.ones(1))
        second.put("x", torch.ones(1))
        found = set(tmp_path.iterdir())
        assert dead not in found
        assert len(found) == 2
    assert list(tmp_path.iterdir()) == []


def test_activations_beyond_the_limit_go_to_disk_and_change_nothing(tmp_path, monkeypatch) -> None:
    given = rows()
    host, sites, chain = opened(make("llama", tmp_path / "model"), given)
    most = {"memory": 0, "disk": 0}
    put = Spool.put

    def watched(self: Spool, key: Any, tensor: torch.Tensor) -> None:
        put(self, key, tensor)
        if self.limit == 5000:  # of activations, not of finished values
            most["memory"], most["disk"] = max(most["memory"], self.in_memory), max(most["disk"], self.on_disk)

    monkeypatch.setattr(Spool, "put", watched)
    found = blocks.collect(chain, given, {Stat("moments")}, sites, model_id="x", memory=5000, keep=0, folder=tmp_path)
    whole = collect(host.live(), given, {Stat("moments")}, sites, model_id="x")
    assert 0 < most["memory"] <= 5000 < most["disk"]
    assert all(torch.equal(found.values[k].gram, whole.values[k].gram) for k in whole.values)
    assert [p.name for p in Path(tmp_path).iterdir() if p.name != "model"], "finished values lie in files until they are dropped"
    del found
    assert [p.name for p in Path(tmp_path).iterdir()] == ["model"]
