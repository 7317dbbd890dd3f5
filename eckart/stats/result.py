"""Finished statistics: looked up by need and site, saved and loaded with the fingerprint of what they were measured on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.protocols import Site, Stat
from ..errors import Refused
from .moments import ROWS, WIDTH_OF_F64_PRODUCTS, Centred, Moments
from .record import Part
from .shelf import PARTS, Shelf, Value, on_disk, parts_of, shapes_of, value_from
from .slots import key_of, place_of, settle, slots_for

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics of a model on calibration text. Sums, not activations. They cannot be extended: merge parts before they are finished.

    Args:
        values: `Moments`, or (count, float64 vector), by key; a count of 0 where calibration never came by. A `Shelf` where they are too large
            for memory.
        sites: for each site's name, the id of its input.
        fingerprint: of model, data and needs: "model=... data=... needs=...".
        auto: the probe that "auto" stood for.
    """

    values: Mapping[str, Value]
    sites: Mapping[str, str]
    fingerprint: str
    auto: str

    @classmethod
    def build(cls, parts: Mapping[str, Part | None], sites: Mapping[str, str], fingerprint: str, auto: str) -> Stats:
        """From the sums of a whole pass."""
        return cls({key: value_of(parts[key]) for key in sorted(parts)}, dict(sites), fingerprint, auto)

    def _key(self, stat: Stat, site: Site) -> str:
        settled = settle(stat, self.auto)
        where = self.sites.get(site.name, place_of(settled, site)) if settled.at == "in" else place_of(settled, site)
        return key_of(settled, where)

    def has(self, stat: Stat, site: Site) -> bool:
        """Whether `get` would return a value."""
        return (self._count(self._key(stat, site)) or 0) > 0

    def get(self, stat: Stat, site: Site) -> Any:
        """`Moments` for "moments"; for "absmean" the mean of |x|, for others the mean over samples (or batches), a float64 vector.

        Raises:
            Refused: it was not measured there, or calibration never reached the site.
        """
        key = self._key(stat, site)
        value = self.values.get(key)
        what = f"{stat.kind} at {stat.at!r} via {stat.via}"
        if value is None:
            raise Refused(f"{site.name}: {what} was not measured. Collect again with this need and site.")
        if isinstance(value, Moments):
            return value
        if value[0] == 0:
            why = "the probe's gradient" if stat.via == "backward" else "calibration"
            remedy = "Use other or more texts, or leave the layer out (target.skip)."
            raise Refused(f"{site.name}: {why} never reached this layer, so there is no {what}. {remedy}")
        return value[1]

    def count(self, site: Site, stat: Stat | None = None) -> float:
        """Sum of the weights of the rows behind a statistic of the site: tokens at "in" or "out", samples or batches for "fisher".

        Args:
            site: the site.
            stat: which; by default the first one that was measured there, forward ones before backward ones.

        Raises:
            Refused: nothing was measured there.
        """
        places = {site.name, self.sites.get(site.name, site.name)}
        found = [k for k in self.values if k.rsplit("|", 1)[1] in places] if stat is None else [self._key(stat, site)]
        found.sort(key=lambda k: ("|backward|" in k, k.rsplit("|", 1)[1] != self.sites.get(site.name)))
        count = self._count(found[0]) if found else None
        if count is None:
            raise Refused(f"{site.name}: nothing was measured there.")
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return 8 * sum(prod(shape) for shape in self._shapes().values())

    def _count(self, key: str) -> float | None:
        if isinstance(self.values, Shelf) and key in self.values:
            return self.values.read(f"{key}|count").item()
        value = self.values.get(key)
        return value.count if isinstance(value, Moments) else None if value is None else value[0]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if isinstance(self.values, Shelf):
            return self.values.shapes
        return {name: shape for key, value in self.values.items() for name, shape in shapes_of(key, value).items()}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all, a value at a time; the same statistics give the same bytes.

        Args:
            path: the file; an existing one is replaced.
        """
        from ..store.dtypes import to_bytes
        from ..store.header import build_header

        path = Path(path)
        # one metadata entry: safetensors keeps several in no fixed order
        meta = {"format": FORMAT, "fingerprint": self.fingerprint, "auto": self.auto, "sites": self.sites}
        shapes = self._shapes()
        names = sorted(shapes)  # of one type, so that this is the order of the safetensors package
        head = build_header([(n, "F64", shapes[n]) for n in names], {"eckart.stats": json.dumps(meta, sort_keys=True)})
        work = path.with_name(path.name + ".part")
        with open(work, "wb") as file:
            file.write(head)
            parts: dict[str, Tensor] = {}
            for name in names:
                if name not in parts:  # the tensors of a value follow each other
                    key = name.rpartition("|")[0]
                    parts = parts_of(key, self.values[key])
                file.write(to_bytes(parts[name]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)

    @classmethod
    def load(cls, path: str | Path, fingerprint: str | None = None, max_bytes: int | None = None) -> Stats:
        """Read statistics back.

        Args:
            path: a file that `save` wrote.
            fingerprint: what the statistics must have been measured on; None accepts any.
            max_bytes: values of more bytes in all stay in the file and are read when they are asked for; None takes all into memory.

        Raises:
            Refused: no such file, not such a file, or measured on another model, other data or for other needs (named).
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise Refused(f"{path}: this statistics file does not exist.")
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {})["eckart.stats"])
                shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118 - not a dict
            form, mark, auto, sites = meta["format"], meta["fingerprint"], meta["auto"], meta["sites"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise Refused(f"{path}: expected a statistics file of eckart, found something else ({error}). Collect again.") from error
        if form != FORMAT:
            raise Refused(f"{path}: expected format {FORMAT}, found {form!r}. Collect again.")
        if fingerprint is not None:
            _refuse_other(path, fingerprint, mark)
        shelf = Shelf(shapes, on_disk(path))
        large = max_bytes is not None and 8 * sum(map(prod, shapes.values())) > max_bytes
        values: dict[str, Value] = {}
        for key in shelf:
            value = _checked(path, key, shelf)
            if not large:
                values[key] = value
        return cls(shelf if large else values, sites, mark, auto)


def _refuse_other(path: Path, expected: str, found: str) -> None:
    want, have = _parts(expected), _parts(found)
    names = {"model": "another model", "data": "other calibration data", "needs": "other statistics, layers or seed"}
    for name in sorted(want.keys() | have.keys(), key=lambda n: (list(names).index(n) if n in names else len(names), n)):
        if want.get(name) != have.get(name):
            what = names.get(name, "something else")
            raise Refused(f"{path}: measured on {what} ({name}: expected {want.get(name)}, found {have.get(name)}). Collect again.")


def _parts(mark: str) -> dict[str, str]:
    return {name: value for name, _, value in (part.partition("=") for part in mark.split())}


def _checked(path: Path, key: str, shelf: Shelf) -> Value:
    parts = {p: shelf.read(f"{key}|{p}") for p in PARTS if f"{key}|{p}" in shelf.shapes}
    good = all(t.dtype == torch.float64 and bool(torch.isfinite(t).all()) for t in parts.values())
    if not good or parts["count"].numel() != 1:
        raise Refused(f"{path}: {key} is damaged: expected finite float64 values. Collect again.")
    try:
        return value_from(parts)
    except ValueError as error:
        raise Refused(f"{path}: {key} is incomplete. Collect again.") from error


def value_of(part: Part | None) -> Value:
    """The finished value of a sum; None where calibration never came by."""
    if isinstance(part, Centred):
        return part.moments()
    return (0.0, torch.zeros(0, dtype=torch.float64)) if part is None else (part.count, part.total / part.count)


def predict_bytes(needs: Iterable[Stat], sites: Collection[Site], *, leaves: int | None = None) -> int:
    """Bytes that the statistics of these needs take.

    Args:
        needs: as for `collect`.
        sites: as for `collect`.
        leaves: number of calibration batches: then the most that is held while collecting, when every level of the tree has a node
            and one more is being added.

    Returns:
        Bytes of the finished values (`Stats.nbytes` when calibration reaches every site), or the peak of the sums.
    """
    total = sum(s.nbytes for s in slots_for(needs, sites, "auto", propagated=True))
    return total if leaves is None else total * (max(leaves, 1).bit_length() + 1)


def fingerprint_of(model_id: str, data: str, run: Mapping[str, Any]) -> str:
    """ "model=... data=... needs=...": equal only for the same model, batches and their order, needs, sites and seed."""
    text = json.dumps({**run, "rows": ROWS, "f64": WIDTH_OF_F64_PRODUCTS, "format": FORMAT}, sort_keys=True)
    return f"model={_short(model_id)} data={data} needs={hashlib.sha256(text.encode()).hexdigest()}"


def _short(text: str) -> str:
    """The id itself when it is one word, else its sha256: spaces separate the parts of a fingerprint."""
    return text if text and not any(c.isspace() or c == "=" for c in text) else hashlib.sha256(text.encode()).hexdigest()


def batch_digest(batch: Any) -> str:
    """sha256 of the tensors of one batch."""
    digest = hashlib.sha256()
    if isinstance(batch, Tensor):
        items: list[tuple[str, Any]] = [("0", batch)]
    elif isinstance(batch, Mapping):
        items = sorted((str(k), v) for k, v in batch.items())
    elif isinstance(batch, tuple | list):
        items = [(str(i), v) for i, v in enumerate(batch)]
    else:
        items = [(n, getattr(batch, n, None)) for n in ("input_ids", "attention_mask", "weights")]
    for name, value in items:
        digest.update(name.encode())
        digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


def data_digest(digests: Iterable[str]) -> str:
    """sha256 of the digests of all batches, in order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def model_digest(model: nn.Module) -> str:
    """sha256 of every tensor of a model: names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous()
    return f"{data.dtype}{tuple(data.shape)}".encode() + data.reshape(-1).view(torch.uint8).numpy().tobytes()
