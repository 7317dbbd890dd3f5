"""A source that was edited is noticed by `ek.compress`: its finished output is not taken for the new one's, and its unfinished run does not go on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from faultlib import Failing, compress, edit_a_row, result, times, tree
from safetensors.torch import load_file, save_file

from eckart.errors import Incomplete, Refused

FIRST = "model-00001-of-00002.safetensors"


def touch(source: Path) -> None:
    """Another time, the same bytes."""
    info = (source / FIRST).stat()
    os.utime(source / FIRST, ns=(info.st_atime_ns, info.st_mtime_ns + 1))


def secretly(source: Path) -> None:
    """Another number in a matrix that is compressed: the same size and, set back, the same time."""
    file = source / FIRST
    info, tensors = file.stat(), load_file(file)
    tensors["a.weight"][-1, -1] += 1
    save_file(tensors, file)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert file.stat().st_size == info.st_size


EDITS: dict[str, Callable[[Path], None]] = {"time alone": touch, "a copied tensor": edit_a_row, "a matrix, time set back": secretly}


def test_a_finished_output_is_left_alone(source: Path, place: Path) -> None:
    compress(source, place / "out")
    before = (tree(place / "out"), times(place / "out"))
    compress(source, place / "out")
    assert (tree(place / "out"), times(place / "out")) == before


def test_a_finished_output_whose_report_was_edited_is_not_believed(source: Path, place: Path) -> None:
    compress(source, place / "out")
    (place / "out" / "report.json").write_bytes(b"{")
    with pytest.raises(Refused, match=r"report\.json: differs from what was written"):
        compress(source, place / "out")


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_source_is_not_taken_for_finished(source: Path, place: Path, edit: str) -> None:
    out = place / "out"
    compress(source, out)
    before = tree(out)
    EDITS[edit](source)
    with pytest.raises(Refused, match=r"--overwrite"):
        compress(source, out)
    assert tree(out) == before
    compress(source, out, overwrite=True)
    compress(source, place / "fresh")
    assert result(out) == result(place / "fresh")
    after = tree(out)
    assert (result(out) == {name: before[name] for name in result(out)}) == (edit == "time alone")
    compress(source, out)
    assert tree(out) == after


@pytest.mark.parametrize("edit", EDITS)
def test_an_unfinished_run_does_not_go_on_with_an_edited_source(source: Path, place: Path, edit: str) -> None:
    with pytest.raises(Incomplete), Failing(1, errno.EIO, ops=("rename",)).installed():
        compress(source, place / "out")
    EDITS[edit](source)
    with pytest.raises(Refused, match=r"stamp\.source|content"):
        compress(source, place / "out")
    assert not (place / "out").exists()
