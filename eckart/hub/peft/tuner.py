"""The tuner: which layers get an adapter, at which rank, with which values. PEFT calls it for new adapters and before it loads saved ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ...axes.protocols import Site
from ...axes.training import needs_glue
from ...errors import Refused, UsageError
from ...nn.action import Action, action_of
from ...nn.branch import Branch
from ...nn.fused import Rows
from ...progress import track
from ...verbs.adapt import Design, NoStats, Parents, Place, branch_of, design, lay, start_of
from ...verbs.adapt_request import chosen, refuse_target, refuse_without_data
from . import probe as probes
from .config import EckartConfig
from .layer import EckartLayer
from .quantised import backend_of, read
from .register import PREFIX

if TYPE_CHECKING:
    from ...catalogue import Catalogue


class EckartModel(BaseTuner):
    """Puts `EckartLayer` in the place of the targeted layers. One tuner for every recipe: what differs is in the recipe's form."""

    prefix: str = PREFIX
    tuner_layer_cls = EckartLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    # ---- which layers

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        config: EckartConfig = peft_config
        sites = layers_able(self.model)
        target: Any = config.target_modules
        if target is None:
            from ...catalogue import from_model

            found = chosen(config.value, sites, without_adapters(from_model(self.model)), None)
            config.target_modules = {s.name for s in found}  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(target, str) and target.lower() == "all-linear":
            # PEFT's own reading of the word does not know our layers, so a second adapter would find none
            head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
            names = {s.name for s in sites if s.kind == "linear" and self.model.get_submodule(s.name) is not head}
            config.target_modules = names  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(target, set) and not isinstance(config.ranks, dict):
            known = [s.name for s in sites]
            missing = [n for n in sorted(target) if not any(k == n or k.endswith(f".{n}") for k in known)]
            if missing:
                refuse_target(missing, known)
        return config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """All decisions, before the first layer is replaced."""
        config: EckartConfig = peft_config
        recipe = config.value
        sites = [s for s in layers_able(model) if self._check_target_module_exists(config, s.name)]
        if not sites:
            known = [s.name for s in layers_able(model)]
            refuse_target(
                [config.target_modules] if isinstance(config.target_modules, str) else sorted(config.target_modules or ["nothing"]), known
            )
        if config.fresh and config.statistics is not None:
            sites = recipe.target.narrow(sites, config.statistics)
        self._layers = {s.name: _Base(model.get_submodule(s.name), s, model) for s in sites}
        if recipe.form.uses_triples and recipe.form.mutates:
            bad = next((n for n, b in self._layers.items() if b.quantised), None)
            if bad:
                raise Refused(
                    f"{bad}: its weight is quantised, and base='mutate' would round what it takes away into it. Use base='subtract', which leaves it alone."
                )
        if config.fresh:
            away = next((n for n, b in self._layers.items() if b.offloaded), None)
            if away:
                raise Refused(
                    f"{away}: its weight is offloaded (on the meta device), so nothing can be read from it. Load the model without offloading."
                )
            self._design = self._decide(config, recipe, sites, model)
            config.ranks, config.asked, config.alpha = dict(self._design.ranks), self._design.asked, self._design.alpha
            config.splits = splits_of(self._design)
            config.probe = probes.take(self._shapes(), self._read)
            self._branches = self._start(config)
        else:
            self._design = self._saved(config, recipe, sites)
            probes.check(config.probe or {}, self._shapes(), self._read)

    def _decide(self, config: EckartConfig, recipe: Any, sites: list[Site], model: nn.Module) -> Design:
        stats = config.statistics
        refuse_without_data(recipe, None, stats)
        places = lay(recipe, sites, getattr(model, "config", None))
        view: Any = Parents(stats) if stats is not None else NoStats()
        return design(recipe, places, self._matrix, view, alpha=config.alpha, seed=config.seed, pattern=config.rank_pattern)

    def _empty(self, config: EckartConfig, module: str) -> Branch:
        base = self._layers[module]
        return branch_of(self._design, module, base.action, dropout=_dropout(config), bias=base.has_bias)

    def _start(self, config: EckartConfig) -> dict[str, Branch]:
        """Every branch with its values, before any layer is replaced: a layer that is refused leaves the model as it was."""
        view: Any = Parents(config.statistics) if config.statistics is not None else NoStats()
        out: dict[str, Branch] = {}
        for module in track(self._design.modules, "initialising"):
            out[module] = self._empty(config, module)
            started = start_of(self._design, module, out[module], self._matrix, view, seed=config.seed)
            for label, layer in out[module].layers().items():
                layer.fill(started[label].values)
        self._design = replace(self._design, known={})
        return out

    def _saved(self, config: EckartConfig, recipe: Any, sites: list[Site]) -> Design:
        splits = {m: {k: Rows(*v) for k, v in blocks.items()} for m, blocks in (config.splits or {}).items()}
        ranks: dict[str, int] = dict(config.ranks or {})
        places: list[Place] = []
        for site in sites:
            if site.name in splits:
                places += [Place(site.name, _part(site, label, rows), label, rows) for label, rows in splits[site.name].items()]
            else:
                places.append(Place(site.name, site))
        return design(
            recipe,
            [p for p in places if ranks.get(p.site.name)],
            self._matrix,
            NoStats(),
            alpha=config.alpha,
            ranks=ranks,
            asked=config.asked,
        )

    def _shapes(self) -> Mapping[str, tuple[int, int]]:
        return {n: b.site.shape for n, b in self._layers.items() if n in self._design.modules}

    def _read(self, name: str) -> Tensor | None:
        base = self._layers[name]
        return None if base.quantised else base.matrix()

    def _matrix(self, place: Place) -> Tensor:
        found = self._layers[place.module].matrix()
        if found is None:
            raise Refused(
                f"{place.module}: its weight is quantised in a way that cannot be read, so {self.__class__.__name__} cannot factorise it. Load the base in full precision, or use --recipe lora."
            )
        return found if place.rows is None else found[place.rows.index().to(found.device)]

    # ---- replacing

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str,
        parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        config: EckartConfig = peft_config
        if current_key not in self._design.modules:  # the allocation gave it no rank
            return
        base = self._layers[current_key]
        branch = self._branches.pop(current_key) if config.fresh else self._empty(config, current_key)
        if not config.fresh and not any(p.device.type == "meta" for p in branch.parts().values()):
            branch.poison()
        layer = target if isinstance(target, EckartLayer) else EckartLayer(target, base.action, base.backend)
        layer.update_layer(adapter_name, branch, needs_glue=needs_glue(self._design.recipe), loaded=config.fresh)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if any(c.peft_type != config.peft_type for c in self.peft_config.values()):
            raise UsageError(
                "adapters of ECKART cannot stand beside those of another PEFT method in one model. Merge or unload the others first."
            )

    def _check_merge_allowed(self) -> None:
        """A weight that another module shares would change there too."""
        owners: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            weight = getattr(module, "weight", None) if not isinstance(module, BaseTunerLayer) else None
            if isinstance(weight, torch.nn.Parameter) and weight.device.type != "meta":
                owners.setdefault(id(weight), []).append(name)
        for name, module in self.model.named_modules():
            if isinstance(module, EckartLayer):
                others = [n for n in owners.get(id(module.get_base_layer().weight), []) if n != f"{name}.base_layer"]
                if others:
                    raise Refused(
                        f"{name} shares its weight with {', '.join(others)}: merging would change both. Untie them first (tie_word_embeddings=False when the "
                        "base is loaded, and its own copy of the weight), or keep the adapter apart."
                    )

    # ---- names in checkpoints

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".eckart_branch.{adapter_name}.", ".eckart_branch.")


def splits_of(found: Design) -> dict[str, dict[str, list[int]]]:
    """Rows of the matrices of every fused layer, as the config holds them."""
    out: dict[str, dict[str, list[int]]] = {}
    for place in found.places:
        if place.rows is not None:
            out.setdefault(place.module, {})[place.label] = [place.rows.start, place.rows.length, place.rows.period, place.rows.count]
    return out


class _Base:
    """A layer that gets an adapter: how it is read, whether it holds adapters already."""

    def __init__(self, module: nn.Module, site: Site, model: nn.Module) -> None:
        self.module, self.site = module, site
        layer: Any = module.get_base_layer() if isinstance(module, EckartLayer) else module
        self.action = _action(layer)
        self.backend = backend_of(layer, model)
        self.has_bias = isinstance(getattr(layer, "bias", None), Tensor)
        self.quantised = not probes.floating(layer.weight)
        self.offloaded = layer.weight.device.type == "meta"

    def matrix(self) -> Tensor | None:
        """The base weight (out, in), without what other adapters did to it."""
        if isinstance(self.module, EckartLayer):
            return self.module.matrix()
        weight = read(self.module, self.backend)
        return None if weight is None else self.action.to_matrix(weight)


def _action(layer: nn.Module) -> Action:
    found = action_of(layer)
    if found is None:  # a quantised linear of another library
        found = Action(int(layer.out_features), int(layer.in_features))  # type: ignore[arg-type]
    return found


def _holds(layer: nn.Module) -> bool:
    if action_of(layer) is not None:
        return True
    # a linear layer of a quantisation library: it computes y = W x and says so by its class
    sizes = all(isinstance(getattr(layer, n, None), int) for n in ("in_features", "out_features"))
    return sizes and not isinstance(layer, nn.Linear) and backend_of(layer) is not None


def layers_able(model: nn.Module) -> list[Site]:
    """Every layer that can hold an adapter, those that hold one already included."""
    out: list[Site] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside) or not name:
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
            if not isinstance(module, EckartLayer):
                continue
        layer = module.get_base_layer() if isinstance(module, EckartLayer) else module
        if not _holds(layer):
            continue
        action = _action(layer)
        kind = {"Action": "linear", "ConvAction": "conv", "EmbeddingAction": "embedding"}[type(action).__name__]
        out.append(Site(name, (action.out, action.into), (f"{name}.weight",), kind=kind, reads=name))
    return out


def without_adapters(catalogue: Catalogue) -> Catalogue:
    """The catalogue under the names that layers have without their adapters."""
    return replace(catalogue, sites=tuple(replace(s, name=s.name.removesuffix(".base_layer")) for s in catalogue.sites))


def _part(site: Site, label: str, rows: Rows) -> Site:
    return replace(site, name=f"{site.name}[{label}]", shape=(rows.size, site.shape[1]))


def _dropout(config: EckartConfig) -> float:
    return float(config.dropout if config.dropout is not None else config.value.train.get("dropout", 0.0))
