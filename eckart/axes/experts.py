"""The experts of one mixture-of-experts layer, with the router that chooses among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Choice
from .protocols import Bundle, Bundles, Site, World

if TYPE_CHECKING:
    from torch import Tensor

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of `config.json`, and attributes of modules, that hold the number of experts."""
CHOSEN = ("num_experts_per_tok", "moe_top_k", "num_experts_per_token")
"""Keys that hold how many of them a token takes."""
GROUPED = ("n_group", "topk_group", "num_expert_group")
"""Keys of routers that choose groups of experts first; their number must divide the number of experts."""


@dataclass(frozen=True)
class Experts(Choice):
    """All experts of a layer together: gate and up in one stack (experts, 2 I, H), down in another (experts, H, I), and the router (experts, H)."""

    kind: ClassVar[str] = "experts"
    axis: ClassVar[str] = "group"
    takes: ClassVar[frozenset[str]] = frozenset({"experts", "merged experts"})

    def bundles(self, sites: Sequence[Site], world: World) -> Bundles:
        homes: dict[str, list[Site]] = {}
        for site in sites:
            name = site.name.removesuffix(".weight")
            home = name.rpartition(".")[0]
            homes.setdefault(home.rpartition(".")[0] if site.kind == "experts" else home, []).append(site)
        found: list[Bundle] = []
        left: dict[str, str] = {}
        for home, members in homes.items():
            stacks = [s for s in members if s.kind == "experts"]
            router = next((s for s in members if s.kind != "experts" and stacks and s.shape[0] == stacks[0].shape[0]), None)
            why = _unfit(home, stacks, router, world)
            if why is None and router is not None:
                gate_up, down = stacks
                facts = {"experts": router.shape[0], "hidden": router.shape[1], "chosen": _number(world.config, CHOSEN) or 1}
                found.append(Bundle(f"{home}.experts", (gate_up, down, router), facts=tuple(facts.items())))
                members = [s for s in members if s not in (gate_up, down, router)]
                why = "is neither expert nor router"
            left |= {s.name: str(why) for s in members}
        return found, left


def _unfit(home: str, stacks: Sequence[Site], router: Site | None, world: World) -> str | None:
    if len(stacks) != 2 or router is None:
        return f"{home} has {len(stacks)} stacks of experts and {'no' if router is None else 'a'} router; expected two and one"
    gate_up, down = stacks
    count, hidden = router.shape
    if gate_up.shape[0] != count or down.shape[0] != count or gate_up.shape[1] != 2 * down.shape[1] or down.shape[1] % hidden:
        return f"the experts of {home} are not gate, up and down of one width"
    if _number(world.config, COUNTS) != count:
        return f"config.json does not say that there are {count} experts"
    if any((_number(world.config, (g,)) or 1) > 1 for g in GROUPED):
        return "the router chooses groups of experts first"
    own = {k for s in (*stacks, router) for k in (*s.tensors, *((s.bias,) if s.bias else ()))}
    prefix = router.tensors[0].removesuffix(".weight").rpartition(".")[0] + "."
    other = next((k for k, shape in world.shapes.items() if k.startswith(prefix) and k not in own and shape and shape[0] == count), None)
    return f"{other} has a row for every expert too" if other or router.bias else None


def _number(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return next((config[n] for n in names if isinstance(config.get(n), int)), None)


def unstack(site: Site, stack: Tensor) -> dict[str, Tensor]:
    """A stack (experts, rows, columns) as the source holds it: one tensor, or one for each part of each expert. Experts beyond its length are gone."""
    if len(site.tensors) == 1:
        return {site.tensors[0]: stack.contiguous()}
    each = len(site.tensors) // site.shape[0]
    keys = iter(site.tensors)
    return {next(keys): part.contiguous() for expert in stack for part in expert.chunk(each)}
