"""Nothing unpickles or runs code of a file, and the store touches the disk through its one door."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import eckart.cli
import eckart.engine
import eckart.store

STORE = Path(eckart.store.__file__).parent
CLI = Path(eckart.cli.__file__).parent
HERE = Path(__file__).parent
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


STEPS = (
    "parsers", "ls", "show", "inspect", "compress, data-free", "compress, calibrated", "search", "verify", "eval", "adapt", "export-lora",
    "pickles are refused", "convert, in its own process",
)  # fmt: skip


@pytest.fixture(scope="module")
def where_unpickling_raises(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "unpickling.py"), str(tmp_path_factory.mktemp("unpickling"))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(STORE.parents[1]), str(HERE)))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("step", STEPS)
def test_works_where_unpickling_raises(where_unpickling_raises: dict[str, Any], step: str) -> None:
    assert where_unpickling_raises["steps"][step] == ""


def test_nothing_tried_to_unpickle(where_unpickling_raises: dict[str, Any]) -> None:
    """Neither we nor a library, at import or later; and each verb that the command line has is among the steps."""
    assert where_unpickling_raises["tried"] == []
    assert set(where_unpickling_raises["steps"]) == set(STEPS)
    verbs = {"export-lora" if p.stem == "export_lora" else "eval" if p.stem == "evaluate" else p.stem for p in CLI.glob("[a-z]*.py")}
    assert verbs - {"base", "demo"} <= {step.partition(",")[0] for step in STEPS}, "a verb is not tried in tests/attacks/unpickling.py"


def test_the_traps_hold() -> None:
    """Each way to unpickle that is closed in that process does raise there."""
    code = """
import sys, io, pickle, marshal
sys.path.insert(0, sys.argv[1])
import unpickling as u
data, compiled = pickle.dumps(print), marshal.dumps(1)
C, P = pickle.Unpickler, pickle._Unpickler
u.forbid(); u.forbid_in_libraries()
import numpy, torch
assert u.TRIED == []
array = io.BytesIO(); numpy.save(array, numpy.array([{}], dtype=object), allow_pickle=True); array.seek(0)
saved = io.BytesIO(); torch.save({}, saved); saved.seek(0)
ways = [lambda: pickle.loads(data), lambda: pickle.load(io.BytesIO(data)), lambda: pickle.Unpickler(io.BytesIO(data)), lambda: C(io.BytesIO(data)).load(),
        lambda: P(io.BytesIO(data)).load(), lambda: marshal.loads(compiled), lambda: marshal.load(io.BytesIO(compiled)), lambda: torch.load(saved),
        lambda: torch.load(saved, weights_only=True), lambda: numpy.load(array, allow_pickle=True)]
for number, way in enumerate(ways):
    try:
        way()
    except u.Unpickled:
        continue
    raise SystemExit(f"way {number} is open")
"""
    done = subprocess.run([sys.executable, "-c", code, str(HERE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_reading_headers_needs_no_torch() -> None:
    code = (
        "import eckart.store, eckart.engine, sys; print('torch' in sys.modules, 'numpy' in sys.modules, 'huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=STORE.parents[1])
    assert done.stdout.split() == ["False", "False", "False"]
