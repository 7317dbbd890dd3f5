"""How the tensors of a file are called in the model: transformers renames, stacks and joins some of them while it loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Named = dict[str, tuple[str, ...]]


def file_names(model: Any, keys: Iterable[str]) -> Named:
    """For each tensor of a transformers model, the keys of the file that hold it, as its own loader would find them.

    Several keys stand for experts that the file holds one by one and the model in one stack: expert after expert, of each its parts in the order in
    which they are joined. Tensors that are put together in any other way are left out.

    Args:
        model: on the meta device or not.
        keys: of the file.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> with __import__("torch").device("meta"):
        ...     model = GPT2LMHeadModel(GPT2Config(n_layer=1))
        >>> file_names(model, ["wte.weight"])["transformer.wte.weight"]
        ('wte.weight',)
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    order = {p: (c, i) for c in converters for i, p in enumerate(c.source_patterns)}
    wanted = model.state_dict()
    prefix = getattr(model, "base_model_prefix", None) or None
    found: dict[str, list[tuple[Any, int, str]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted:
            continue
        converter, part = order.get(pattern, (None, 0)) if pattern is not None else (None, 0)
        found.setdefault(name, []).append((converter, part, key))
    out: Named = {}
    for name, rows in found.items():
        if all(c is None for c, _, _ in rows):
            if len(rows) == 1:
                out[name] = (rows[0][2],)
        elif _stacks(rows[0][0]):
            parts = [[k for _, part, k in rows if part == i] for i in range(len(rows[0][0].source_patterns))]
            if len({len(p) for p in parts}) == 1:
                out[name] = tuple(k for expert in zip(*parts, strict=True) for k in expert)
    return out


def _stacks(converter: Any) -> bool:
    """Whether a converter stacks experts and joins the parts of each along their rows, and does nothing else."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *more = converter.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    joins = not more if len(converter.source_patterns) == 1 else len(more) == 1 and isinstance(more[0], Concatenate) and more[0].dim == 1
    return stacks and joins and len(converter.target_patterns) == 1
