"""The report of a run as plain data: what the HTML page, `report.json`, the model card and the terminal show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ..axes.border import to_yaml
from ..axes.protocols import Bundle, Site
from ..axes.recipe import Recipe
from ..axes.solve import adds_bias
from ..plan import Job, Plan
from ..report.schema import plain
from .host import Host


def compress_report(
    plan: Plan, *, recipe: Recipe, host: Host, bundles: Sequence[Bundle], records: Mapping[str, Mapping[str, Any]], evaluation: Sequence[Mapping[str, Any]] = (),
    timings: Mapping[str, float] | None = None, command: str = "", recovered: Mapping[str, Any] | None = None, notes: Sequence[str] = (),
    cautions: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The report of a compression (or of its plan, while there are no records). `notes` and `cautions` say how this very run went about it,
    which an equal result may not share (see `output.lasting_part`)."""
    from .output import config_changes, versions

    sites = {s.name: s for s in host.catalogue.sites}
    by_name = {b.name: b for b in bundles}
    layers = [row for job in plan.jobs for row in _layers(job, by_name[job.name], recipe, records.get(job.name, {}))]
    layers += [_skipped(sites[name], why) for name, why in plan.skipped.items() if name in sites]
    total, size = host.parameters(), host.reader.nbytes
    width = {j.name: sum(host.reader.info(k).nbytes for k in j.tensors) / max(1, j.before) for j in plan.jobs}
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
    if recipe.form.stored != "same" and not any(j.state == "undecided" for j in plan.jobs):
        sizes["bytes_after"] = size + _more_bytes(plan, recipe, host, bundles)
    verdict = _verdict(
        plan, recipe.form.kind, sizes, layers, dense_form, evaluation, bool(records) or not any(j.state == "factored" for j in plan.jobs)
    )
    if recipe.form.stored != "same":
        known = not any(j.state == "undecided" for j in plan.jobs)
        became = f": {size:,} bytes become {sizes['bytes_after']:,} ({sizes['bytes_after'] / size:.1%})" if known else ""
        verdict.insert(2, f"Targeted matrices {'are' if records else 'would be'} stored in {recipe.form.stored} through torchao{became}.")
    if recovered:
        loss = f"loss on calibration {recovered['loss_before']:.4g} before, {recovered['loss']:.4g} after"
        verdict.insert(-1, f"{recovered['trained']:,} numbers were trained for {recovered['steps']} steps: {loss}.")
    form = recipe.form.layout
    if form not in ("factored", "dense"):
        form = "factored" if "quantization_config" in config_changes(recipe, plan, bundles, host.reader.config, records) else "plain"
    report: dict[str, Any] = {
        "format": 1,
        "kind": "compress",
        "title": f"{host.name} · {recipe.name}",
        "verdict": verdict,
        "model": {"name": host.name, "path": str(host.path or host.name), "parameters": total, "bytes": size},
        "recipe": recipe_card(recipe),
        "budget": {str(recipe.budget.kind): recipe.budget.value},
        "form": form,
        "command": command or None,
        "sizes": sizes,
        "layers": layers,
        "evaluation": [dict(row) for row in evaluation],
        "warnings": [*_warnings(plan, recipe, layers), *_wider(plan, recipe, bundles), *speed(plan, recipe, after / plan.before), *cautions],
        "versions": versions(),
    }  # fmt: skip
    if notes or cautions:
        report["notes"] = [{"title": "Calibration", "text": text} for text in (*notes, *cautions)]
    return report | ({"timings": {k: round(v, 3) for k, v in timings.items()}} if timings else {})


def recipe_card(recipe: Recipe) -> dict[str, Any]:
    """What a report says of a recipe."""
    return {k: getattr(recipe, k) for k in ("name", "title", "paper", "fidelity", "differs")} | {"yaml": to_yaml(recipe)}


def _more_bytes(plan: Plan, recipe: Recipe, host: Host, bundles: Sequence[Bundle]) -> int:
    """Bytes that the output has more than the source, each tensor in its own type; less is negative."""
    from ..store.dtypes import nbytes
    from .output import outcomes

    found = outcomes(recipe, plan, bundles)
    new = sum(nbytes(made.dtype, made.shape) for _, outcome in found for made in outcome.tensors.values())
    return new - sum(host.reader.info(k).nbytes for b, _ in found for k in b.keys)


def _layers(job: Job, bundle: Bundle, recipe: Recipe, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each matrix. Those that were solved together have one error, and no spectrum of their own."""
    if len(bundle.sites) == 1:
        return [_layer(job, bundle.sites[0], record)]
    made = recipe.form.outcome(bundle, job.rank, adds_bias(recipe)).tensors if job.rank is not None else {}
    rows = []
    for site in bundle.sites:
        row = _layer(job, site, {k: v for k, v in record.items() if k in ("relative_error", "certificate")})
        base = site.tensors[0].removesuffix(".weight")
        own = [m.shape for k, m in made.items() if (k in site.tensors or k.startswith(f"{base}.")) and len(m.shape) > 1]
        before, most = site.shape[0] * site.shape[1], min(site.shape)
        if site.bias in made and made[site.bias].shape != (site.shape[0],):  # a bias that became shorter counts
            before, own = before + site.shape[0], [*own, made[site.bias].shape]
        after = sum(prod(shape) for shape in own) if made else before * job.after // max(1, job.before)
        row |= {"name": site.name, "shape": list(site.shape), "params_before": before, "params_after": after, "cap": min(job.cap, most)}
        row |= {"rank": None if row["rank"] is None else min(row["rank"], most)}
        rows.append(row | ({} if row["reason"] else {"reason": f"solved together with {len(bundle.sites) - 1} others, at rank {job.rank}"}))
    return rows


def _layer(job: Job, site: Site, record: Mapping[str, Any]) -> dict[str, Any]:
    why = "its pair would store at least as much as the matrix" if job.state == "dense" else ""
    certificate = record.get("certificate")
    row = {
        "name": job.name, "block": site.block, "role": site.role, "shape": list(job.shape), "rank": job.rank, "cap": job.cap,
        "state": "dense" if job.state == "dense" else "factored", "reason": why, "params_before": job.before, "params_after": job.after,
        "error": record.get("relative_error"), "certificate": {"kind": "free", **plain(certificate)} if certificate else None,
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


WHAT = {"shared_basis": "stored as low-rank pairs, some with a common factor", "smaller": "made smaller", "merged": "fewer experts now"}


def _verdict(
    plan: Plan, form: str, sizes: Mapping[str, int], layers: Sequence[Mapping[str, Any]], dense_form: bool, evaluation: Sequence[Mapping[str, Any]], done: bool
) -> list[str]:  # fmt: skip
    targeted = [x for x in layers if x["state"] != "skipped"]
    changed = sum(x["state"] != "dense" for x in targeted)
    share = (plan.after if dense_form else sizes["targeted_after"]) / plan.before
    if any(j.state == "undecided" for j in plan.jobs):
        out = [
            f"{len(targeted)} matrices are targeted; spectra will decide their ranks, and at most {share:.1%} of their parameters are kept."
        ]
    elif dense_form:
        tense = "are" if done else "would be"
        out = [
            f"{changed} of {len(targeted)} targeted matrices {tense} replaced by the products of low-rank pairs, which have {share:.1%} of their parameters."
        ]
    else:
        tense = "are" if done else "would be"
        out = [
            f"{changed} of {len(targeted)} targeted matrices {tense} {WHAT.get(form, 'stored as low-rank pairs')}, and {share:.1%} of the targeted parameters are kept."
        ]
    if dense_form:
        out.append("The model loads anywhere and is as large as before.")
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
        why = "a pair of their rank would not be smaller" if plan.decides == "shape" else "the allocation leaves them whole"
        out.append(f"{len(dense)} targeted matrices stay dense, because {why}: {_few(dense)}.")
    step = recipe.allocate.step
    odd = [j.name for j in plan.jobs if j.state == "factored" and (j.rank or 0) % step]
    if odd:
        out.append(f"{len(odd)} matrices have ranks that are no multiple of {step}, because one step of so many is beyond their share: {_few(odd)}.")  # fmt: skip
    if plan.decides != "shape" and any(j.state == "undecided" for j in plan.jobs):
        out.append("Ranks depend on spectra and are not decided yet; sizes are upper figures.")
    if recipe.metric.kind == "identity" and not recipe.needs():
        out.append("Plain SVD looks at the weights alone. On real text a recipe that measures inputs loses far less at equal size.")
    if recipe.fidelity != "exact":
        out.append(f"{recipe.name} differs from its paper: {recipe.differs}")
    lossy = [str(x["name"]) for x in layers if (x.get("error") or 0) > 0.5]
    if lossy:
        out.append(f"More than half of the weighted norm is lost in {len(lossy)} layers: {_few(lossy)}.")
    return out


def _wider(plan: Plan, recipe: Recipe, bundles: Sequence[Bundle]) -> list[str]:
    """Matrices that int4 does not take, and layers that are not stored in integers at all."""
    from .output import outcomes

    if recipe.form.stored == "same" or any(j.state == "undecided" for j in plan.jobs):
        return []
    found = outcomes(recipe, plan, bundles)
    types = {k.removesuffix(".qdata"): m.dtype for _, o in found for k, m in o.tensors.items() if k.endswith(".qdata")}
    out = []
    wider = [k for k, dtype in types.items() if dtype == "I8"]
    if recipe.form.stored == "int4" and wider:
        what = "all" if len(wider) == len(types) else f"{len(wider)} of {len(types)}"
        out.append(f"{what} matrices are in int8, because int4 shares a scale among 32 inputs and theirs are no multiple: {_few(wider)}. --set allocate.multiple=32 gives factors such ranks.")  # fmt: skip
    names = {b.name for b, o in found if any(k.endswith(".qdata") for k in o.tensors)}
    left = [b.name for b in bundles if b.name not in names]
    if left:
        out.append(f"{len(left)} targeted matrices keep their type: tables, or dense weights stored (in, out), are never integers: {_few(left)}.")  # fmt: skip
    return out


SPEED = {
    ("pairs", 256): {0.8: (0.8, 1.0), 0.6: (0.9, 1.0), 0.4: (1.1, 1.3)},
    ("pairs", 2048): {0.8: (0.9, 1.0), 0.6: (1.0, 1.2), 0.4: (1.3, 1.5)},
    ("smaller dense", 256): {0.8: (0.9, 0.9), 0.6: (0.9, 1.0), 0.4: (1.2, 1.5)},
    ("smaller dense", 2048): {0.8: (1.1, 1.2), 0.6: (1.4, 1.4), 0.4: (1.7, 1.9)},
    ("int8", 256): {0.6: (0.9, 1.0)},
    ("int8", 2048): {0.6: (0.3, 0.9)},
}
"""Least and most tokens per second over the dense model's, by what is stored, width and share kept: prefill and decode at batch 1 and 16, one CPU
core, bfloat16; int8 is that of dense matrices and of pairs. From bench/speed.py, to one digit behind the point."""


def speed(plan: Plan, recipe: Recipe, share: float) -> list[str]:
    """What to expect of the speed: the nearest figures that were measured. No prediction for another machine.

    Args:
        plan, recipe: the run.
        share: of the targeted parameters that is kept.
    """
    sides = sorted(min(j.shape) for j in plan.jobs)
    width = 256 if sides[len(sides) // 2] ** 2 < 256 * 2048 else 2048
    what = {"pair": "pairs", "shared_basis": "pairs", "smaller": "smaller dense"}.get(recipe.form.kind)

    def figures(key: str, keep: float) -> str:
        low, high = SPEED[key, width][keep]
        return f"{low:g} to {high:g} times" if low < high else f"{low:g} times"

    found: list[str] = []
    if what is not None and recipe.form.layout != "dense" and any(j.state != "dense" for j in plan.jobs):
        keep = min(SPEED[what, width], key=lambda k: abs(k - share))
        low, high = SPEED[what, width][keep]
        head = "Do not expect it to be faster" if high <= 1 else f"Expect it to be {'little' if low <= 1 else 'somewhat'} faster"
        name = what if what == "pairs" else "smaller matrices"
        out = f"{head}: on one CPU core, at width {width} in bfloat16, {name} at {keep:.0%} ran at {figures(what, keep)} the tokens per second of dense ones"  # fmt: skip
        if what == "pairs":
            out += f", because two thin products cost more than their arithmetic; smaller dense matrices (--recipe modegpt) at {figures('smaller dense', keep)}. --form dense keeps the old speed"  # fmt: skip
        found.append(f"{out}. Measure on your own hardware.")
    if recipe.form.stored != "same":
        more = "" if recipe.form.stored == "int8" else "; int4 was not measured"
        found.append(f"Integers save bytes, not time: on one CPU core without a compiler, int8 weights ran at {figures('int8', 0.6)} the tokens per second of bfloat16 at width {width}{more}.")  # fmt: skip
    return found


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
