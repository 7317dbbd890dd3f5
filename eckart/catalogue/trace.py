"""Which matrices read the same tensor: one forward pass with hooks. Never guessed from names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site
from ..errors import Refused
from ..modes import evaluating

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def trace_reads(model: nn.Module, sites: Sequence[Site], example: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Input ids by site name, and notes on the sites whose input has none.

    Two inputs are the same when storage, offset, shape, strides and version agree; the version tells a tensor from what an in-place
    operation made of it. Inputs stay referenced during the pass, so that no address is used twice.

    Raises:
        Refused: the forward fails. On the meta device it may (data-dependent routing): then every site reads its own name and the
            note under the empty name says why, since a catalogue without shared inputs is right, only dearer.
    """
    import torch

    calls: dict[str, list[Tensor | None]] = {s.name: [] for s in sites}
    first: dict[tuple[Any, ...], str] = {}
    ids: dict[str, str] = {}

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
            calls[name].append(x)
            if x is not None and len(calls[name]) == 1:
                key = (storage_id(x), x.storage_offset(), tuple(x.shape), x.stride(), x.dtype, x._version)
                ids[name] = first.setdefault(key, name)

        return hook

    modules = dict(model.named_modules())
    hooked = {s.name: modules[s.name] for s in sites if s.kind != "other" and s.name in modules}
    place = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    handles = [m.register_forward_pre_hook(hook_for(n), with_kwargs=True) for n, m in hooked.items()]
    try:
        with evaluating(model), torch.no_grad():
            args, kwargs = _arguments(example, place)
            model(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        if place.type != "meta" or isinstance(error, TypeError):
            raise Refused(f"{type(model).__name__}: the forward pass on the example failed: {error}") from error
        reason = f"the forward pass cannot run on the meta device ({str(error).splitlines()[0]}); no input is known to be shared"
        return {}, {"": reason}
    finally:
        for handle in handles:
            handle.remove()
    return _resolve(hooked, calls, ids)


def storage_id(tensor: Tensor) -> int:
    """The same number for tensors on one storage while it lives, on the meta device too, where there is no address."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _resolve(hooked: Mapping[str, Any], calls: Mapping[str, list[Any]], ids: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    reads: dict[str, str] = {}
    notes: dict[str, str] = {}
    owner: dict[str, str] = {}  # first reader -> the first reader that is called once
    for name in hooked:
        count = len(calls[name])
        if count == 1 and name in ids:
            continue
        reads[name] = name
        notes[name] = "reads no tensor" if count == 1 else f"called {count} times by the example" if count else "not called by the example"
    for name in hooked:
        if name not in reads:
            owner.setdefault(ids[name], ids[name] if ids[name] not in reads else name)
            reads[name] = owner[ids[name]]
    return reads, notes


def _arguments(example: Any, place: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import torch

    def move(x: Any) -> Any:
        return x.to(place) if isinstance(x, torch.Tensor) else x

    if isinstance(example, Mapping):
        return (), {k: move(v) for k, v in example.items()}
    if hasattr(example, "input_ids") and hasattr(example, "attention_mask"):
        return (), {"input_ids": move(example.input_ids), "attention_mask": move(example.attention_mask)}
    if isinstance(example, tuple | list):
        return tuple(move(x) for x in example), {}
    return (move(example),), {}
