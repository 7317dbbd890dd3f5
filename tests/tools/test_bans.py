"""Every ban fires where it should and only there: the table through ruff, the rest through scripts/check_bans.py."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from scripts import check_bans

ROOT = Path(__file__).resolve().parents[2]
TABLE = check_bans.banned_table(ROOT)
PLACES = ("eckart/stats", "eckart/linalg", "tests", "bench", "scripts")


def use(name: str) -> str:
    """Code that uses a banned name through an import of its module."""
    module, _, attribute = name.rpartition(".")
    if not module:
        return f"import {name}\n\n{name}.x\n"
    return f"import {name.split('.')[0]}\n\n{module}.{attribute}\n"


@pytest.fixture(scope="module")
def ruff_hits(tmp_path_factory):
    """(place, name) -> whether TID251 fires, from one run over a tree with a file for each."""
    root = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "pyproject.toml", root)
    for place in PLACES:
        (root / place).mkdir(parents=True)
        for number, name in enumerate(TABLE):
            (root / place / f"f{number}.py").write_text(use(name))
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "--output-format", "json", str(root)],
        capture_output=True,
        text=True,
    )
    hit = {Path(row["filename"]).relative_to(root.resolve()).as_posix() for row in json.loads(found.stdout)}
    return {(place, name): f"{place}/f{number}.py" in hit for place in PLACES for number, name in enumerate(TABLE)}


@pytest.mark.parametrize("name", TABLE)
def test_each_banned_name_fires_in_the_library_only(name, ruff_hits):
    assert ruff_hits["eckart/stats", name]
    assert not any(ruff_hits[place, name] for place in PLACES[1:])


@pytest.mark.parametrize("name", TABLE)
def test_linalg_may_factorise_and_nothing_else(name):
    fires = bool(list(check_bans.check_source(use(name), TABLE, in_linalg=True)))
    assert fires == ("eckart.linalg" not in TABLE[name])
    assert list(check_bans.check_source(use(name), TABLE, in_linalg=False))


def test_the_table_covers_what_the_house_forbids():
    wanted = "torch.linalg torch.svd torch.qr torch.cholesky torch.svd_lowrank torch.pca_lowrank torch.lobpcg numpy.linalg scipy.linalg"
    wanted += " scipy.sparse.linalg torch.load pickle cloudpickle dill joblib torch.manual_seed numpy.random.seed"
    assert set(wanted.split()) <= set(TABLE)


def fires(code: str, *, in_linalg: bool = False) -> list[str]:
    return [message for _, message in check_bans.check_source(textwrap.dedent(code), TABLE, in_linalg=in_linalg)]


@pytest.mark.parametrize("method", sorted(check_bans.METHODS))
def test_methods_that_factorise(method):
    code = f"def f(x):\n    return (x @ x.T).{method}()\n"
    assert fires(code)
    assert not fires(code, in_linalg=True)


@pytest.mark.parametrize(
    "code",
    [
        "from torch.linalg import svd",
        "from torch import linalg as la\nla.svd(x)",
        "import torch as t\nt.linalg.eigh(x)",
        "import scipy.sparse.linalg",
        "def f():\n    import numpy as np\n    return np.linalg.norm(1)",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module\nimport_module('torch.linalg')",
        "__import__('cloudpickle')",
        "import torch\ngetattr(torch, 'load')('x')",
        "from pickle import loads",
        "import numpy as np\nnp.random.seed(0)",
        "m.from_pretrained(p, trust_remote_code=True)",
        "m.from_pretrained(p, trust_remote_code=flag)",
        "options = {'trust_remote_code': True}",
        "options['trust_remote_code'] = True",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "m.load(p, weights_only=False)",
    ],
)
def test_every_way_around_is_seen(code):
    assert fires(code)


@pytest.mark.parametrize(
    "code",
    [
        "from ..linalg import svd\nsvd(x)",
        "from .. import linalg\nlinalg.svd(x)",
        "import torch\ntorch.Generator().manual_seed(0)",
        "m.from_pretrained(p, trust_remote_code=False)",
        "m.load(p, weights_only=True)",
        "import torch\ntorch.norm(x)",
        "message = 'trust_remote_code is never set, torch.load never called'",
    ],
)
def test_ordinary_code_passes(code):
    assert not fires(code)


def test_a_line_is_named_once():
    assert fires("import torch\ntorch.linalg.svd(x)") == [f"`torch.linalg` is banned: {TABLE['torch.linalg']}"]


def test_the_tree_is_clean():
    assert check_bans.check_tree(ROOT) == []


def test_exit_code_and_place(tmp_path, capsys):
    (tmp_path / "eckart").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "eckart/bad.py").write_text("import torch\n\n\ntorch.svd(1)\n")
    assert check_bans.main([str(tmp_path)]) == 1
    assert "eckart/bad.py:4: `torch.svd` is banned" in capsys.readouterr().out
