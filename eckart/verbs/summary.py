"""The report of a run as plain data: what the HTML page, `report.json`, the model card and the terminal show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..axes.border import to_yaml
from ..axes.protocols import Site
from ..axes.recipe import Recipe
from ..plan import Job, Plan
from .host import Host


def compress_report(
    plan: Plan, *, recipe: Recipe, host: Host, records: Mapping[str, Mapping[str, Any]], evaluation: Sequence[Mapping[str, Any]] = (),
    timings: Mapping[str, float] | None = None, command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """The report of a compression (or of its plan, while there are no records)."""
    from .output import versions

    sites = {s.name: s for s in host.catalogue.sites}
    layers = [_layer(job, sites[job.name], records.get(job.name, {})) for job in plan.jobs]
    layers += [_skipped(sites[name], why) for name, why in plan.skipped.items() if name in sites]
    total, size = host.parameters(), host.reader.nbytes
    width = {j.name: host.reader.info(j.tensors[0]).nbytes / max(1, j.before) for j in plan.jobs}
    dense_form = recipe.form.layout == "dense"
    after = plan.after
    if any(j.state == "undecided" for j in plan.jobs) and recipe.budget.kind == "keep":
        after = min(after, int(recipe.budget.value * plan.before))  # what the allocation may spend
    stored = plan.before if dense_form else after
    sizes = {
        "targeted_before": plan.before,
        "targeted_after": stored,
        "total_before": total,
        "total_after": total - plan.before + stored,
        "bytes_before": size,
        "bytes_after": size
        if dense_form
        else round(size - (plan.before - after) * sum(width[j.name] * j.before for j in plan.jobs) / plan.before),
    }
    report: dict[str, Any] = {
        "format": 1,
        "kind": "compress",
        "title": f"{host.name} · {recipe.name}",
        "verdict": _verdict(plan, sizes, dense_form, evaluation, bool(records) or not any(j.state == "factored" for j in plan.jobs)),
        "model": {"name": host.name, "path": str(host.path or host.name), "parameters": total, "bytes": size},
        "recipe": {"name": recipe.name, "title": recipe.title, "paper": recipe.paper, "fidelity": recipe.fidelity, "differs": recipe.differs, "yaml": to_yaml(recipe)},
        "budget": {str(recipe.budget.kind): recipe.budget.value},
        "form": recipe.form.layout,
        "command": command or None,
        "sizes": sizes,
        "layers": layers,
        "evaluation": [dict(row) for row in evaluation],
        "warnings": _warnings(plan, recipe, layers),
        "versions": versions(),
    }  # fmt: skip
    return report | ({"timings": {k: round(v, 3) for k, v in timings.items()}} if timings else {})


def _layer(job: Job, site: Site, record: Mapping[str, Any]) -> dict[str, Any]:
    why = "its pair would store at least as much as the matrix" if job.state == "dense" else ""
    certificate = record.get("certificate")
    row = {
        "name": job.name, "block": site.block, "role": site.role, "shape": list(job.shape), "rank": job.rank, "cap": job.cap,
        "state": "dense" if job.state == "dense" else "factored", "reason": why, "params_before": job.before, "params_after": job.after,
        "error": record.get("relative_error"), "certificate": {"kind": "free", **_plain(certificate)} if certificate else None,
    }  # fmt: skip
    if job.state == "undecided":
        row |= {"rank": job.cap, "reason": f"not decided yet: at most {job.cap}"}
    if record.get("spectrum"):
        row |= {
            "spectrum": list(record["spectrum"]),
            "spectrum_at": list(record["spectrum_at"]),
            "energy": 1 - record["relative_error"] ** 2,
        }
    return row


def _skipped(site: Site, why: str) -> dict[str, Any]:
    size = site.shape[0] * site.shape[1]
    return {
        "name": site.name, "block": site.block, "role": site.role, "shape": list(site.shape), "rank": None, "state": "skipped", "reason": why,
        "params_before": size, "params_after": size,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """JSON can hold it: tuples become lists, numbers stay, infinities and NaN become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _verdict(plan: Plan, sizes: Mapping[str, int], dense_form: bool, evaluation: Sequence[Mapping[str, Any]], done: bool) -> list[str]:
    changed = sum(j.state != "dense" for j in plan.jobs)
    share = (plan.after if dense_form else sizes["targeted_after"]) / plan.before
    if any(j.state == "undecided" for j in plan.jobs):
        out = [
            f"{len(plan.jobs)} matrices are targeted; spectra will decide their ranks, and at most {share:.1%} of their parameters are kept."
        ]
    else:
        tense = "are" if done else "would be"
        out = [
            f"{changed} of {len(plan.jobs)} targeted matrices {tense} stored as low-rank pairs, and {share:.1%} of the targeted parameters are kept."
        ]
    if dense_form:
        out.append("The pairs are multiplied back: the model loads anywhere and is as large as before.")
    else:
        whole = sizes["total_after"] / sizes["total_before"]
        out.append(f"The whole model keeps {whole:.1%} of its parameters ({sizes['total_before']:,} to {sizes['total_after']:,}).")
    for row in evaluation:
        if row.get("before") is not None and row.get("after") is not None:
            out.append(f"{row['metric']}: {row['before']:.4g} before, {row['after']:.4g} after ({row['better']} is better).")
    if not evaluation and done:
        out.append("Quality was not measured in this run: `eckart eval` compares the result with the original.")
    return out


def _warnings(plan: Plan, recipe: Recipe, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    out = []
    dense = [j.name for j in plan.jobs if j.state == "dense"]
    if dense:
        out.append(f"{len(dense)} targeted matrices stay dense, because a pair of their rank would not be smaller: {_few(dense)}.")
    if plan.decides != "shape" and any(j.state == "undecided" for j in plan.jobs):
        out.append("Ranks depend on spectra and are not decided yet; sizes are upper figures.")
    if recipe.metric.kind == "identity":
        out.append("Plain SVD looks at the weights alone. On real text a recipe that measures inputs loses far less at equal size.")
    if recipe.fidelity != "exact":
        out.append(f"{recipe.name} differs from its paper: {recipe.differs}")
    lossy = [str(x["name"]) for x in layers if (x.get("error") or 0) > 0.5]
    if lossy:
        out.append(f"More than half of the weighted norm is lost in {len(lossy)} layers: {_few(lossy)}.")
    return out


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
