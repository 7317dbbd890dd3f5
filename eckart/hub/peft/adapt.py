"""`adapt`: put adapters of a recipe beside the layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...axes import Recipe
from ...errors import UsageError
from ...verbs.adapt_request import chosen, refuse_without_data, resolve
from ...verbs.calibrate import Calibration, is_tensors, load_calibration
from ...verbs.encoded import measure_for_adapter
from ...verbs.host import ModuleHost, is_causal
from .register import register

if TYPE_CHECKING:
    from peft import PeftModel

    from ...stats import Stats


def adapt(
    model: Any,
    recipe: str | Recipe = "lora",
    rank: float | None = None,
    *,
    calib: Any = None,
    target: str | Iterable[str] | None = None,
    alpha: float | str | None = None,
    variant: str | None = None,
    glue: Sequence[str | Recipe] = (),
    base: str | None = None,
    seed: int = 0,
    settings: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    dropout: float | None = None,
    adapter_name: str = "default",
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int = 8,
    stats: Stats | str | Path | None = None,
    loss: Any = None,
    **peft: Any,
) -> PeftModel:
    """Add trainable adapters to a model, initialised as the recipe says. It does not train them.

    The model's own weights keep their bits (except with `base="mutate"`), and its output does not change unless the recipe says so.
    The result is an ordinary `PeftModel`: `save_pretrained`, `PeftModel.from_pretrained`, `merge_and_unload`, Trainer.

    Args:
        model: a torch module, changed in place as PEFT does; a `PeftModel` with adapters of ours gets another one; or a folder to load.
        recipe: a name from `eckart ls --verb adapt`, or a `Recipe`.
        rank: triples of each matrix, or a share of its smaller side; the mean where an allocation spreads them. None is the recipe's budget.
        calib: texts, lists of token ids, a path, or input tensors of a plain module; needed by recipes that measure something.
        target: names (or ends of names) of layers, or one regular expression; None is the recipe's own target.
        alpha: numerator of the scale: a number, "r", "2r"; None is the recipe's.
        variant: one of the recipe's named forms, for instance "kpm" of corda.
        glue: recipes whose penalties, gradients and refreshes act beside the recipe's own; see `ek.glue`.
        base: "subtract" leaves the weights alone, "mutate" takes the initial branch out of them. None is the recipe's.
        seed: of everything that is drawn.
        settings: overrides such as "form.balance=left".
        rank_pattern: regular expression of a layer's name -> its rank.
        dropout: of the inputs of the branch; None is the recipe's.
        adapter_name: its name in PEFT.
        tokenizer: for a module that does not know its own.
        max_length: tokens per calibration text.
        batch_size: calibration texts per forward pass.
        stats: statistics of an earlier run on the same model and data, or a file of them.
        loss: for a plain module under a recipe with gradients: (output, batch) -> scalar.
        **peft: further fields of `EckartConfig`, for instance task_type, modules_to_save, layers_to_transform.

    Returns:
        The model with its adapter, ready to train; recipes with a penalty, a refresh or a protected part also want `ek.glue`.

    Raises:
        UsageError: an unknown recipe or setting, a rank above a layer, a target that matches nothing, missing calibration.
        Refused: weights or activations that are not finite, a quantised base with base="mutate".

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> x = torch.randn(2, 8)
        >>> before = net(x)
        >>> bool((adapt(net, "pissa", rank=2)(x) == before).all())
        True
    """
    register()
    from peft import PeftModel, get_peft_model

    from .config import EckartConfig
    from .tuner import EckartModel, layers_able

    if isinstance(model, str | Path):
        from ..load import load

        model = load(str(model))
    if not isinstance(model, PeftModel) and getattr(model, "peft_config", None):
        raise UsageError(
            "this model already carries adapters. Pass the PeftModel that holds it (another adapter is added there), call "
            "model.add_adapter(EckartConfig(...)) where transformers holds it, or unload them first."
        )
    found = resolve(recipe, rank, variant=variant, glue=glue, base=base, settings=settings)
    refuse_without_data(found, calib, stats)
    inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
    names = peft.pop("target_modules", target)
    given: Any = None if stats is None or isinstance(stats, str | Path) else stats
    texts = load_calibration(calib, found.needs() if given is None else frozenset(), found.name)
    if found.needs() and given is None:
        how = Calibration(texts, max_length, batch_size, seed, loss=loss, file=Path(stats) if isinstance(stats, str | Path) else None)
        given = _measure(model, inner, found, names, how, tokenizer, layers_able(inner))
    config = EckartConfig(
        recipe=found, alpha=alpha, target_modules=_targets(names), seed=seed, rank_pattern=dict(rank_pattern) if rank_pattern else None,
        dropout=dropout, task_type=peft.pop("task_type", _task(inner)), **peft,
    )  # fmt: skip
    config.statistics = given
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, EckartModel):
            raise UsageError(
                "the model already holds adapters of another PEFT method. Merge or unload them first: model = model.merge_and_unload()."
            )
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
        return model
    return get_peft_model(model, config, adapter_name=adapter_name)


def refuse_misfit(model: Any, recipe: Recipe, target: Any = None, alpha: float | str | None = None, **_: Any) -> None:
    """Say that a recipe does not fit a model, from shapes alone: layers that are not there, a rank above one. What needs spectra is left to `adapt`.

    Args:
        model: without adapters.
        recipe, target, alpha: as in `adapt`.

    Raises:
        UsageError: it does not.
    """
    from ...catalogue import from_model
    from ...verbs.adapt import NoStats, design, lay
    from .tuner import layers_able

    sites = chosen(recipe, layers_able(model), from_model(model), _targets(target))
    if recipe.allocate.decides == "shape" and recipe.budget.kind not in ("energy", "error", "threshold"):
        reads: Any = None  # nothing is, where shapes decide
        design(recipe, lay(recipe, sites, getattr(model, "config", None)), reads, NoStats(), alpha=alpha)


def _targets(names: Any) -> Any:
    if names is not None and not isinstance(names, str) and not list(names):
        raise UsageError("target: expected names of layers, found none.")
    return names if names is None or isinstance(names, str) else list(names)


def _task(model: Any) -> str | None:
    """The task type under which PEFT knows a language model; None for everything else."""
    return "CAUSAL_LM" if hasattr(model, "config") and hasattr(model, "generate") and is_causal(model) else None


def _measure(model: Any, inner: Any, recipe: Recipe, names: Any, how: Calibration, tokenizer: Any, sites: Sequence[Any]) -> Any:
    """The statistics of the targeted layers, on the model without its adapters."""
    import contextlib

    from .tuner import without_adapters

    texts = how.texts
    host = ModuleHost(inner, tokenizer, texts[0][:1] if is_tensors(texts) else None)
    catalogue = host.catalogue
    known = {s.name.removesuffix(".base_layer"): s for s in catalogue.sites}
    wanted = chosen(recipe, sites, without_adapters(catalogue), _targets(names))
    traced = [known[s.name] for s in wanted if s.name in known]
    quiet = model.disable_adapter() if hasattr(model, "disable_adapter") and inner is not model else contextlib.nullcontext()
    with quiet:
        return measure_for_adapter(host, recipe.needs(), traced, how)
