"""Import floors of `eckart/`, and the size of each folder. Run: `python scripts/check_floors.py [ROOT]`; exit 1 names every place.

A file imports only from its own folder and from floors below. Imports inside functions count; imports under `if TYPE_CHECKING:` do not.
A recipe or measure imports no other one. No file is longer than 500 lines.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HARD_STOP = 500  # lines in one file

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "seeds", "progress", "modes", "axes.protocols", "assets", "_version"}),
    frozenset({"linalg", "store", "engine"}),
    # report turns plain dicts into pages and knows of nothing above `errors`, so verbs may write one into the folder they make
    frozenset({"catalogue", "data", "stats", "spectra", "quant", "nn", "report"}),
    frozenset({"axes"}),
    frozenset({"recipes", "measures", "optim", "init", "estimators", "experiments", "registry"}),
    frozenset({"plan", "runners", "verbs"}),
    frozenset({"hub", "cli"}),
    frozenset({"__init__", "__main__"}),
)
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}
MUTUAL = frozenset({0, 5, 6})  # floors whose units may import each other
APART = frozenset({"recipes", "measures", "optim", "init", "estimators", "experiments"})  # files that know nothing of each other

# Whoever loads a model must know how transformers names things, which is hub's business. verbs/host.py is the one place below
# the hub that asks for it, and only when a verb is called with a folder instead of a model: inside functions, never at import.
LAZY_EXCEPTIONS = {("verbs/host.py", "hub")}


@dataclass(frozen=True)
class Import:
    """One import of an eckart module: where it stands and what it names."""

    line: int
    module: str  # dotted, without the leading "eckart.": "linalg.svd", "" for the package itself
    lazy: bool


def unit_of(module: str) -> str:
    """The unit that a module belongs to: its folder or top-level file, or "axes.protocols" which stands apart."""
    parts = module.split(".")
    return "axes.protocols" if parts[:2] == ["axes", "protocols"] else parts[0] or "__init__"


def imports(text: str, module: str, is_package: bool, known: frozenset[str]) -> Iterator[Import]:
    """Yield every import of an eckart module.

    Args:
        text: the source.
        module: its dotted name without the leading "eckart.", "" for eckart/__init__.py.
        is_package: whether it is an `__init__.py`.
        known: all modules of the package, to tell `from . import module` from `from . import name`.
    """
    here = ["eckart", *(module.split(".") if module else [])]
    if not is_package:
        here = here[:-1]

    def resolve(node: ast.ImportFrom) -> str | None:
        if not node.level:
            return node.module
        base = here[: len(here) - (node.level - 1)]
        return ".".join([*base, *([node.module] if node.module else [])])

    def inside(name: str | None) -> str | None:
        return None if name is None or name.split(".")[0] != "eckart" else name[7:]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and _is_type_checking(child.test):
                for other in child.orelse:
                    yield from walk(ast.Module([other], []), lazy)
                continue
            if isinstance(child, ast.Import):
                yield from (Import(child.lineno, m, lazy) for a in child.names if (m := inside(a.name)) is not None)
            elif isinstance(child, ast.ImportFrom) and (base := inside(resolve(child))) is not None:
                for a in child.names:
                    if not base and a.name.startswith("__"):
                        continue  # `from . import __version__`: bound before anything else of the package
                    full = f"{base}.{a.name}" if base else a.name
                    yield Import(child.lineno, full if full in known else base, lazy)
            elif isinstance(child, ast.Call) and (name := _by_name(child)) is not None:
                level = len(name) - len(name.lstrip("."))
                full = name if not level else ".".join([*here[: len(here) - (level - 1)], *filter(None, [name[level:]])])
                if (m := inside(full)) is not None:
                    yield Import(child.lineno, m, lazy)
            yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(ast.parse(text), False)


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING")


def _by_name(call: ast.Call) -> str | None:
    """The module that `import_module("...")` or `__import__("...")` names."""
    func = call.func
    name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else None
    if (
        name in ("import_module", "__import__")
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    ):
        return call.args[0].value
    return None


def check(where: str, module: str, found: Import) -> str | None:
    """What is wrong with an import, or None.

    Args:
        where: path of the file inside eckart/.
        module: its dotted name without the leading "eckart.".
        found: the import.
    """
    mine, theirs = unit_of(module), unit_of(found.module)
    for unit in (mine, theirs):
        if unit not in FLOOR:
            return f"{where}:{found.line}: no floor is declared for `{unit}`; add it to FLOORS in scripts/check_floors.py"
    if mine == theirs:
        apart = mine in APART and _name(module) and _name(found.module) and module != found.module
        return f"{where}:{found.line}: imports eckart.{found.module}; files of `{mine}` know nothing of each other" if apart else None
    if mine == "axes.protocols" and theirs == "axes":
        return f"{where}:{found.line}: imports eckart.{found.module}; axes/protocols stands on floor 0"
    if found.lazy and (where, theirs) in LAZY_EXCEPTIONS:
        return None
    above, here = FLOOR[theirs], FLOOR[mine]
    if above < here or (above == here and here in MUTUAL):
        return None
    how = "a floor above" if above > here else "a neighbour on the same floor"
    return f"{where}:{found.line}: `{mine}` (floor {here}) imports eckart.{found.module} (floor {above}), {how}"


def _name(module: str) -> bool:
    """Whether a module is a system of its own, not a package's `__init__`, `base.py` or a private file."""
    parts = module.split(".")
    depth = 3 if parts[0] == "recipes" else 2
    return len(parts) >= depth and parts[depth - 1] != "base" and not parts[depth - 1].startswith("_")


def modules(package: Path) -> dict[str, Path]:
    """Dotted name without "eckart." -> file, sorted."""
    out: dict[str, Path] = {}
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package).with_suffix("").parts)
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def check_tree(root: Path) -> list[str]:
    """One line per broken rule in ROOT/eckart."""
    package = root / "eckart"
    files = modules(package)
    known = frozenset(files) | {".".join(p.relative_to(package).parts) for p in package.rglob("*") if p.is_dir()}
    problems = []
    for module, path in files.items():
        where, text = path.relative_to(package).as_posix(), path.read_text()
        if (unit := unit_of(module)) not in FLOOR:
            problems.append(f"{where}: no floor is declared for `{unit}`; add it to FLOORS in scripts/check_floors.py")
            continue
        if (lines := text.count("\n")) > HARD_STOP:
            problems.append(f"{where}: {lines} lines; the hard stop is {HARD_STOP}. Split it: one file, one idea")
        found = sorted(imports(text, module, path.name == "__init__.py", known), key=lambda i: i.line)
        problems += [p for p in dict.fromkeys(check(where, module, i) for i in found) if p]
    return problems


def table(root: Path) -> str:
    """Lines per folder: number of files, lines, median and largest file."""
    groups: dict[tuple[int, str], list[tuple[int, str]]] = {}
    for module, path in modules(root / "eckart").items():
        unit = unit_of(module)
        size = path.read_text().count("\n")
        if size:
            groups.setdefault((FLOOR.get(unit, -1), unit), []).append((size, path.relative_to(root / "eckart").as_posix()))
    rows = [f"{'floor':>5}  {'folder':<16}{'files':>6}{'lines':>8}{'median':>8}  largest"]
    for (floor, unit), files in sorted(groups.items()):
        files.sort()
        (largest, name), middle = files[-1], files[len(files) // 2][0]
        rows.append(f"{floor:>5}  {unit:<16}{len(files):>6}{sum(n for n, _ in files):>8}{middle:>8}  {name} {largest}")
    total = sum(n for files in groups.values() for n, _ in files)
    tests = sum(p.read_text().count("\n") for p in (root / "tests").rglob("*.py")) if (root / "tests").is_dir() else 0
    count = sum(len(f) for f in groups.values())
    rows.append(f"{'':>5}  {'all':<16}{count:>6}{total:>8}{'':>8}  tests: {tests} lines, {tests / max(total, 1):.2f} of the library")
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    root = Path(argv[0]) if argv else Path(__file__).resolve().parent.parent
    print(table(root))
    problems = check_tree(root)
    print("\n".join(problems) if problems else "floors: none broken")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
