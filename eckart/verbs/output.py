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
from ..axes.pairs import base_of
from ..axes.protocols import Bundle, Made, Outcome, Site
from ..axes.recipe import Recipe
from ..axes.solve import adds_bias
from ..engine import Engine
from ..plan import Plan
from ..progress import track
from ..runners.whole import Cut, Places
from ..store import Row, TensorSpec, Writer, account, copied, dropped, lay_out, transformed
from ..store.journal import Entry

if TYPE_CHECKING:
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
    new: dict[str, list[tuple[str, Made]]] = {}
    gone: dict[str, str] = {}
    writes: dict[str, tuple[str, ...]] = {}
    for bundle, found in outcomes(recipe, plan, bundles):
        writes[bundle.name] = tuple(found.tensors)
        gone |= found.gone
        for name, made in found.tensors.items():  # beside the first of its sources
            new.setdefault(made.sources[0], []).append((name, made))
        gone |= {k: "" for k in bundle.keys if k not in found.gone}  # their names, if they still exist, are among the new ones
    specs: list[TensorSpec] = []
    rows: list[Row] = []
    copies: list[str] = []
    for key in reader:
        for name, made in new.get(key, ()):
            specs.append(TensorSpec(name, made.dtype, made.shape))
            rows.append(transformed(name, [k for k in made.sources if not gone.get(k)]))
        if gone.get(key):
            rows.append(dropped(key, gone[key]))
        elif key not in gone:
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


def changed(plan: Plan, bundles: Sequence[Bundle]) -> list[tuple[Bundle, int]]:
    """The bundles that are not left as they were, with their ranks."""
    ranks = {j.name: j.rank for j in plan.jobs if j.state == "factored"}
    return [(b, rank) for b in bundles if (rank := ranks.get(b.name)) is not None]


def outcomes(recipe: Recipe, plan: Plan, bundles: Sequence[Bundle]) -> list[tuple[Bundle, Outcome]]:
    """What becomes of every bundle that is not left as it was, those among it that stay dense and are stored in another type."""
    ranks = {b.name: r for b, r in changed(plan, bundles)}
    dense = {j.name for j in plan.jobs if j.state == "dense"}
    found = ((b, recipe.form.outcome(b, ranks[b.name], adds_bias(recipe)) if b.name in ranks else None) for b in bundles)
    every = [(b, made if made is not None or b.name not in dense else recipe.form.outcome_dense(b)) for b, made in found]
    return [(b, made) for b, made in every if made is not None]


def config_changes(
    recipe: Recipe, plan: Plan, bundles: Sequence[Bundle], config: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """What `config.json` says differently afterwards, the tables for our loader among it."""
    tables, other = recipe.form.config_of(changed(plan, bundles), adds_bias(recipe), config, records)
    if recipe.form.stored != "same":
        tables = tables | _integers(recipe, plan, bundles)
    if not tables:
        return other
    version = 3 if "torchao" in tables else 1 if set(tables) <= {"ranks", "bias"} else 2
    return other | {"quantization_config": {"quant_method": "eckart", "format_version": version, **tables, "recipe": recipe.name}}


def _integers(recipe: Recipe, plan: Plan, bundles: Sequence[Bundle]) -> dict[str, Any]:
    """The table of modules in integers, as the loader wants it."""
    from ..nn.quantised import GROUP

    names = [s.name for b, made in outcomes(recipe, plan, bundles) for s in b.sites if _has_integers(made, s)]
    return {"torchao": {"type": recipe.form.stored, "group_size": GROUP, "modules": names}} if names else {}


def _has_integers(made: Outcome, site: Site) -> bool:
    base = base_of(site)
    return any(f"{base}{part}.qdata" in made.tensors for part in ("", ".down", ".up"))


def stamps_of(reader: Any) -> dict[str, str]:
    """Which files a run reads: what a resume and a finished output must agree with, and no byte of the result depends on."""
    return {"source": reader.stamp}


def lasting_part(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without what may differ between runs with equal results: clocks, the command, and how statistics were taken."""
    notes = {note["text"] for note in report.get("notes", [])}
    kept = {k: v for k, v in report.items() if k not in ("timings", "command", "notes")}
    return kept | {"warnings": [w for w in report.get("warnings", []) if w not in notes]}


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
    with Writer(
        out, folder.specs, fingerprint=identity, stamps=stamps_of(host.reader), overwrite=overwrite, max_shard_bytes=max_shard_bytes, resume=resume
    ) as writer:  # fmt: skip
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

    report = finish({j.name: writer.records[j.name] for j in plan.jobs if j.name in folder.writes})
    lasting = lasting_part(report)
    config = dict(host.reader.config)
    config |= config_changes(recipe, plan, bundles, config, writer.records)
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
