"""Broken pages are found, and marked code is really run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import check_docs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(tmp_path):
    """A tree with two pages; call it with path -> text to get the problems."""
    base = {
        "README.md": "# eckart\n",
        "docs/index.md": "# Start\n\n[other](other.md)\n",
        "docs/other.md": "# Other\n\n## A `code` heading\n",
    }

    def problems(files: dict[str, str]) -> list[str]:
        for path, text in (base | files).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return [*check_docs.missing_navigation(tmp_path), *check_docs.check_links(tmp_path)]

    return problems


def test_whole_pages_pass(site):
    assert site({}) == []
    assert (
        site({"README.md": "[o](docs/other.md#a-code-heading) [w](https://example.org) `[x](no.md)`\n\n```text\n[x](no.md)\n```\n"}) == []
    )


@pytest.mark.parametrize(
    ("path", "text", "what"),
    [
        ("README.md", "[x](docs/no.md)", "README.md:1: links to docs/no.md, which does not exist"),
        ("docs/other.md", "# O\n\n[x](index.md#nowhere)", "docs/other.md:3: links to index.md#nowhere"),
        ("docs/other.md", "[x](../README.md)", "not part of the site"),
        ("docs/other.md", '<a href="no.html">x</a>', "no.html"),
        ("docs/other.md", '[<b>x</b>](no.md "a tip")', "no.md"),
        ("docs/other.md", "![x](no.png)", "no.png"),
        ("docs/lost.md", "# Lost\n", "docs/lost.md: no page and no navigation entry leads here"),
        ("zensical.toml", '[project]\nnav = [{"A" = "no.md"}]\n', "zensical.toml: nav names docs/no.md"),
    ],
)
def test_what_is_broken_is_named(site, path, text, what):
    (problem,) = site({path: text})
    assert what in problem


def test_only_marked_blocks_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nraise SystemError\n```\n\n<!-- run -->\n\n```python\n__import__('pathlib').Path('made').touch()\n```\n")
    (tmp_path / "work").mkdir()
    assert check_docs.run_page(page, tmp_path / "work") is None
    assert (tmp_path / "work/made").exists()


def test_blocks_of_a_page_share_names_and_the_folder(tmp_path):
    page = tmp_path / "page.md"
    blocks = [
        "python\nx = 1",
        "bash\necho hi > made",
        "python\nfrom pathlib import Path\nassert (x, Path('made').read_text()) == (1, 'hi\\n')",
    ]
    page.write_text("".join(f"<!-- run -->\n```{b}\n```\n" for b in blocks))
    assert check_docs.run_page(page, tmp_path) is None


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("```python\nx = 1\n\nraise KeyError('gone')\n```", 'page.md", line 6'),
        ("```bash\nfalse\ntrue\n```", "exit 1"),
        ("```perl\n```", "'perl'"),
    ],
)
def test_failures_name_the_place(tmp_path, code, line):
    page = tmp_path / "page.md"
    page.write_text(f"# P\n<!-- run -->\n{code}\n")
    problem = check_docs.run_page(page, tmp_path)
    assert problem.startswith("page.md:4: ")
    assert line in problem


def test_commands_of_the_examples_see_this_environment(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"<!-- run -->\n```bash\ntest \"$(python -c 'import sys; print(sys.prefix)')\" = '{sys.prefix}'\n```\n")
    assert check_docs.run_page(page, tmp_path) is None


def test_the_pages_are_whole():
    assert [*check_docs.missing_navigation(ROOT), *check_docs.check_links(ROOT)] == []


@pytest.mark.skipif(shutil.which("zensical", path=str(Path(sys.executable).parent)) is None, reason="zensical is not installed")
def test_the_site_builds(tmp_path):
    for name in ("docs", "zensical.toml"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    done = subprocess.run(
        [Path(sys.executable).parent / "zensical", "build", "--clean", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "build/site/systems/index.html").read_text()
    assert 'class="ek-table"' in table
    assert 'href="svd_llm/"' in table, "cells link to the pages"
