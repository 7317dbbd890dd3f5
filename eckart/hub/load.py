"""Open a model folder, factored or dense: the right class, nothing pickled, no code from the folder, nothing left random."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import Refused, UsageError, did_you_mean
from ..store import Reader
from . import identify
from .identify import is_causal, is_encoder

if TYPE_CHECKING:
    import torch

__all__ = ["is_causal", "is_encoder", "load", "load_tokenizer", "meta_model"]

_SHOWN = 5  # keys named in a refusal
_FIXED = (
    ("trust_remote_code", "eckart never runs code from a model folder"),
    ("use_safetensors", "only safetensors are read"),
    ("output_loading_info", "what would be missing is refused, so there is nothing to look up"),
)


def load(
    path: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None, **kw: Any
) -> Any:
    """Load a model that eckart compressed, or any other transformers model, in evaluation mode.

    Stricter than `from_pretrained`: only safetensors are read, no code of the folder is run, and a weight that would be left at
    random stops the load. It does not compress, and does not fetch the tokenizer.

    Args:
        path: a folder, or the id of a model on the Hugging Face Hub.
        dtype: type of the weights; None takes the one in `config.json`.
        device: where the model goes, for instance "cuda"; None leaves it on the CPU. For several devices pass `device_map` instead.
        **kw: for transformers: `device_map`, `offload_folder`, `attn_implementation`, `revision`, `cache_dir`, `token`...

    Returns:
        The model, an instance of the class that `config.json` names, else of the base class of its `model_type`.

    Raises:
        UsageError: transformers is not installed, or the call contradicts itself.
        Refused: no such folder, no `config.json`, unknown `model_type`, a model that needs its own code, weights that are pickled,
            damaged, missing or of another shape.

    Example:
        >>> load("no/such/folder")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        eckart.errors.Refused: no/such/folder: no such folder...
    """
    for name, why in _FIXED:
        if name in kw:
            raise UsageError(f"load: {name} cannot be set: {why}.")
    if device is not None and kw.get("device_map") is not None:
        raise UsageError("load: give device or device_map, not both.")
    identify.need_transformers()
    where, options = identify.locate(path, {"dtype": _dtype(dtype), **kw})
    config = identify.read_config(where, options)
    cls = identify.model_class(where, config)
    folder = identify.folder_of(where, options)
    if folder is not None and "variant" not in kw:
        Reader(folder)  # index and headers as hostile input, before anything is allocated
    factored = identify.is_factored(config)
    if factored:
        from .quantizer import register

        register()
    model, info = _read(where, cls, config, options)
    body = None if factored else _body_instead(cls, config, info["missing_keys"])
    if body is not None:
        head = _some(sorted(info["missing_keys"]))
        warnings.warn(
            f"{where}: config.json names {cls.__name__}, but its head ({head}) is not in the file; loaded as {body.__name__}.", stacklevel=2
        )
        model, info = _read(where, body, config, options)
    _account(where, model, info, factored)
    return model if device is None else model.to(device)


def load_tokenizer(path: str | os.PathLike[str], **kw: Any) -> Any:
    """The tokenizer of a folder or Hub id. No code of the folder is run.

    Args:
        path: as for `load`.
        **kw: for `AutoTokenizer.from_pretrained`.

    Raises:
        UsageError: transformers is not installed, or trust_remote_code is given.
        Refused: there is no tokenizer, or it needs its own code.
    """
    transformers = identify.need_transformers()
    if "trust_remote_code" in kw:
        raise UsageError("load_tokenizer: trust_remote_code cannot be set: eckart never runs code from a model folder.")
    where, options = identify.locate(path, kw)
    try:
        return transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # whatever a stranger's files make a tokenizer raise
        raise Refused(f"{where}: no tokenizer could be read: {type(error).__name__}: {identify.first_line(error)}") from error


def meta_model(path: str | os.PathLike[str], **kw: Any) -> Any:
    """The model of a folder without its weights: names, shapes and ties on the meta device, from `config.json` alone.

    A folder that eckart compressed gives a model with `LowRankLinear` layers, as `load` would.

    Args:
        path: as for `load`.
        **kw: `revision`, `cache_dir`, `token`, `subfolder`, `local_files_only`.

    Raises:
        UsageError: transformers is not installed, or an unknown option.
        Refused: as `load`, for what the config can show.
    """
    identify.need_transformers()
    from .skeleton import skeleton

    unknown = sorted(set(kw) - set(identify.WHENCE))
    if unknown:
        raise UsageError(f"meta_model: unknown option {unknown[0]!r}.{did_you_mean(unknown[0], identify.WHENCE)}")
    where, options = identify.locate(path, kw)
    config = identify.read_config(where, options)
    cls = identify.model_class(where, config)
    try:
        model = skeleton(cls, config)
    except Exception as error:  # sizes in a stranger's config.json that no module can have
        raise Refused(
            f"{path}: {cls.__name__} cannot be built from its config.json: {type(error).__name__}: {identify.first_line(error)}"
        ) from error
    if identify.is_factored(config):
        from .config import EckartConfig
        from .quantizer import mark, plant, settle

        settled = settle(model, EckartConfig.from_dict(config.quantization_config))
        plant(model, settled)
        mark(model, settled)
    return model


def _dtype(dtype: torch.dtype | str | None) -> Any:
    import torch

    if dtype is None or dtype == "auto":
        return "auto"
    found: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"load: expected dtype to be a floating-point type such as 'bfloat16' or torch.float32, found {dtype!r}.")
    return found


def _read(where: str, cls: Any, config: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # sizes that differ are collected instead of raised, so that `_account` can name them
    fixed = {"config": config, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        with _no_bars():
            return cls.from_pretrained(where, **{**options, **fixed, "ignore_mismatched_sizes": True})
    except OSError as error:
        raise Refused(f"{where}: the weights could not be read: {identify.first_line(error)}") from error


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a bar for every load; what is shown is the caller's choice."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _body_instead(cls: Any, config: Any, missing: Any) -> Any:
    """The class without a head, when all that a file lacks is the head: usual for sentence encoders."""
    base = identify.base_class(config)
    prefix = f"{getattr(cls, 'base_model_prefix', '')}."
    if not missing or base is None or base is cls or prefix == "." or any(key.startswith(prefix) for key in missing):
        return None
    return base


def _some(keys: list[Any]) -> str:
    return ", ".join(str(k) for k in keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def _account(where: str, model: Any, info: dict[str, Any], factored: bool) -> None:
    """Refuse what would leave weights random, and in a factored folder also what was left unread."""
    kind = type(model).__name__
    other = sorted(info["mismatched_keys"], key=str)
    if other:
        key, found, expected = other[0]
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        raise Refused(f"{where}: {key} has shape {tuple(found)}, {kind} expects {tuple(expected)}{more}.")
    missing = sorted(info["missing_keys"])
    if missing:
        raise Refused(f"{where}: {len(missing)} weights of {kind} are not in the file and would be random: {_some(missing)}.")
    unread = sorted(info["unexpected_keys"])
    if factored and unread:
        raise Refused(f"{where}: {len(unread)} tensors of the file have no place in {kind}: {_some(unread)}.")
