"""What `adapter_config.json` says of an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from peft import PeftConfig

from ...axes import Recipe
from ...axes.border import from_dict, to_dict
from ...errors import Refused
from ...verbs.adapt_request import resolve
from .register import grow

FORMAT = 1


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class EckartConfig(PeftConfig):
    """Config of an adapter of any recipe. It holds the whole recipe, not its name, so that an adapter means the same in a later release.

    Not a recipe itself: what is chosen on each axis is `recipe`; the rest says where it goes and what a run has decided.

    Args:
        recipe: a name from `eckart ls --verb adapt`, a `Recipe`, or one as plain data.
        r: rank; None is the recipe's own budget.
        alpha: numerator of the scale: a number, "r", or a multiple such as "2r"; None is the recipe's.
        target_modules: names (or ends of names) of layers, "all-linear", or a regular expression; None is the recipe's target.
        exclude_modules: likewise, of layers to leave alone.
        variant: one of the recipe's named forms.
        glue: recipes whose training pieces act beside.
        base: "subtract" or "mutate"; None is the recipe's.
        settings: overrides such as "form.balance=left".
        rank_pattern: regular expression of a layer's name -> its rank.
        dropout: of the inputs of the branch; None is the recipe's.
        seed: of what is drawn.
        modules_to_save: as in PEFT: modules that train whole and are saved whole.
        layers_to_transform, layers_pattern: as in PEFT.
        ranks, splits, asked, probe, format_version: what a run decided; written by it, not by hand.

    Raises:
        UsageError: a recipe or setting that does not exist, or does not fit.
        Refused: a config of a newer release.

    Example:
        >>> EckartConfig(recipe="pissa", r=4, target_modules=["q_proj"]).recipe["name"]
        'pissa'
    """

    # Optional and Union: PEFT reads these annotations at run time
    recipe: Any = field(default="lora", metadata=_help("Name of a recipe, or the whole recipe as plain data."))
    r: Optional[Union[int, float]] = field(default=None, metadata=_help("Rank."))  # noqa: UP007, UP045
    alpha: Optional[Union[int, float, str]] = field(default=None, metadata=_help("Numerator of the scale."))  # noqa: UP007, UP045
    target_modules: Optional[Union[list[str], str]] = field(default=None, metadata=_help("Layers to adapt."))  # noqa: UP007, UP045
    exclude_modules: Optional[Union[list[str], str]] = field(default=None, metadata=_help("Layers to leave alone."))  # noqa: UP007, UP045
    variant: Optional[str] = field(default=None, metadata=_help("Named form of the recipe."))  # noqa: UP045
    glue: Any = field(default=(), metadata=_help("Recipes whose training pieces act beside."))
    base: Optional[str] = field(default=None, metadata=_help("subtract or mutate."))  # noqa: UP045
    settings: Any = field(default=(), metadata=_help("Overrides, axis.field=value."))
    rank_pattern: Optional[dict[str, int]] = field(default=None, metadata=_help("Pattern of names -> rank."))  # noqa: UP045
    dropout: Optional[float] = field(default=None, metadata=_help("Dropout of the branch's input."))  # noqa: UP045
    seed: int = field(default=0, metadata=_help("Seed of what is drawn."))
    modules_to_save: Optional[list[str]] = field(default=None, metadata=_help("Modules trained and saved whole."))  # noqa: UP045
    layers_to_transform: Optional[Union[list[int], int]] = field(default=None, metadata=_help("Indices of layers."))  # noqa: UP007, UP045
    layers_pattern: Optional[Union[list[str], str]] = field(default=None, metadata=_help("Name of the list of layers."))  # noqa: UP007, UP045
    ranks: Optional[dict[str, int]] = field(default=None, metadata=_help("Rank of each matrix, decided."))  # noqa: UP045
    splits: Optional[dict[str, dict[str, list[int]]]] = field(default=None, metadata=_help("Rows of the matrices in fused layers."))  # noqa: UP045
    asked: Optional[int] = field(default=None, metadata=_help("Rank the run asked for."))  # noqa: UP045
    probe: Optional[dict[str, Any]] = field(default=None, metadata=_help("What the base model must look like."))  # noqa: UP045
    format_version: int = field(default=FORMAT, metadata=_help("Of these fields."))

    def __post_init__(self) -> None:
        super().__post_init__()
        from peft.utils.peft_types import PeftType

        self.peft_type = grow(PeftType)
        if not isinstance(self.format_version, int) or self.format_version > FORMAT:
            raise Refused(
                f"adapter_config.json: format_version {self.format_version!r} is newer than this release reads ({FORMAT}). Next: pip install -U eckart"
            )
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)  # pyright: ignore[reportAttributeAccessIssue]
        found = from_dict(self.recipe) if isinstance(self.recipe, dict) else self.recipe
        found = resolve(found, self.r, variant=self.variant, glue=tuple(self.glue), base=self.base, settings=tuple(self.settings))
        self.recipe = to_dict(found)
        self._parsed = found
        # all of it is in the recipe now: a reload must not apply it again
        self.variant, self.glue, self.base, self.settings = None, (), None, ()
        self.fresh = self.ranks is None
        self.statistics: Any = None

    @property
    def value(self) -> Recipe:
        """The recipe."""
        return self._parsed

    def to_dict(self) -> dict[str, Any]:
        """As `adapter_config.json` holds it, in a fixed order."""
        out = super().to_dict()
        for key in ("target_modules", "exclude_modules"):
            if isinstance(out[key], set):
                out[key] = sorted(out[key])
        out["glue"], out["settings"] = list(out["glue"]), list(out["settings"])
        return out
