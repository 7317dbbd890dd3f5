"""What became of every tensor of the source, with checksums of everything that was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import Refused, UsageError
from .header import TensorInfo
from .layout import TensorSpec
from .source import Source, infos_of

Action = Literal["transformed", "copied", "dropped"]
ACTIONS: tuple[Action, ...] = ("transformed", "copied", "dropped")


@dataclass(frozen=True)
class Row:
    """What became of tensors: one row per tensor of the output, and one per tensor that was dropped.

    Build rows with `transformed`, `copied` and `dropped`; the writer fills in type, shape, bytes and sha256.

    Args:
        name: of the tensor in the output; of the source's tensor when it was dropped.
        action: "transformed", "copied" (the same bytes) or "dropped".
        sources: the source's tensors that went into it.
        reason: in words; required when dropped.
        dtype, shape, bytes: of the tensor that the name names.
        sha256: of its bytes in the output; empty when dropped.
    """

    name: str
    action: Action
    sources: tuple[str, ...]
    reason: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class FileRow:
    """Bytes and sha256 of a file of the output."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `eckart.json`. Make one with `account`; the writer seals it.

    Args:
        source: what was read: id, fingerprint, number of tensors and their bytes.
        rows: see `Row`, sorted by name.
        recipe: the recipe as plain values.
        seed: of the run.
        versions: {library: version}.
        inputs: {name: fingerprint} of further inputs (another checkpoint, statistics).
        records: {job: its record}.
        fingerprint: of the run, named fields.
        files: {relative name: FileRow} of every file of the output but this one and notes.
        left_behind: {relative name: reason} of the source's files that were not carried over.
    """

    source: Mapping[str, Any]
    rows: tuple[Row, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    records: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fingerprint: Mapping[str, str] = field(default_factory=dict[str, str])
    files: Mapping[str, FileRow] = field(default_factory=dict[str, FileRow])
    left_behind: Mapping[str, str] = field(default_factory=dict[str, str])

    def count(self, action: Action) -> int:
        """Number of rows with an action."""
        return sum(row.action == action for row in self.rows)


def transformed(name: str, sources: Iterable[str], reason: str = "") -> Row:
    """A tensor of the output that was computed from these tensors of the source."""
    return Row(name, "transformed", tuple(sources), reason)


def copied(name: str, source: str | None = None, reason: str = "") -> Row:
    """A tensor of the output with the bytes of one tensor of the source, of the same name unless another is given."""
    return Row(name, "copied", (name if source is None else source,), reason)


def dropped(name: str, reason: str) -> Row:
    """A tensor of the source that the output does not have, and why."""
    return Row(name, "dropped", (name,), reason)


def account(
    reader: Source,
    rows: Iterable[Row],
    *,
    recipe: Mapping[str, Any] | None = None,
    seed: int = 0,
    versions: Mapping[str, str] | None = None,
    inputs: Mapping[str, str] | None = None,
    records: Mapping[str, Any] | None = None,
) -> Manifest:
    """A manifest in which every tensor of the source is accounted for.

    Args:
        reader: the source.
        rows: one per tensor of the output and one per dropped tensor.
        recipe, seed, versions, inputs, records: see `Manifest`.

    Raises:
        Refused: a tensor of the source is in no row, or a row names one that the source does not have.
    """
    infos = infos_of(reader)
    filled: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.name, row.action)):
        if row.action != "transformed" and row.sources and row.sources[0] in infos:
            info = infos[row.sources[0]]
            row = replace(row, dtype=info.dtype, shape=info.shape, bytes=info.nbytes)
        filled.append(row)
    check_accounts(filled, infos)
    source = {"id": reader.id, "fingerprint": reader.fingerprint, "tensors": len(infos), "bytes": reader.nbytes}
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed: expected an integer in [0, 2**63), found {seed}.")
    return Manifest(
        source=source,
        rows=tuple(filled),
        recipe=dict(recipe or {}),
        seed=seed,
        versions=dict(versions or {}),
        inputs=dict(inputs or {}),
        records=dict(records or {}),
        left_behind=dict(reader.left_behind),
    )


def check_rows(rows: Sequence[Row]) -> dict[str, Row]:
    """Check what can be checked without the source: no tensor twice, reasons given, what is dropped is used nowhere.

    Returns:
        {tensor of the source: a row that names it}.

    Raises:
        Refused: naming the first tensor for which that is not so.
    """
    used: dict[str, Row] = {}
    gone: dict[str, Row] = {}
    outputs: set[str] = set()
    for row in rows:
        where = f"manifest: tensor {row.name!r}"
        if row.action not in ACTIONS or not row.sources or (row.action != "transformed" and len(row.sources) != 1):
            raise Refused(f"{where}: {row.action} from {len(row.sources)} tensors is not possible.")
        if row.action == "dropped":
            if not row.reason or row.sources != (row.name,):
                raise Refused(f"{where}: dropped without a reason.")
            if row.name in gone:
                raise Refused(f"{where}: dropped twice.")
            gone[row.name] = row
            continue
        if row.name in outputs:
            raise Refused(f"{where}: appears twice.")
        outputs.add(row.name)
        for name in row.sources:
            used.setdefault(name, row)
    for name in gone:
        if name in used:
            raise Refused(f"manifest: tensor {name!r} is dropped and also used by {used[name].name!r}.")
    return used | gone


def check_accounts(rows: Sequence[Row], source: Mapping[str, TensorInfo]) -> None:
    """Check the rows against the source: every tensor of it is in a row, none is invented, copies have its type and shape.

    Raises:
        Refused: naming the first tensor for which that is not so.
    """
    named = check_rows(rows)
    for name, row in named.items():
        if name not in source:
            raise Refused(f"manifest: tensor {row.name!r}: made from {name!r}, which the source does not have.")
    for name in source:
        if name not in named:
            raise Refused(f"manifest: tensor {name!r} of the source is neither transformed, copied nor dropped.")
    for row in rows:
        info = source[row.sources[0]]
        if row.action != "transformed" and (row.dtype, row.shape, row.bytes) != (info.dtype, info.shape, info.nbytes):
            found = f"{info.dtype} {list(info.shape)}"
            raise Refused(
                f"manifest: tensor {row.name!r}: {row.action} as {row.dtype} {list(row.shape)}, but {info.name!r} of the source is {found}."
            )


def seal(
    manifest: Manifest,
    specs: Mapping[str, TensorSpec],
    digests: Mapping[str, str],
    written: Mapping[str, FileRow],
    fingerprint: Mapping[str, str],
    records: Mapping[str, Any],
) -> Manifest:
    """Fill in what the writer knows.

    Raises:
        UsageError: rows and layout disagree on which tensors there are, or on a copied one's type and shape.
    """
    rows: list[Row] = []
    for row in manifest.rows:
        if row.action != "dropped":
            if row.name not in specs:
                raise UsageError(f"manifest: tensor {row.name!r} is not in the layout.")
            spec = specs[row.name]
            if row.action == "copied" and (row.dtype, row.shape) != (spec.dtype, tuple(spec.shape)):
                found = f"{row.dtype} {list(row.shape)}"
                raise UsageError(f"manifest: tensor {row.name!r} is copied as {found}, the layout has {spec.dtype} {list(spec.shape)}.")
            row = replace(row, dtype=spec.dtype, shape=tuple(spec.shape), bytes=spec.nbytes, sha256=digests[row.name])
        rows.append(row)
    missing = specs.keys() - {row.name for row in rows if row.action != "dropped"}
    if missing:
        raise UsageError(f"manifest: tensor {min(missing)!r} of the layout has no row.")
    return replace(manifest, rows=tuple(rows), files=dict(written), fingerprint=dict(fingerprint), records={**records, **manifest.records})
