"""The page of `bench.adapt`: its tables, and what they show. Nothing is said here that the runs do not bear out; what a paper claims is only compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Run = dict[str, Any]
LEARNT = 0.5  # share of full fine-tuning's gain from which on forgetting is compared: what learns nothing forgets nothing

SMALLEST = 0.005  # bits per byte: below it a difference is none, however steady

CLAIMS: Sequence[tuple[str, str, str]] = (
    # (recipe, in what, compared with): "score" is the new domain, "old" what was known before; lower is better
    ("pissa", "score", "lora"), ("sorsa", "score", "pissa"), ("sorsa", "score", "full"), ("corda", "score", "full"), ("corda:kpm", "score", "lora"),
    ("corda:kpm", "old", "lora"), ("eva", "score", "lora"), ("kasa", "score", "lora"), ("adalora", "score", "lora"), ("soma", "score", "lora"),
    ("lora_sb", "score", "lora_xs"), ("lora_pro", "score", "lora"), ("allora", "score", "lora"), ("rdp_lora", "score", "lora"), ("lisa", "score", "lora"),
    ("osf", "old", "full"), ("nlora", "score", "pissa"), ("soka", "score", "pissa"), ("salt", "score", "lora"), ("svfit", "score", "lora"),
    ("flora", "score", "lora"), ("ba_lora", "score", "pissa"),
)  # fmt: skip
PARENTS: Mapping[str, tuple[str, ...]] = {
    "sorsa in corda's metric": ("sorsa", "corda"), "pissa with lora_pro's gradient": ("pissa", "lora_pro"), "eva with kasa's penalties": ("eva", "kasa"),
    "effort in corda's metric": ("effort", "corda:kpm"), "corda with factors of equal norm": ("corda",),
}  # fmt: skip


@dataclass(frozen=True)
class Gap:
    """How far one row lies below another, seed by seed: runs of a seed see the same rows in the same order."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sure(self) -> bool:
        """On every seed on one side, and by more on average than the seeds differ among themselves and than counts at all."""
        return len(self.values) > 1 and abs(self.mean) > max(SMALLEST, max(self.values) - min(self.values))

    def word(self) -> str:
        if self.sure:
            return "shows" if self.mean < 0 else "the opposite shows"
        return "within the seeds"


def gap(rows: Mapping[str, Sequence[Run]], one: str, other: str, key: str) -> Gap | None:
    """The gap between two rows; None where one is missing."""
    if one not in rows or other not in rows:
        return None
    theirs = {r["seed"]: r[key] for r in rows[other]}
    found = tuple(r[key] - theirs[r["seed"]] for r in rows[one] if r["seed"] in theirs)
    return Gap(found) if found else None


def chosen(done: Sequence[Run], names: Sequence[str], steps: int) -> dict[str, list[Run]]:
    """The scored runs of each row at the rate that its first seed chose."""
    out: dict[str, list[Run]] = {}
    for name in names:
        found = sorted((r for r in done if r["recipe"] == name and r["steps"] == steps and "score" in r), key=lambda r: r["seed"])
        if found:
            first = min((r for r in found if r["seed"] == found[0]["seed"]), key=lambda r: r["choose"])
            out[name] = list({r["seed"]: r for r in found if r["rate"] == first["rate"]}.values())
    return out


def table(rows: Mapping[str, Sequence[Run]], before: Mapping[str, float], full: float | None) -> list[str]:
    """The lines of one table, the best on the new domain first."""
    lines = [
        "| recipe | rate | trained | new domain | spread | of full's gain | old domain, change | spread | intruders of 100 | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(rows, key=lambda n: _mean(rows[n])):
        found = rows[name]
        forgot = [r["old"] - before["old"] for r in found]
        intruders = [100 * r["intruders"] / r["looked"] for r in found if r["looked"]]
        lines.append(
            f"| {name} | {found[0]['rate']:g} | {found[0]['trained']:,} | {_mean(found):.4f} | {_spread([r['score'] for r in found])} | "
            f"{_share(found, before, full):.2f} | {statistics.fmean(forgot):+.4f} | {_spread(forgot)} | "
            f"{f'{statistics.fmean(intruders):.1f}' if intruders else 'not merged'} | {statistics.fmean(r['initialise'] + r['train'] for r in found):.1f} |"
        )
    return lines


def findings(rows: Mapping[str, Sequence[Run]], before: Mapping[str, float], full: float | None) -> list[str]:
    """What the table shows, in sentences made of its numbers."""
    out = ["## What it shows", ""]
    out += [
        "Rows are compared seed by seed. A difference counts where its mean is larger than its own spread over the seeds; all else is "
        "called within the seeds, however it is ordered above. Three seeds and 32 steps on a model of five million parameters decide nothing about larger ones.",
        "",
    ]
    others = [n for n in rows if n not in ("lora", "full")]
    gaps = {n: g for n in others if (g := gap(rows, n, "lora", "score")) is not None}
    out += [
        f"- **Better than LoRA**: {_names(gaps, lambda g: g.sure and g.mean < 0)}.",
        f"- **Worse than LoRA**: {_names(gaps, lambda g: g.sure and g.mean > 0)}.",
        f"- **Within the seeds of LoRA**: {_names(gaps, lambda g: not g.sure)}.",
    ]
    learnt = {n: f for n, f in rows.items() if _share(f, before, full) >= LEARNT}
    kept = sorted(learnt, key=lambda n: statistics.fmean(r["old"] for r in learnt[n]))
    if kept:
        words = ", ".join(f"{n} ({statistics.fmean(r['old'] for r in learnt[n]) - before['old']:+.3f})" for n in kept[:4])
        worst = kept[-1]
        out.append(
            f"- **Forgets least**, of those with at least {LEARNT:.0%} of full fine-tuning's gain: {words}; most: {worst} "
            f"({statistics.fmean(r['old'] for r in learnt[worst]) - before['old']:+.3f})."
        )
    out += ["", "### Claims of papers, at this scale", "", "| claim | mean difference | here |", "|---|---|---|"]
    for one, key, other in CLAIMS:
        found = gap(rows, one, other, key)
        if found is not None:
            what = "learns more than" if key == "score" else "forgets less than"
            out.append(f"| {one} {what} {other} | {found.mean:+.4f} | {found.word()} |")
    out += ["", "### Hybrids", ""]
    for name, parents in PARENTS.items():
        found = [
            (p, s, o) for p in parents if (s := gap(rows, name, p, "score")) is not None and (o := gap(rows, name, p, "old")) is not None
        ]
        if found:
            words = "; ".join(f"{_far(s, 'new domain')} and {_far(o, 'old domain')} against {p}" for p, s, o in found)
            out.append(f"- {name}: {words}.")
    return out


def _far(found: Gap, what: str) -> str:
    return f"{found.mean:+.4f} on the {what}{'' if found.sure else ' (within the seeds)'}"


def _names(gaps: Mapping[str, Gap], wanted: Any) -> str:
    found = sorted((n for n, g in gaps.items() if wanted(g)), key=lambda n: gaps[n].mean)
    return ", ".join(f"{n} ({gaps[n].mean:+.3f})" for n in found) or "none"


def _mean(found: Sequence[Run]) -> float:
    return statistics.fmean(r["score"] for r in found)


def _share(found: Sequence[Run], before: Mapping[str, float], full: float | None) -> float:
    return math.nan if full is None else (before["score"] - _mean(found)) / (before["score"] - full)


def _spread(values: Sequence[float]) -> str:
    return f"{max(values) - min(values):.4f}" if len(values) > 1 else "-"


def page(done: Sequence[Run], facts: Mapping[str, Any], steps: int, names: Sequence[str], probes: Mapping[str, str]) -> str:
    """The page.

    Args:
        done: all runs.
        facts: what `bench.adapt` says of them.
        steps: of the runs that count.
        names: rows of the table.
        probes: rows of the second table -> why they are there.
    """
    before = facts["before"]
    rows = chosen(done, names, steps)
    full = _mean(rows["full"]) if "full" in rows else None
    lines = ["# Adapters: quality", "", facts["machine"], "", facts["words"], "", *table(rows, before, full), ""]
    counts = ", ".join(map(str, sorted({len(f) for f in rows.values()})))
    lines += [f"Seeds per row: {counts}. Spread: largest minus smallest of the seeds. Seconds: initialisation and training of a run."]
    if "lora" in rows:
        lines += ["", *findings(rows, before, full)]
    extra = chosen(done, list(probes), steps)
    if extra:
        lines += ["", "### What some rows turn on", "", *table(extra, before, full), ""]
        for name in extra:
            plain = name.partition(",")[0]
            moved = gap({**rows, **extra}, name, plain, "score")
            lines += [f"- {name}: {probes[name]} {_far(moved, 'new domain')} against {plain}." for _ in range(1) if moved is not None]
    return "\n".join(lines) + "\n"
