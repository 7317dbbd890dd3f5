"""Nothing in the store unpickles, runs code or touches the disk outside its one door."""

from __future__ import annotations

import ast
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eckart.engine
import eckart.store

STORE = Path(eckart.store.__file__).parent
SOURCES = sorted([*STORE.glob("*.py"), *Path(eckart.engine.__file__).parent.glob("*.py")])


def calls(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            found.append(ast.unparse(node.func))
        elif isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(f"import {node.module}")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: p.name)
def test_no_pickle_and_no_code(file: Path) -> None:
    banned = {
        "import pickle",
        "import shelve",
        "import marshal",
        "import dill",
        "import joblib",
        "eval",
        "exec",
        "compile",
        "__import__",
        "torch.load",
        "np.load",
    }
    assert not banned & set(calls(file))
    assert "trust_remote_code" not in file.read_text()


@pytest.mark.parametrize("file", [p for p in SOURCES if p.name != "_os.py"], ids=lambda p: p.name)
def test_the_disk_is_only_touched_through_one_door(file: Path) -> None:
    touching = {
        f"os.{name}"
        for name in (
            "open",
            "close",
            "read",
            "pread",
            "preadv",
            "write",
            "pwrite",
            "fsync",
            "rename",
            "replace",
            "mkdir",
            "makedirs",
            "unlink",
            "remove",
            "rmdir",
            "link",
            "symlink",
            "truncate",
            "ftruncate",
            "chmod",
            "utime",
        )
    }
    touching |= {"open", "import mmap", "import tempfile", "shutil.rmtree", "shutil.copy", "shutil.move", "shutil.copyfile"}
    methods = {
        "write_bytes",
        "write_text",
        "touch",
        "mkdir",
        "unlink",
        "rmdir",
        "rename",
        "symlink_to",
        "hardlink_to",
        "read_bytes",
        "read_text",
        "open",
    }
    found = calls(file)
    assert not touching & set(found)
    assert not [
        call for call in found if call.rpartition(".")[2] in methods and not call.startswith(("_os.", "files.", "work.")) and "." in call
    ]


def test_everything_works_where_unpickling_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eckart.engine import Local
    from eckart.store import Reader, TensorSpec, Writer, account, copied, verify

    def no(*_: object, **__: object) -> None:
        raise AssertionError("unpickling")

    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {f"t{i}": torch.full((3,), float(i)) for i in range(4)}
    save_file(tensors, folder / "model.safetensors")
    for module, name in (
        (pickle, "Unpickler"),
        (pickle, "load"),
        (pickle, "loads"),
        (torch, "load"),
        (sys.modules["_pickle"], "Unpickler"),
        (sys.modules["_pickle"], "loads"),
    ):
        monkeypatch.setattr(module, name, no)
    with pytest.raises(AssertionError, match="unpickling"):
        pickle.loads(b"")
    reader = Reader(folder)
    with Writer(tmp_path / "out", [TensorSpec(n, "F32", (3,)) for n in tensors], fingerprint={}) as writer:
        list(Local(2).run(lambda name: writer.copy(name, reader, name), tensors))
        writer.commit(reader.config, account(reader, map(copied, tensors)), reader.carry())
    assert verify(tmp_path / "out", folder).ok


def test_reading_headers_needs_no_torch() -> None:
    import subprocess

    code = (
        "import eckart.store, eckart.engine, sys; print('torch' in sys.modules, 'numpy' in sys.modules, 'huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=STORE.parents[1])
    assert done.stdout.split() == ["False", "False", "False"]
