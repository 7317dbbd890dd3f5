"""Systems that lack a call (Windows has no pwrite, macOS no posix_fallocate) get the same results."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from eckart.store import _os, files


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preadv", "pwrite", "posix_fallocate"):
        monkeypatch.delattr(os, name, raising=False)


def test_reading_and_writing_at_offsets_from_threads(tmp_path: Path, lacking: None) -> None:
    with files.opened(tmp_path / "x", _os.UPDATE) as fd:
        _os.allocate(fd, 8000)
        _os.ftruncate(fd, 8000)
        threads = [threading.Thread(target=files.write_at, args=(fd, memoryview(bytes([i]) * 1000), 1000 * i)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        back = bytearray(8000)
        files.read_at(fd, memoryview(back), 0, "x")
    assert back == b"".join(bytes([i]) * 1000 for i in range(8)) == (tmp_path / "x").read_bytes()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call here")
def test_reserving_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(code: int):
        def allocate(*_: int) -> None:
            raise OSError(code, os.strerror(code))

        return allocate

    with files.opened(tmp_path / "x", _os.UPDATE) as fd:
        _os.allocate(fd, 1 << 20)
        assert os.fstat(fd).st_blocks * 512 >= 1 << 20
        monkeypatch.setattr(os, "posix_fallocate", fails(errno.EOPNOTSUPP))
        _os.allocate(fd, 1 << 20)
        monkeypatch.setattr(os, "posix_fallocate", fails(errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            _os.allocate(fd, 1 << 20)


def test_large_pieces_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_os, "LARGEST", 7)
    data = os.urandom(100)
    assert files.write_file(tmp_path / "x", [data[:40], memoryview(data)[40:]]) == files.file_digest(tmp_path / "x")
    assert files.read_small(tmp_path / "x", 100) == data


def test_trees_are_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "file").write_text("x")
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "file").write_text("x")
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "keep")
    files.remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    assert (tmp_path / "keep" / "file").read_text() == "x"
