"""The floor checker sees every kind of import, and the tree stands."""

from pathlib import Path

import pytest

from scripts import check_floors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path):
    """A small package; call it with path -> source to get the problems."""
    base = {
        "__init__.py": "",
        "errors.py": "class E(Exception): ...\n",
        "linalg/__init__.py": "",
        "linalg/svd.py": "",
        "stats/__init__.py": "",
        "axes/__init__.py": "",
        "axes/protocols.py": "",
        "axes/metric.py": "",
        "verbs/__init__.py": "",
        "hub/__init__.py": "",
        "hub/load.py": "",
        "recipes/__init__.py": "",
        "recipes/compress/__init__.py": "",
    }

    def problems(files: dict[str, str]) -> list[str]:
        for path, text in (base | files).items():
            target = tmp_path / "eckart" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        return check_floors.check_tree(tmp_path)

    return problems


@pytest.mark.parametrize(
    "code",
    [
        "from ..stats import collect",
        "from eckart.stats import collect",
        "from eckart import stats",
        "from .. import stats",
        "import eckart.stats",
        "import eckart.stats.moments as m",
        "def f():\n    from ..stats import collect",
        "class A:\n    def f(self):\n        return lambda: __import__('eckart.stats')",
        "import importlib\n\ndef f():\n    importlib.import_module('..stats', __package__)",
        "if x:\n    pass\nelse:\n    from ..stats import y",
        "try:\n    from ..stats import y\nexcept ImportError:\n    y = None",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from ..stats import y",
    ],
)
def test_an_import_from_above_is_seen(tree, code):
    (problem,) = tree({"linalg/bad.py": code})
    assert problem.startswith("linalg/bad.py:")
    assert "`linalg` (floor 1) imports eckart.stats" in problem


@pytest.mark.parametrize(
    "code",
    [
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from ..verbs import x",
        "import typing\n\nif typing.TYPE_CHECKING:\n    from eckart.verbs import x",
        "from ..errors import E",
        "from ..axes.protocols import Stat",
        "from . import svd\nfrom .svd import x",
        "import torch\nfrom os import path",
        "'eckart.stats'",
    ],
)
def test_what_is_allowed_below(tree, code):
    assert tree({"linalg/good.py": code}) == []


def test_neighbours_on_a_floor(tree):
    assert tree({"stats/a.py": "from ..data import load_texts", "data/__init__.py": ""}) != []
    assert tree({"stats/a.py": "", "plan.py": "from .verbs import x", "verbs/a.py": "from ..plan import y"}) == []
    assert tree({"cli.py": "from .hub import load", "hub/a.py": "from ..cli import z"}) == []


def test_axes_may_be_named_by_protocols_alone(tree):
    assert tree({"stats/a.py": "from ..axes.protocols import Stat"}) == []
    assert len(tree({"stats/a.py": "from ..axes.metric import InputGram"})) == 1
    assert len(tree({"stats/a.py": "", "axes/protocols.py": "from .metric import InputGram"})) == 1


def test_recipes_know_nothing_of_each_other(tree):
    files = {"recipes/compress/a.py": "", "recipes/compress/b.py": "from .a import RECIPE"}
    (problem,) = tree(files)
    assert "know nothing of each other" in problem
    assert tree(files | {"recipes/compress/b.py": "from eckart.axes import metric"}) == []


def test_the_one_exception(tree):
    lazy = "def f():\n    from ..hub.load import load\n"
    assert tree({"verbs/host.py": lazy}) == []
    assert len(tree({"verbs/host.py": "from ..hub.load import load\n"})) == 1, "only inside functions"
    assert len(tree({"verbs/host.py": "", "verbs/other.py": lazy})) == 1, "only in verbs/host.py"
    assert len(tree({"verbs/other.py": "", "verbs/host.py": "def f():\n    from ..cli import x\n", "cli.py": ""})) == 1, "only hub"


def test_the_top_package_may_be_imported_by_nobody(tree):
    assert tree({"cli.py": "from . import __version__"}) == []
    assert len(tree({"verbs/a.py": "from eckart import svd"})) == 1
    assert tree({"verbs/a.py": "", "__init__.py": "from .hub import load"}) == []


def test_an_unknown_folder_needs_a_floor(tree):
    (problem,) = tree({"novelty/a.py": ""})
    assert "no floor is declared for `novelty`" in problem


def test_long_files_are_errors(tree):
    assert tree({"linalg/long.py": "x = 1\n" * 500}) == []
    (problem,) = tree({"linalg/long.py": "x = 1\n" * 501})
    assert "501 lines" in problem


def test_table_counts_lines(tree, tmp_path):
    tree({"linalg/a.py": "x = 1\n" * 7, "linalg/b.py": "x = 1\n" * 3})
    row = next(line for line in check_floors.table(tmp_path).splitlines() if " linalg " in line)
    assert row.split() == ["1", "linalg", "2", "10", "7", "linalg/a.py", "7"]


def test_the_tree_stands():
    assert check_floors.check_tree(ROOT) == []
