"""Finished statistics: looked up by need and site, saved and loaded with the fingerprint of what they were measured on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.protocols import Site, Stat
from ..errors import Refused
from .moments import ROWS, WIDTH_OF_F64_PRODUCTS, Centred, Moments
from .record import Part, Sums
from .slots import key_of, place_of, settle, slots_for

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics of a model on calibration text. Sums, not activations. They cannot be extended: merge parts before they are finished.

    Args:
        values: `Moments`, or (count, float64 vector), by key; a count of 0 where calibration never came by.
        sites: for each site's name, the id of its input.
        fingerprint: of model, data and needs: "model=... data=... needs=...".
        auto: the probe that "auto" stood for.
    """

    values: Mapping[str, Moments | tuple[float, Tensor]]
    sites: Mapping[str, str]
    fingerprint: str
    auto: str

    @classmethod
    def build(cls, parts: Mapping[str, Part | None], sites: Mapping[str, str], fingerprint: str, auto: str) -> Stats:
        """From the sums of a whole pass."""
        values: dict[str, Moments | tuple[float, Tensor]] = {}
        for key in sorted(parts):
            part = parts[key]
            if isinstance(part, Centred):
                values[key] = part.moments()
            elif isinstance(part, Sums):
                values[key] = (part.count, part.total / part.count)
            else:
                values[key] = (0.0, torch.zeros(0, dtype=torch.float64))
        return cls(values, dict(sites), fingerprint, auto)

    def _key(self, stat: Stat, site: Site) -> str:
        settled = settle(stat, self.auto)
        where = self.sites.get(site.name, place_of(settled, site)) if settled.at == "in" else site.name
        return key_of(settled, where)

    def has(self, stat: Stat, site: Site) -> bool:
        """Whether `get` would return a value."""
        value = self.values.get(self._key(stat, site))
        return value is not None and (value.count if isinstance(value, Moments) else value[0]) > 0

    def get(self, stat: Stat, site: Site) -> Any:
        """`Moments` for "moments"; for "absmean" the mean of |x| and for "fisher" the mean over samples (or batches), (n,) float64.

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
        value = self.values.get(found[0]) if found else None
        if value is None:
            raise Refused(f"{site.name}: nothing was measured there.")
        return value.count if isinstance(value, Moments) else value[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(t.numel() * 8 for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for key, value in self.values.items():
            if isinstance(value, Moments):
                count, named = value.count, {"total": value.total, "gram": value.gram}
            else:
                count, named = value[0], {"mean": value[1]}
            out[f"{key}|count"] = torch.tensor(count, dtype=torch.float64)
            out.update({f"{key}|{name}": t for name, t in named.items() if t.numel()})
        return out

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all; the same statistics give the same bytes.

        Args:
            path: the file; an existing one is replaced.
        """
        from safetensors.torch import save

        path = Path(path)
        # one metadata entry: safetensors keeps several in no fixed order
        meta = {"format": FORMAT, "fingerprint": self.fingerprint, "auto": self.auto, "sites": self.sites}
        raw = save({k: t.contiguous() for k, t in self._tensors().items()}, metadata={"eckart.stats": json.dumps(meta, sort_keys=True)})
        work = path.with_name(path.name + ".part")
        with open(work, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)

    @classmethod
    def load(cls, path: str | Path, fingerprint: str | None = None) -> Stats:
        """Read statistics back.

        Args:
            path: a file that `save` wrote.
            fingerprint: what the statistics must have been measured on; None accepts any.

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
                names = set(file.keys())
                tensors = {n: file.get_tensor(n) for n in names}
            form, mark, auto, sites = meta["format"], meta["fingerprint"], meta["auto"], meta["sites"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise Refused(f"{path}: expected a statistics file of eckart, found something else ({error}). Collect again.") from error
        if form != FORMAT:
            raise Refused(f"{path}: expected format {FORMAT}, found {form!r}. Collect again.")
        if fingerprint is not None:
            _refuse_other(path, fingerprint, mark)
        return cls(_values(path, tensors), sites, mark, auto)


def _refuse_other(path: Path, expected: str, found: str) -> None:
    want, have = _parts(expected), _parts(found)
    names = {"model": "another model", "data": "other calibration data", "needs": "other statistics, layers or seed"}
    for name in sorted(want.keys() | have.keys(), key=lambda n: (list(names).index(n) if n in names else len(names), n)):
        if want.get(name) != have.get(name):
            what = names.get(name, "something else")
            raise Refused(f"{path}: measured on {what} ({name}: expected {want.get(name)}, found {have.get(name)}). Collect again.")


def _parts(mark: str) -> dict[str, str]:
    return {name: value for name, _, value in (part.partition("=") for part in mark.split())}


def _values(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Moments | tuple[float, Tensor]]:
    out: dict[str, Moments | tuple[float, Tensor]] = {}
    for name in sorted(tensors):
        key, _, part = name.rpartition("|")
        if part != "count":
            continue
        found = {p: tensors.get(f"{key}|{p}") for p in ("total", "gram", "mean")}
        total, gram, mean = found["total"], found["gram"], found["mean"]
        good = all(t.dtype == torch.float64 and bool(torch.isfinite(t).all()) for t in (tensors[name], total, gram, mean) if t is not None)
        if not good or tensors[name].numel() != 1:
            raise Refused(f"{path}: {key} is damaged: expected finite float64 values. Collect again.")
        count = tensors[name].item()
        if total is not None and gram is not None and gram.shape == (len(total), len(total)):
            out[key] = Moments(count, total, gram)
        elif total is None and gram is None and (mean is not None or count == 0):
            out[key] = (count, torch.zeros(0, dtype=torch.float64) if mean is None else mean)
        else:
            raise Refused(f"{path}: {key} is incomplete. Collect again.")
    return out


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
    total = sum(s.nbytes for s in slots_for(needs, sites, "auto"))
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
