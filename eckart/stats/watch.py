"""Statistics that are not of a linear's input or output: rows of an embedding that are read, what a block does, what experts do.

- "frequency" at an embedding: how often each row is read.
- "influence" at a block: 1 - cos(input, output), mean over tokens (Block Influence, ShortGPT 2024).
- "experts" at stacked experts: E² mean cosines between the outputs of all experts on all tokens that reach them, row by row, then E mean numbers of
  times that a token is routed to each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import Refused
from .probes import refuse_unless_finite

if TYPE_CHECKING:
    from .record import Recorder
    from .slots import Slot

CHUNK = 1024  # tokens whose outputs of all experts are held at once


def watch(model: nn.Module, slot: Slot, recorder: Recorder) -> Any:
    """Hook the module of such a slot; returns the handle."""
    try:
        module = model.get_submodule(slot.where if slot.stat.at == "block" else slot.site.name)
    except AttributeError as error:
        raise Refused(f"{slot.where}: the model has no such module. The catalogue is of another model.") from error
    if slot.stat.kind == "frequency":
        return module.register_forward_pre_hook(lambda _m, args, kwargs: _rows(slot, recorder, _tensors(args, kwargs)[0]), with_kwargs=True)
    if slot.stat.kind == "influence":
        return module.register_forward_hook(
            lambda _m, args, kwargs, out: _influence(slot, recorder, _tensors(args, kwargs)[0], out), with_kwargs=True
        )
    return module.register_forward_pre_hook(lambda m, args, kwargs: _experts(slot, recorder, m, _tensors(args, kwargs)), with_kwargs=True)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]


def _rows(slot: Slot, recorder: Recorder, ids: Tensor) -> None:
    from .record import Sums

    rows, weights = recorder.layout.rows(ids.unsqueeze(-1), slot.site.name)
    flat = rows.reshape(-1).cpu()
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < slot.width:
        raise Refused(f"{slot.site.name}: calibration batch {recorder.layout.leaf} reads row {int(flat.max())} of {slot.width}.")
    count = torch.ones(len(flat), dtype=torch.float64) if weights is None else weights.cpu().double()
    if len(flat):
        recorder.keep(slot, Sums(float(count.sum()), torch.bincount(flat, weights=count, minlength=slot.width)))


def _influence(slot: Slot, recorder: Recorder, x: Tensor, output: Any) -> None:
    from .record import Sums

    y = output if isinstance(output, Tensor) else next((o for o in output if isinstance(o, Tensor)), None)
    if y is None or y.shape != x.shape:
        found = None if y is None else tuple(y.shape)
        raise Refused(f"{slot.where}: a block's influence needs an output like its input, found {tuple(x.shape)} and {found}.")
    before, weights = recorder.layout.rows(x, slot.where)
    after, _ = recorder.layout.rows(y, slot.where)
    turned = 1 - nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    refuse_unless_finite(turned, f"{slot.where}: its output", recorder.layout.leaf)
    if weights is not None:
        turned = turned * weights.double()
    count = float(len(turned)) if weights is None else float(weights.sum(dtype=torch.float64))
    if count:
        recorder.keep(slot, Sums(count, turned.sum().reshape(1).cpu()))


@torch.no_grad()
def _experts(slot: Slot, recorder: Recorder, module: Any, tensors: list[Tensor]) -> None:
    from .record import Sums

    count = slot.site.shape[0]
    if len(tensors) < 3 or tensors[1].is_floating_point() or tensors[0].shape[:-1] != tensors[1].shape[:-1]:
        raise Refused(
            f"{slot.where}: expected experts that take (hidden states, chosen experts, weights), found {[tuple(t.shape) for t in tensors]}."
        )
    hidden, weights = recorder.layout.rows(tensors[0], slot.where)
    chosen, _ = recorder.layout.rows(tensors[1], slot.where)
    weight = torch.ones(len(hidden), dtype=torch.float64) if weights is None else weights.cpu().double()
    routed = torch.zeros(count, dtype=torch.float64)
    for column in chosen.T.cpu():
        good = column < count  # an index beyond the experts stands for none
        routed += torch.bincount(column[good], weights=weight[good], minlength=count)
    cosines = torch.zeros(count, count, dtype=torch.float64)
    for at in range(0, len(hidden), CHUNK):
        part = hidden[at : at + CHUNK]
        one = part.new_ones(len(part), 1)
        found = [module.forward(part, torch.full_like(one, i, dtype=torch.long), one) for i in range(count)]
        unit = nn.functional.normalize(torch.stack(found).double().cpu(), dim=-1) * weight[at : at + CHUNK].sqrt()[:, None]
        flat = unit.reshape(count, -1)
        cosines += flat @ flat.T
    refuse_unless_finite(cosines, f"{slot.where}: an expert's output", recorder.layout.leaf)
    if len(hidden):
        recorder.keep(slot, Sums(float(weight.sum()), torch.cat([cosines.reshape(-1), routed])))
