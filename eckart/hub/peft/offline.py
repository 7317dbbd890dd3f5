"""An initialised adapter without the model in memory: weights are read one by one, and only the thin factors are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...axes import Recipe
from ...axes.initialise import factorise
from ...axes.protocols import Site
from ...nn.action import action_of
from ...progress import track
from ...verbs.adapt import Design, NoStats, Parents, Place, branch_of, design, lay, start_of
from ...verbs.adapt_request import chosen, refuse_without_data, resolve
from ...verbs.adapter_folder import check_folder, write_folder
from ...verbs.calibrate import Calibration, load_calibration
from ...verbs.encoded import measure_for_adapter
from ...verbs.factor_cache import FactorCache, cacheable
from ...verbs.host import FolderHost, is_causal
from . import probe as probes
from .register import register

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Initialised:
    """What `initialise` did.

    Args:
        path: the adapter folder.
        ranks: matrix -> rank.
        records: matrix -> rank and certificate of what it was made of.
        trained: numbers that train.
        total: numbers in the base model.
    """

    path: Path
    ranks: Mapping[str, int]
    records: Mapping[str, Mapping[str, Any]]
    trained: int
    total: int


def initialise(
    model: str | Path, recipe: str | Recipe = "pissa", rank: float | None = None, *, out: str | Path, calib: Any = None,
    target: str | Iterable[str] | None = None, alpha: float | str | None = None, variant: str | None = None, glue: Sequence[str | Recipe] = (),
    base: str | None = None, seed: int = 0, settings: Sequence[str] = (), tokenizer: Any = None, max_length: int | None = None, batch_size: int = 8,
    stats: Any = None, cache: str | Path | None = None, device: str | None = None, overwrite: bool = False,
) -> Initialised:  # fmt: skip
    """Write the adapter that `adapt` would put beside a model, reading its checkpoint tensor by tensor.

    No model is built for recipes that need no data, so it works for models that do not fit in memory; what it holds at once is one weight and
    the adapter. Statistics need the model itself.

    Args:
        model: checkpoint folder, or a Hub id.
        recipe, rank, calib, target, alpha, variant, glue, base, seed, settings, tokenizer, max_length, batch_size, stats: as in `adapt`.
        out: adapter folder to write; `PeftModel.from_pretrained(base, out)` opens it.
        cache: folder of triples that are shared by all adapters of this base, up to rank 128 and cut below it.
        device: where the model runs for statistics.
        overwrite: replace an earlier adapter folder.

    Returns:
        `Initialised`.

    Raises:
        UsageError, Refused: as `adapt`; and an output that would destroy something.
    """
    register()
    from ..load import meta_model
    from .config import EckartConfig
    from .tuner import layers_able, splits_of

    found = resolve(recipe, rank, variant=variant, glue=glue, base=base, settings=settings)
    refuse_without_data(found, calib, stats)
    host = FolderHost(model, tokenizer, device)
    given: Any = None if stats is None or isinstance(stats, str | Path) else stats
    texts = load_calibration(calib, found.needs() if given is None else frozenset(), found.name)
    folder = check_folder(out, [host.path] if host.path else [], overwrite)
    meta = meta_model(str(host.path))
    names = list(target) if target is not None and not isinstance(target, str) else target
    catalogue = host.catalogue
    sites = [s for s in layers_able(meta) if s.name in catalogue and catalogue.get(s.name).tensors[0] in host.reader]
    wanted = chosen(found, sites, catalogue, names)
    if found.needs() and given is None:
        how = Calibration(texts, max_length, batch_size, seed, file=Path(stats) if isinstance(stats, str | Path) else None)
        given = measure_for_adapter(host, found.needs(), [catalogue.get(s.name) for s in wanted], how)
    view: Any = Parents(given) if given is not None else NoStats()
    wanted = found.target.narrow(wanted, view)

    def read(name: str) -> Tensor:
        return host.read(catalogue.get(name))

    def matrix(place: Place) -> Tensor:
        weight = read(place.module)
        return weight if place.rows is None else weight[place.rows.index()]

    places = lay(found, wanted, meta.config)
    laid = design(found, places, matrix, view, alpha=alpha, seed=seed)
    kept = FactorCache(Path(cache), host.reader.fingerprint) if cache is not None else None
    tensors: dict[str, Tensor] = {}
    records: dict[str, Mapping[str, Any]] = {}
    trained = 0
    by_name = {s.name: s for s in wanted}
    for module in track(laid.modules, "initialising"):
        layer = meta.get_submodule(module)
        action = action_of(layer)
        assert action is not None
        branch = branch_of(laid, module, action, bias=getattr(layer, "bias", None) is not None)
        started = start_of(_with_cache(laid, module, kept, matrix, seed), module, branch, matrix, view, seed=seed)
        for label, part in branch.layers().items():
            part.fill(started[label].values)
        records |= {p.site.name: started[p.label].record for p in laid.of(module)}
        tensors |= {f"base_model.model.{module}.eckart_branch.{k}": v.detach() for k, v in branch.parts().items()}
        trained += sum(p.numel() for p in branch.parameters())
    config = EckartConfig(
        recipe=found, r=None if rank is None else rank, alpha=laid.alpha, target_modules=sorted(laid.modules), seed=seed, ranks=dict(laid.ranks),
        asked=laid.asked, splits=splits_of(laid), probe=probes.take({m: by_name[m].shape for m in laid.modules}, read),
        base_model_name_or_path=str(model), task_type="CAUSAL_LM" if is_causal(meta) else None, inference_mode=True,
    )  # fmt: skip
    write_folder(folder, tensors, plain(config))
    return Initialised(folder, laid.ranks, records, trained, host.parameters())


def _with_cache(laid: Design, module: str, cache: FactorCache | None, matrix: Any, seed: int) -> Design:
    """The design, with the triples of one layer from the cache."""
    from dataclasses import replace

    if cache is None or not cacheable(laid.recipe):
        return laid
    known = dict(laid.known)
    for place in laid.of(module):
        site = place.site
        rank = laid.ranks[site.name]

        def compute(most: int, place: Place = place, site: Site = site) -> Any:
            return factorise(laid.recipe, site, lambda _s: matrix(place), NoStats(), most, seed=seed)

        found = cache.get(site, rank, compute)
        if found is not None:
            known[site.name] = found
    return replace(laid, known=known)


def plain(config: Any) -> dict[str, Any]:
    """A config of PEFT as JSON holds it."""
    out = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.to_dict().items()}
    return {k: v for k, v in out.items() if k != "runtime_config"}
