"""What is generated follows from the files, the same every time, and staleness is seen."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import generate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def systems():
    return generate.find(ROOT)


def test_every_file_is_a_system(systems):
    files = {p.stem for p in (ROOT / "eckart/recipes").glob("*/*.py") if not p.name.startswith("_") and p.stem != "base"}
    assert {s.name for s in systems if s.kind == "recipe"} == files
    assert {"svd", "svd_llm", "two_sided"} <= files


def test_index_rows_are_what_the_registry_reads(systems):
    rows = json.loads(generate.index(systems))
    keys = {"name", "kind", "verb", "title", "paper", "fidelity", "differs", "summary", "module", "axes"}
    assert all(set(row) == keys for row in rows)
    row = next(r for r in rows if r["name"] == "svd_llm")
    assert row["axes"]["metric"] == "input_gram"
    assert row["module"] == "eckart.recipes.compress.svd_llm"
    assert all(row["summary"] and row["title"] and row["paper"] for row in rows)


def test_every_system_has_a_cell_and_a_page(systems):
    table = generate.table(systems)
    for s in systems:
        assert f"]({s.name}.md " in table
        text = generate.page(s, systems)
        assert f"# {s.name}\n" in text
        assert s.doc.strip() in text


def test_a_page_says_what_the_recipe_is(systems):
    s = next(s for s in systems if s.name == "svd_llm")
    text = generate.page(s, systems)
    for piece in (
        "https://arxiv.org/abs/2403.07378",
        "`input_gram`",
        s.differs.replace("|", "\\|"),
        "--recipe svd_llm",
        "kind: input_gram",
        "--calib",
    ):
        assert piece in text, piece
    plain = generate.page(next(s for s in systems if s.name == "svd"), systems)
    assert "--calib" not in plain, "a recipe without statistics needs no data"


def test_yaml_on_a_page_is_the_recipe(systems):
    from eckart.axes.border import from_yaml

    for s in systems:
        if s.kind == "recipe":
            text = generate.page(s, systems)
            assert from_yaml(text.partition("```yaml\n")[2].partition("```")[0]) == s.value


def test_neighbours_differ_in_one_axis(systems):
    by_name = {s.name: s for s in systems}
    near = {o.name: axis for o, axis in generate.neighbours(by_name["svd_llm"], systems)}
    assert near["svd"] == "metric"
    assert "two_sided" not in near, "it changes the metric and the allocation"
    for s in systems:
        for other, axis in generate.neighbours(s, systems):
            assert {**s.axes, axis: None} == {**other.axes, axis: None}


def test_columns_group_by_statistics(systems):
    columns = generate.table(systems).split('<div class="ek-column')[1:]
    heading = {name: c.splitlines()[2] for c in columns for name in ("svd", "svd_llm", "fwsvd", "two_sided") if f"]({name}.md " in c}
    assert heading == {
        "svd": "no data",
        "svd_llm": "input moments",
        "fwsvd": "weight gradients (Fisher)",
        "two_sided": "input moments + output gradients",
    }


def test_unknown_verbs_come_last(systems):
    import dataclasses

    other = dataclasses.replace(systems[0], name="zzz", verb="anneal")
    table = generate.table([other, *systems])
    assert table.index("## compress") < table.index("## anneal")


@pytest.fixture
def clone(tmp_path):
    """A copy of what the generator reads and writes."""
    for folder in ("eckart", "docs", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    return tmp_path


def run(clone, *args):
    return subprocess.run([sys.executable, "scripts/generate.py", *args], cwd=clone, capture_output=True, text=True)


def test_check_names_what_is_stale_and_generate_repairs_it(clone):
    assert run(clone).returncode == 0
    assert run(clone, "--check").returncode == 0
    index = clone / generate.INDEX
    before = index.read_bytes()
    new = clone / "eckart/recipes/compress/novel.py"
    new.write_text((clone / "eckart/recipes/compress/svd.py").read_text().replace('name="svd"', 'name="novel"'))
    (clone / "docs/systems/afm.md").write_text("edited by hand\n")
    (clone / "docs/systems/gone.md").write_text("of a system that is no more\n")
    (clone / "docs/cli.md").unlink()
    found = run(clone, "--check")
    assert found.returncode == 1
    stale = {line.removeprefix("stale: ") for line in found.stdout.splitlines() if line.startswith("stale: ")}
    pages = {f"docs/systems/{n}.md" for n in ("afm", "gone", "index", "novel")}
    assert pages | {"docs/cli.md", generate.INDEX} <= stale
    assert index.read_bytes() == before, "a check writes nothing"
    assert run(clone).returncode == 0
    assert run(clone, "--check").stdout == "generated files: fresh\n"
    assert not (clone / "docs/systems/gone.md").exists()
    assert "novel" in index.read_text()


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("eckart/recipes/compress/wrong.py", '"""A name that is not the file\'s."""\nfrom .svd import RECIPE\n', "same name"),
        ("eckart/recipes/compress/empty.py", '"""No recipe."""\n', "binds RECIPE"),
    ],
)
def test_a_file_that_is_no_system_is_refused(clone, path, text, complaint):
    (clone / path).write_text(text)
    found = run(clone, "--check")
    assert found.returncode == 1
    assert complaint in found.stderr


def test_the_reference_holds_every_command():
    text = (ROOT / "docs/cli.md").read_text()
    for command in ("compress", "demo", "eval", "inspect", "ls", "show", "verify"):
        assert f"## eckart {command}\n" in text
    assert "\x1b" not in text, "no colour codes"
    assert max(map(len, text.splitlines())) <= 120


def test_the_tree_is_fresh():
    # in a process of its own, as CI does: what other tests have imported must not show in the help
    found = subprocess.run([sys.executable, "scripts/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
