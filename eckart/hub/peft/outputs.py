"""Terms on the logits of a model that trains: their gradients join those of the task's loss, whatever that loss is and however it is scaled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...axes.loss import Output
from ...errors import UsageError
from ...modes import evaluating
from ...verbs.host import is_causal
from .layer import EckartLayer


@dataclass
class Scale:
    """How the losses of one step's forward passes are put together, where that cannot be read off the loss itself.

    Args:
        accumulate: forward passes per step.
        processes: that the gradient is averaged over, where losses are multiplied by it first.
        scaler: a `GradScaler` or None.
    """

    accumulate: int = 1
    processes: int = 1
    scaler: Any = None


class OutputTerms:
    """A forward hook of the whole model.

    Where the model returns its own loss, the terms' gradients are attached to it and go through all that the trainer does with it. Where the
    loss is made of the logits elsewhere (label smoothing, a loss function), they are attached to the logits, with the scale of a step as
    `Scale` has it. Neither number changes.

    Args:
        model: with adapters of ours.
        terms: what acts now; empty for none.
        scale: of the run.
    """

    def __init__(self, model: nn.Module, terms: Callable[[], Sequence[Output]], scale: Scale) -> None:
        self.model, self.terms, self.scale = model, terms, scale
        self.causal = is_causal(model)
        self._inside = False
        self._handle = model.register_forward_hook(self._hook, with_kwargs=True)

    def remove(self) -> None:
        """Detach from the model."""
        self._handle.remove()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._inside or not module.training or not torch.is_grad_enabled():
            return None
        terms = [t for t in self.terms() if t.weight]
        if not terms:
            return None
        logits = logits_of(output)
        if logits is None:
            raise UsageError(
                f"{terms[0].axis}.{terms[0].kind} is a term on logits, and {type(self.model).__name__} returned {type(output).__name__} without any."
            )
        chosen = positions(logits, kwargs, self.causal)
        rows = logits[chosen].float()
        if not len(rows):
            return None
        reference = self._reference(args, kwargs, chosen) if any(t.compares for t in terms) else None
        total = torch.stack([t.weight * t.of(rows, reference) for t in terms]).sum()
        items = kwargs.get("num_items_in_batch")
        share = 1.0 if items is None else len(rows) / float(items)
        loss = getattr(output, "loss", None)
        if loss is not None:
            extra = total * share
            output.loss = loss + (extra - extra.detach())
            return output
        factor = share * self.scale.processes if items is not None else 1 / self.scale.accumulate
        attached = _Attach.apply(logits, total * factor, self.scale.scaler)
        if isinstance(output, Tensor):
            return attached
        output.logits = attached
        return output

    def _reference(self, args: tuple[Any, ...], kwargs: dict[str, Any], chosen: Tensor) -> Tensor:
        """Logits of the model without its adapters, at the same positions."""
        plain = {k: v for k, v in kwargs.items() if k not in ("labels", "num_items_in_batch")}
        self._inside = True
        try:
            with torch.no_grad(), evaluating(self.model), _without_adapters(self.model):
                found = logits_of(self.model(*args, **plain))
                assert found is not None
                return found[chosen].float()
        finally:
            self._inside = False


class _Attach(torch.autograd.Function):
    """The identity, whose backward pass also starts that of a term."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, term: Tensor, scaler: Any) -> Tensor:
        ctx.scaler = scaler
        ctx.like = term.detach()
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        one = torch.ones_like(ctx.like)
        return gradient, one if ctx.scaler is None or not ctx.scaler.is_enabled() else one * ctx.scaler.get_scale(), None


def logits_of(output: Any) -> Tensor | None:
    """The logits in what a model returns; a bare tensor is taken for them."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", None)


def positions(logits: Tensor, inputs: dict[str, Any], causal: bool) -> Tensor:
    """Mask over all but the last axis of the logits: the rows whose prediction is learnt from.

    Args:
        logits: (batch, classes) or (batch, length, classes).
        inputs: of the model.
        causal: position i predicts token i + 1.
    """
    shape = logits.shape[:-1]
    out = torch.ones(shape, dtype=torch.bool, device=logits.device)
    labels, mask, shifted = (inputs.get(k) for k in ("labels", "attention_mask", "shift_labels"))
    if len(shape) < 2:
        return out
    known = shifted != -100 if shifted is not None else labels != -100 if labels is not None else mask != 0 if mask is not None else out
    if known.shape != out.shape:
        raise UsageError(
            f"the logits have shape {tuple(logits.shape)}, and labels or attention mask {tuple(known.shape)}: they do not fit."
        )
    if causal and shifted is None:
        out[:, -1] = False
        out[:, :-1] = known[:, 1:]
        return out
    return known.to(out.device)


@contextlib.contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Adapters do nothing within the block. PEFT's own switch would also set which parameters train."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, EckartLayer | AuxiliaryTrainingWrapper)]
    before = [m._disable_adapters for m in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
