"""`inspect`: spectra of every weight matrix, and the numbers read off them. Reads, never writes into a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..axes.protocols import Site
from ..errors import UsageError, did_you_mean
from ..measures.base import Record, WeightView
from ..progress import track
from ..registry import get_object, list_entries
from .host import Host, open_host
from .output import versions


@dataclass(frozen=True)
class Report:
    """What `inspect` returns.

    Args:
        records: one per module and measure.
        report: plain data for the HTML page.
    """

    records: tuple[Record, ...]
    report: dict[str, Any]

    def save_html(self, path: str | Path, *, overwrite: bool = False) -> None:
        """The self-contained page, with its data as JSON of the same name beside it; an existing one is kept unless `overwrite`."""
        from ..report.html import save

        save(self.report, path, overwrite=overwrite)

    def save_json(self, path: str | Path) -> None:
        """All records as JSON."""
        Path(path).write_text(json.dumps([asdict(r) for r in self.records], indent=1) + "\n", encoding="utf-8")


def inspect(model: Any, measures: Sequence[str] | None = None, *, only: Sequence[str] = ()) -> Report:
    """Measure the weights of a model, one matrix in memory at a time.

    Args:
        model: folder, Hub id, or module.
        measures: names from `eckart ls --kind measure`; None takes all.
        only: regular expressions of module names; empty takes every linear layer.

    Returns:
        `Report` with `.records`, `.save_html()`, `.save_json()`.

    Raises:
        UsageError: an unknown measure.

    Example:
        >>> import torch
        >>> found = inspect(torch.nn.Sequential(torch.nn.Linear(8, 8)), ["stable_rank"])
        >>> 1 <= found.records[0].value <= 8
        True
    """
    import re

    known = [e.name for e in list_entries("measure")]
    for name in measures or ():
        if name not in known:
            raise UsageError(f"there is no measure {name!r}.{did_you_mean(name, known)} There are: {', '.join(known)}.")
    chosen = [get_object(n) for n in (measures or known)]
    host = open_host(model)
    sites = [s for s in host.catalogue.sites if s.kind == "linear" and (not only or any(re.search(p, s.name) for p in only))]
    records: list[Record] = []
    layers: list[dict[str, Any]] = []
    warnings: list[str] = []
    for site in track(sites, "inspecting"):
        found, note = _site(host, site, chosen)
        records += found
        if note:
            warnings.append(note)
        layers.append(_layer(site, found, note))
    return Report(tuple(records), _report(host, layers, warnings, [m.name for m in chosen]))


def _site(host: Host, site: Site, chosen: Sequence[Any]) -> tuple[list[Record], str]:
    """Records of one matrix; a matrix without a spectrum gives records that say why."""
    import torch

    weight = host.read(site)
    bad = int((~torch.isfinite(weight)).sum()) if weight.is_floating_point() else 0
    why = f"{bad} values are NaN or Inf" if bad else "" if weight.is_floating_point() else f"stored as {weight.dtype}, not as real numbers"
    if why:
        return [m.missing(site.name, why) for m in chosen], f"{site.name}: {why}; not measured."
    view = WeightView(site, lambda _: weight)
    return [m.of(view) for m in chosen], ""


def _layer(site: Site, records: Sequence[Record], note: str) -> dict[str, Any]:
    size = site.shape[0] * site.shape[1]
    row: dict[str, Any] = {
        "name": site.name, "block": site.block, "role": site.role, "shape": list(site.shape), "rank": None, "state": "skipped" if note else "dense",
        "reason": note, "params_before": size, "params_after": size,
    }  # fmt: skip
    numbers: dict[str, float | None] = {}
    for record in records:
        if record.measure == "spectrum" and record.valid:
            row |= record.value
        elif record.measure == "energy_ranks":
            shares = record.settings["shares"]
            numbers |= {
                f"rank at {share:.0%} energy": value for share, value in zip(shares, record.value or [None] * len(shares), strict=True)
            }
        elif record.measure != "spectrum":
            numbers[record.measure.replace("_", " ")] = record.value
    return row | {"measures": numbers or None}


def _report(host: Host, layers: list[dict[str, Any]], warnings: list[str], names: Sequence[str]) -> dict[str, Any]:
    verdict = [f"{len(layers)} linear matrices hold {sum(x['params_before'] for x in layers):,} of {host.parameters():,} parameters."]
    shares = [
        (x["measures"]["effective rank"] / min(x["shape"]), x["name"]) for x in layers if (x.get("measures") or {}).get("effective rank")
    ]
    if shares:
        low, high = min(shares), max(shares)
        verdict.append(f"Effective rank, as a share of the largest possible: from {low[0]:.2f} ({low[1]}) to {high[0]:.2f} ({high[1]}).")
        verdict.append(
            "Spectra of weights alone do not say what a cut costs: inputs decide. `eckart compress --dry-run=spectra` with calibration text does."
        )
    notes = [{"title": e.title, "text": e.summary, "href": _link(e.paper)} for e in list_entries("measure") if e.name in names]
    return {
        "format": 1, "kind": "inspect", "title": f"{host.name} · spectra", "verdict": verdict,
        "model": {"name": host.name, "path": str(host.path or host.name), "parameters": host.parameters(), "bytes": host.reader.nbytes},
        "layers": layers, "warnings": warnings, "notes": notes, "versions": versions(),
    }  # fmt: skip


def _link(paper: str) -> str | None:
    """The address of a paper."""
    kind, _, rest = paper.partition(":")
    return {"arXiv": f"https://arxiv.org/abs/{rest}", "doi": f"https://doi.org/{rest}", "https": paper}.get(kind)
