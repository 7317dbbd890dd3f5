"""Bans that ruff's TID251 cannot see. Run: `python scripts/check_bans.py [ROOT]`; exit 1 names every place.

The table of banned names is the one in pyproject.toml. On top of it, inside `eckart/`:
methods of tensors that factorise (`.svd(`, `.qr(`, ...; not in eckart/linalg), keyword arguments that run or unpickle foreign code,
and banned modules that are imported or fetched by their name as a string.
eckart/linalg, which ruff exempts from the whole table, is held here to everything but the entries about eckart.linalg.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

METHODS = frozenset(
    {"svd", "qr", "cholesky", "cholesky_solve", "cholesky_inverse", "eig", "eigh", "symeig"}
    | {"lstsq", "lu", "lu_solve", "geqrf", "orgqr", "ormqr", "inverse", "pinverse"}
)
# keyword -> the only constant that may be passed
KEYWORDS = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}
IMPORTERS = frozenset({"importlib.import_module", "__import__"})


def banned_table(root: Path) -> dict[str, str]:
    """Dotted name -> reason, from pyproject.toml."""
    tool = tomllib.loads((root / "pyproject.toml").read_text())["tool"]
    return {name: entry["msg"] for name, entry in tool["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"].items()}


def about_linalg(reason: str) -> bool:
    """Whether an entry of the table exists to keep factorisations in eckart.linalg."""
    return "eckart.linalg" in reason


class _Names(ast.NodeVisitor):
    """What each imported name of a file stands for: {"np": "numpy", "svd": "torch.svd"}."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for a in node.names:
            self.of[a.asname or a.name.split(".")[0]] = a.name if a.asname else a.name.split(".")[0]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = "." * node.level + (node.module or "")
        for a in node.names:
            self.of[a.asname or a.name] = f"{base}.{a.name}"


def _dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    """The full dotted name of an expression that starts at an import, else None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def check_source(text: str, table: dict[str, str], *, in_linalg: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, message) for every ban that a file breaks.

    Args:
        text: the source.
        table: dotted name -> reason.
        in_linalg: the file is in eckart/linalg, where factorisations are allowed.
    """
    tree = ast.parse(text)
    visitor = _Names()
    visitor.visit(tree)
    names = visitor.of
    active = {k: v for k, v in table.items() if not (in_linalg and about_linalg(v))}

    def ban(name: str) -> str | None:
        hit = next((b for b in active if name == b or name.startswith(b + ".")), None)
        return hit and f"`{name}` is banned: {active[hit]}"

    for node in ast.walk(tree):
        found: list[str | None] = []
        if isinstance(node, ast.Import):
            found += [ban(a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [ban(f"{node.module}.{a.name}") for a in node.names]
        elif isinstance(node, ast.Attribute):
            name = _dotted(node, names)
            # only the shortest banned prefix, so that torch.linalg.svd is told once
            if name and not (isinstance(node.value, ast.Attribute) and ban(_dotted(node.value, names) or "")):
                found.append(ban(name))
        elif isinstance(node, ast.Call):
            found += _call(node, names, ban, in_linalg)
        elif isinstance(node, ast.Dict):
            found += [_keyword(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
        elif isinstance(node, ast.Assign):
            keys = [t.slice.value for t in node.targets if isinstance(t, ast.Subscript) and isinstance(t.slice, ast.Constant)]
            found += [_keyword(k, node.value) for k in keys]
        yield from ((getattr(node, "lineno", 0), message) for message in found if message)


def _call(node: ast.Call, names: dict[str, str], ban, in_linalg: bool) -> Iterator[str | None]:
    for k in node.keywords:
        yield _keyword(k.arg, k.value)
    func = node.func
    target = _dotted(func, names) or (func.id if isinstance(func, ast.Name) else None)
    if target in IMPORTERS and node.args and isinstance(node.args[0], ast.Constant):
        yield ban(str(node.args[0].value))
    if target == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
        base = _dotted(node.args[0], names)
        yield ban(f"{base}.{node.args[1].value}") if base else None
    # a name that starts at an import is a function of a module (linalg.svd), judged by the table; the rest are methods of values
    if isinstance(func, ast.Attribute) and func.attr in METHODS and not in_linalg and _dotted(func, names) is None:
        yield f"method `.{func.attr}(` is banned: call eckart.linalg, dense factorisations live there only"


def _keyword(key: object, value: ast.expr) -> str | None:
    if not isinstance(key, str) or key not in KEYWORDS:
        return None
    allowed = KEYWORDS[key]
    if isinstance(value, ast.Constant) and value.value is allowed:
        return None
    return f"`{key}` may only be {allowed} here: no foreign code is run or unpickled"


def check_tree(root: Path) -> list[str]:
    """One line per broken ban in ROOT/eckart, sorted."""
    table = banned_table(root)
    out = []
    for path in sorted((root / "eckart").rglob("*.py")):
        where = path.relative_to(root).as_posix()
        for line, message in check_source(path.read_text(), table, in_linalg=where.startswith("eckart/linalg/")):
            out.append(f"{where}:{line}: {message}")
    return out


def main(argv: list[str]) -> int:
    problems = check_tree(Path(argv[0]) if argv else Path(__file__).resolve().parent.parent)
    print("\n".join(problems) if problems else "bans: none broken")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
