"""What is measured, once: needs and sites resolved into slots, so that equal needs and shared inputs cost one sum."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from ..axes.protocols import Site, Stat
from ..errors import UsageError, did_you_mean

# kind -> where and how it can be measured
MEASURED: dict[str, tuple[tuple[str, str], ...]] = {
    "moments": (("in", "forward"), ("out", "forward"), ("out", "backward")),
    "absmean": (("in", "forward"), ("out", "forward")),
    "fisher": (("weight", "backward"),),
    "gradient": (("weight", "backward"),),
    "gradient_gram": (("weight", "backward"),),
    "frequency": (("in", "forward"),),
    "influence": (("block", "forward"),),
    "experts": (("block", "forward"),),
}
WATCHED = ("frequency", "influence", "experts")  # see `watch`
PROBES = ("task_loss", "random_projection")
OPTIONS = {"fisher": ("per_sample", "per_batch"), "gradient_gram": ("in", "out")}  # exactly one of them; the first is the usual one


@dataclass(frozen=True)
class Slot:
    """One sum.

    Args:
        stat: what, with its probe and options settled.
        where: id of the input for statistics at "in", else the site's name.
        site: the first site that asks for it; its module is hooked.
    """

    stat: Stat
    where: str
    site: Site

    @property
    def key(self) -> str:
        """Name of the sum in the artefact."""
        return key_of(self.stat, self.where)

    @property
    def width(self) -> int:
        """Channels: of the input, or of the output; length of the vector of a statistic that is neither."""
        if self.stat.kind == "experts":
            return self.site.shape[0] * (self.site.shape[0] + 1)
        if self.stat.kind == "influence":
            return 1
        if self.stat.kind == "gradient":
            return self.site.shape[0] * self.site.shape[1]
        if self.stat.kind == "gradient_gram":
            return self.site.shape[1 if self.stat.opts == ("in",) else 0] ** 2
        return self.site.shape[0] if self.stat.at == "out" else self.site.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the finished value in the artefact, its count included."""
        return 8 * (self.width**2 + self.width + 1) if self.stat.kind == "moments" else 8 * (self.width + 1)


def key_of(stat: Stat, where: str) -> str:
    """Name of a settled statistic at a place."""
    opts = stat.opts if stat.inputs == "original" else (*stat.opts, stat.inputs)
    return "|".join((stat.kind, stat.at, stat.via, stat.probe, ",".join(opts), where))


def settle(stat: Stat, auto: str) -> Stat:
    """The statistic with its defaults written out, so that equal needs are equal values.

    Args:
        stat: as an axis declares it.
        auto: the probe that "auto" stands for.

    Raises:
        UsageError: nothing here measures it.
    """
    if stat.kind not in MEASURED:
        raise UsageError(f"statistic {stat.kind!r}: expected one of {', '.join(MEASURED)}.{did_you_mean(stat.kind, MEASURED)}")
    if (stat.at, stat.via) not in MEASURED[stat.kind]:
        ways = " or ".join(f'at "{at}" via {via}' for at, via in MEASURED[stat.kind])
        raise UsageError(f'statistic {stat.kind!r}: expected {ways}, found at "{stat.at}" via {stat.via}.')
    if stat.inputs != "original" and stat.via != "forward":
        raise UsageError(f"statistic {stat.kind!r}: {stat.inputs!r} inputs are measured via forward only, found via {stat.via}.")
    known = OPTIONS.get(stat.kind, ())
    opts = stat.opts or known[:1]
    if opts and (len(opts) != 1 or opts[0] not in known):
        expected = " or ".join(map(repr, known)) or "none"
        raise UsageError(f"statistic {stat.kind!r}: unknown options {opts}; expected {expected}.")
    probe = "" if stat.via == "forward" else auto if stat.probe == "auto" else stat.probe
    if stat.via == "backward" and probe not in (*PROBES, "auto"):
        raise UsageError(f"probe {probe!r}: expected 'auto', {' or '.join(map(repr, PROBES))}.{did_you_mean(probe, PROBES)}")
    return replace(stat, opts=opts, probe=probe)


def place_of(stat: Stat, site: Site) -> str:
    """Where a statistic of a site is kept: its input, its module, its block, or the module of its experts."""
    if stat.kind == "experts":
        return site.name.rpartition(".")[0]
    if stat.kind == "influence":
        parts = site.name.split(".")
        number = next((i for i, p in enumerate(parts) if p.isdigit()), len(parts) - 1)
        return ".".join(parts[: number + 1])
    return site.reads or site.name if stat.at == "in" else site.name


def slots_for(needs: Iterable[Stat], sites: Collection[Site], auto: str, *, propagated: bool = False) -> tuple[Slot, ...]:
    """Every sum that the needs of these sites come to, in a fixed order.

    Args:
        needs: as axes declare them.
        sites: the linears.
        auto: the probe that "auto" stands for.
        propagated: whether the caller can measure inputs that were propagated through what is already compressed.

    Raises:
        UsageError: a need that cannot be measured, a site that is not a linear, or sites of one input id with different widths.
    """
    stats = sorted({settle(s, auto) for s in needs}, key=lambda s: key_of(s, ""))
    for stat in stats:
        if stat.inputs != "original" and not propagated:
            raise UsageError(
                f"statistic {stat.kind!r}: one pass measures the model's own inputs; {stat.inputs!r} ones need a sweep over blocks."
            )
    out: dict[str, Slot] = {}
    for stat in stats:
        for site in sites:
            if not _measures(stat, site, stats):
                continue
            if site.kind != "linear" and stat.kind not in WATCHED:
                raise UsageError(f"{site.name}: statistics are measured at linears; this site is of kind {site.kind!r}.")
            slot = Slot(stat, place_of(stat, site), site)
            first = out.setdefault(slot.key, slot)
            if first.width != slot.width:
                raise UsageError(f"{site.name}: reads {slot.where!r} of {first.width} channels but has {slot.width}.")
    return tuple(out.values())


def _measures(stat: Stat, site: Site, stats: Collection[Stat]) -> bool:
    """Whether a statistic is taken at a site at all. What only embeddings or experts have stands in for what only linears have."""
    if stat.kind == "influence":
        return site.block >= 0
    own = {"frequency": "embedding", "experts": "experts"}
    if stat.kind in own:
        return site.kind == own[stat.kind]
    return not (any(own.get(s.kind) == site.kind for s in stats) or (site.kind == "other" and any(s.kind == "experts" for s in stats)))
