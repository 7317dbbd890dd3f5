"""What a run leaves behind: a changed module, or a folder that loads."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..axes.border import to_dict, to_yaml
from ..axes.protocols import Bundle, Edits
from ..axes.recipe import Recipe
from ..axes.solve import adds_bias
from ..engine import Engine
from ..plan import Job, Plan
from ..progress import track
from ..runners.whole import Cut, Places
from ..store import Row, TensorSpec, Writer, account, copied, dropped, lay_out, transformed
from ..store.journal import Entry

if TYPE_CHECKING:
    from torch import nn

    from .host import Host

Cuts = Callable[[frozenset[str], Places, str], Iterable[Cut]]
MAX_SHARD = 2 << 30  # bytes of tensors per file


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import torch

    found = {"eckart": version("eckart"), "torch": str(torch.__version__), "python": platform.python_version()}
    for name in ("safetensors", "transformers"):
        try:
            found[name] = version(name)
        except ImportError:
            continue
    return found


def apply_edits(model: nn.Module, job: Job, edits: Edits) -> None:
    """Put the tensors of one job into a model in memory."""
    import torch

    from ..nn import LowRankLinear
    from ..nn.surgery import replace_linear

    device = next(model.parameters()).device
    tensors = {k: v.to(device) for k, v in edits.tensors.items()}
    base = job.tensors[0].removesuffix(".weight")
    if f"{base}.up.weight" in tensors:
        pair = LowRankLinear.from_factors(tensors[f"{base}.up.weight"], tensors[f"{base}.down.weight"], tensors.get(f"{base}.up.bias"))
        replace_linear(model, job.name, pair)
        return
    module = model.get_submodule(job.name)
    with torch.no_grad():
        for key, value in tensors.items():
            last = key.rpartition(".")[2]
            old = getattr(module, last)
            if old is None:  # a bias that the metric adds
                setattr(module, last, torch.nn.Parameter(value))
            else:
                old.copy_(value)


@dataclass(frozen=True)
class Folder:
    """What a run will write, known before the first byte: every tensor in the order of the source, and what becomes of each.

    Args:
        specs: tensors of the output.
        rows: transformed, copied and dropped ones, with reasons.
        copied: keys that no job touches.
        writes: job -> the tensors that it writes.
    """

    specs: tuple[TensorSpec, ...]
    rows: tuple[Row, ...]
    copied: tuple[str, ...]
    writes: Mapping[str, tuple[str, ...]]


def lay_out_folder(reader: Any, recipe: Recipe, plan: Plan, bundles: Sequence[Bundle]) -> Folder:
    """The folder of a plan whose ranks are decided."""
    states = {j.name: j for j in plan.jobs}
    new: dict[str, list[TensorSpec]] = {}
    gone: dict[str, str] = {}
    writes: dict[str, tuple[str, ...]] = {}
    for bundle in bundles:
        job, site = states[bundle.name], bundle.site
        if job.state != "factored" or job.rank is None:
            continue
        made = recipe.form.layout_of(bundle, job.rank, adds_bias(recipe))
        new[site.tensors[0]] = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in made.items()]
        writes[bundle.name] = tuple(made)
        if site.bias:
            gone[site.bias] = "" if site.bias in made else f"moved to {site.tensors[0].removesuffix('weight')}up.bias"
    specs: list[TensorSpec] = []
    rows: list[Row] = []
    copies: list[str] = []
    by_weight = {b.site.tensors[0]: b.site for b in bundles}
    for key in reader:
        if key in new:
            sources = [k for k in (key, by_weight[key].bias) if k and not gone.get(k)]
            specs += new[key]
            rows += [transformed(s.name, sources) for s in new[key]]
        elif key in gone:
            rows += [dropped(key, gone[key])] if gone[key] else []
        else:
            info = reader.info(key)
            specs.append(TensorSpec(key, info.dtype, tuple(info.shape)))
            rows.append(copied(key))
            copies.append(key)
    return Folder(tuple(specs), tuple(rows), tuple(copies), writes)


def batches_of(keys: Sequence[str], reader: Any, most: int = 256 << 20) -> list[list[str]]:
    """Keys in runs of at most `most` bytes: every job costs two syncs of the disk, and a kill costs one job."""
    out: list[list[str]] = []
    size = most
    for key in keys:
        nbytes = reader.info(key).nbytes
        if size + nbytes > most:
            out.append([])
            size = 0
        out[-1].append(key)
        size += nbytes
    return out


def quantization_config(recipe: Recipe, jobs: Iterable[Job], bundles: Sequence[Bundle]) -> dict[str, Any]:
    """What `config.json` says of the pairs, for the loader."""
    ranks = {j.name: j.rank for j in jobs if j.state == "factored"}
    by_name = {b.name: b for b in bundles}
    added = {name: True for name in ranks if adds_bias(recipe) and by_name[name].site.bias is None}
    config = {"quant_method": "eckart", "format_version": 1, "ranks": ranks, "recipe": recipe.name}
    return config | ({"bias": added} if added else {})


def write_folder(
    out: Path, host: Host, recipe: Recipe, plan: Plan, bundles: Sequence[Bundle], cuts: Cuts, finish: Callable[[Mapping[str, Any]], dict[str, Any]],
    *, engine: Engine, identity: Mapping[str, str], overwrite: bool, max_shard_bytes: int = MAX_SHARD, resume: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Write the compressed checkpoint: all of it or nothing, resumable, every tensor accounted for.

    Args:
        out: folder to create.
        host: the source; tensors that no job touches are copied byte for byte.
        recipe, plan, bundles: the run, ranks decided.
        cuts: called with the names of jobs already stored, the places of their tensors and the folder of the shards; yields the others,
            and may yield those again.
        finish: records by job name -> the report.
        engine: in a process that does not lead, jobs are run and nothing else is done.
        identity: what a resume must agree with.
        overwrite: swap an existing folder for the new one at the end.
        max_shard_bytes: size at which a new file begins.
        resume: the command that goes on after an interruption.

    Returns:
        The report.
    """
    folder = lay_out_folder(host.reader, recipe, plan, bundles)
    if not engine.leads:
        places = {job: {n: lay_out(folder.specs, max_shard_bytes).places[n] for n in names} for job, names in folder.writes.items()}
        done, shards = engine.share(list)
        for _ in cuts(frozenset(done), places, shards):
            pass
        return engine.share(dict)
    with Writer(out, folder.specs, fingerprint=identity, overwrite=overwrite, max_shard_bytes=max_shard_bytes, resume=resume) as writer:
        places = {job: {n: writer.layout.places[n] for n in names} for job, names in folder.writes.items()}
        done, shards = engine.share(lambda: [sorted(writer.done), str(writer.shards)])
        for cut in cuts(frozenset(done), places, shards):
            if isinstance(cut, Entry):
                writer.adopt(cut)
            else:
                job, edits = cut
                writer.put(job.name, edits.tensors, record=dict(edits.record))
        for keys in track(batches_of(folder.copied, host.reader), "copying"):
            if f"copy {keys[0]}" not in writer.done:
                writer.copy(f"copy {keys[0]}", host.reader, keys)
        return engine.share(lambda: _commit(writer, host, recipe, plan, bundles, folder, finish))


def _commit(
    writer: Writer, host: Host, recipe: Recipe, plan: Plan, bundles: Sequence[Bundle], folder: Folder, finish: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """Report, config, manifest and side files, then the rename that makes it the output."""
    from ..report.card import model_card
    from ..report.html import render, to_json

    report = finish({j.name: writer.records[j.name] for j in plan.jobs if j.state == "factored"})
    lasting = {k: v for k, v in report.items() if k not in ("timings", "command")}  # equal runs give equal files; clocks go to the notes
    config = dict(host.reader.config)
    if recipe.form.layout == "factored" and any(j.state == "factored" for j in plan.jobs):
        config["quantization_config"] = quantization_config(recipe, plan.jobs, bundles)
    side = host.side_files() | {
        "eckart.yaml": to_yaml(recipe).encode(),
        "report.json": to_json(lasting).encode(),
        "README.md": model_card(lasting).encode(),
    }
    notes = {
        "run.json": (json.dumps({"timings": report.get("timings", {}), "command": report.get("command")}, indent=1) + "\n").encode(),
        "report.html": render(report).encode(),
    }
    manifest = account(host.reader, folder.rows, recipe=to_dict(recipe), seed=plan.seed, versions=versions())
    writer.commit(config, manifest, side, notes)
    return report
