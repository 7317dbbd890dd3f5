"""Check the pages. Run: `python scripts/check_docs.py [--no-run]`; exit 1 names every place.

Links between pages exist, with their headings. Pages of docs/ link to nothing outside docs/, and each is reached from the start page or
the navigation. Code after a line `<!-- run -->` is run, page by page, in an empty folder: `python` blocks of a page in one
namespace, `bash` blocks with `set -euo pipefail`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
RUN = "<!-- run -->"
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})\s*([\w+-]*)")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
HTML = re.compile(r"<[a-z][^>]*?\s(?:href|src)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, the line of the page where the code starts, and whether it is to be run."""

    language: str
    code: str
    line: int
    run: bool


def split(text: str) -> tuple[list[tuple[int, str]], list[Block]]:
    """A page as its numbered lines of prose and its fenced blocks."""
    prose: list[tuple[int, str]] = []
    blocks: list[Block] = []
    lines = text.splitlines()
    i, wanted = 0, False
    while i < len(lines):
        fence = FENCE.match(lines[i])
        if fence is None:
            prose.append((i + 1, lines[i]))
            wanted = lines[i].strip() == RUN or (wanted and not lines[i].strip())
            i += 1
            continue
        start = i + 1
        i = start
        while i < len(lines) and not re.match(rf"^ {{0,3}}{re.escape(fence[1])}+\s*$", lines[i]):
            i += 1
        blocks.append(Block(fence[2], "\n".join(lines[start:i]) + "\n", start + 1, wanted))
        wanted = False
        i += 1
    return prose, blocks


def slug(heading: str) -> str:
    """The anchor of a heading."""
    text = re.sub(r"[*`]|<[^>]+>|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text))


def anchors(text: str) -> set[str]:
    """All anchors of a page."""
    return {slug(m[1]) for _, line in split(text)[0] if (m := re.match(r"#{1,6}\s+(.*)", line))}


def links(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, target) of every link of a page outside of code."""
    for number, line in split(text)[0]:
        plain = re.sub(r"`[^`]*`", "", line)
        for match in [*LINK.finditer(plain), *HTML.finditer(plain)]:
            yield number, match[1]


def pages(root: Path) -> list[Path]:
    """The pages of docs/ and those at the top, sorted."""
    return [*(root / name for name in TOP if (root / name).is_file()), *sorted((root / "docs").rglob("*.md"))]


def check_links(root: Path = ROOT) -> list[str]:
    """One line per broken link and per page that nothing leads to."""
    problems: list[str] = []
    docs = root / "docs"
    reached = {docs / "index.md", *_navigation(root)}
    for page in pages(root):
        where = page.relative_to(root).as_posix()
        for line, target in links(page.read_text()):
            if re.match(r"[a-z]+:", target, re.I):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                problems.append(f"{where}:{line}: links to {target}, which does not exist")
            elif docs in page.parents and docs not in [file, *file.parents]:
                problems.append(f"{where}:{line}: links to {target}, which is not part of the site")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
                problems.append(f"{where}:{line}: links to {target}; {file.name} has no such heading")
            elif docs in page.parents:
                reached.add(file)
    lost = [page.relative_to(root).as_posix() for page in sorted(docs.rglob("*.md")) if page not in reached]
    return problems + [f"{where}: no page and no navigation entry leads here" for where in lost]


def _navigation(root: Path) -> set[Path]:
    """Pages named in zensical.toml."""
    config = root / "zensical.toml"
    if not config.is_file():
        return set()

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from walk(child)

    return {root / "docs" / p for p in walk(tomllib.loads(config.read_text())["project"].get("nav", []))}


def missing_navigation(root: Path = ROOT) -> list[str]:
    """Navigation entries without a page."""
    return [
        f"zensical.toml: nav names {p.relative_to(root).as_posix()}, which does not exist"
        for p in sorted(_navigation(root))
        if not p.is_file()
    ]


def run_page(page: Path, folder: Path, root: Path = ROOT) -> str | None:
    """Run the marked blocks of a page in a folder; what went wrong, or None.

    Args:
        page: the Markdown file.
        folder: an empty folder, the working directory of the code.
        root: the repository, put first on the path of the code.
    """
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for block in split(page.read_text())[1]:
        if not block.run:
            continue
        where = f"{page.name}:{block.line}"
        with contextlib.chdir(folder):
            if block.language == "python":
                problem = _python(block, page, namespace)
            elif block.language in ("bash", "sh", "console"):
                problem = _bash(block, root)
            else:
                problem = f"cannot run a block of {block.language!r}"
        if problem:
            return f"{where}: {problem}"
    return None


def _python(block: Block, page: Path, namespace: dict[str, Any]) -> str | None:
    shown = io.StringIO()
    try:
        # empty lines before the code make line numbers those of the page
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        with contextlib.redirect_stdout(shown):
            exec(code, namespace)
    except Exception:
        return f"{traceback.format_exc()}{shown.getvalue()}"
    return None


def _bash(block: Block, root: Path) -> str | None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(root)}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], env=env, capture_output=True, text=True)
    return None if done.returncode == 0 else f"exit {done.returncode}\n{block.code}{done.stdout}{done.stderr}"


def main(argv: list[str]) -> int:
    if argv not in ([], ["--no-run"]):
        raise SystemExit("usage: python scripts/check_docs.py [--no-run]")
    sys.path.insert(0, str(ROOT))
    problems = [*missing_navigation(ROOT), *check_links(ROOT)]
    ran = 0
    for page in [] if argv else pages(ROOT):
        if not (marked := sum(b.run for b in split(page.read_text())[1])):
            continue
        ran += marked
        with tempfile.TemporaryDirectory() as folder:
            if problem := run_page(page, Path(folder)):
                problems.append(problem)
    print("\n".join(problems) if problems else f"pages: links are whole{'' if argv else f', {ran} examples ran'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
