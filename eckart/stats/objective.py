"""The mean loss of a model over batches as a function of its parameters, which it leaves as they are."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refused, UsageError
from ..modes import evaluating
from .collect import unpack
from .probes import task_loss

State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Objective:
    """L(w) = sum of the losses of all batches over their total weight, at any w. Not a trainer: nothing is stepped, no `.grad` is touched.

    With next-token cross-entropy the weight of a batch is its number of predicted tokens, and L is nats per token. With a loss of one's own
    it is 1, and L is the mean over batches of what the loss returns (its sum, where it returns a value per sample).

    Args:
        model: run in evaluation mode.
        batches: as for `collect`; of a tuple of tensors only as many are handed to the model as its `forward` takes, so labels may follow.
        loss: (output, batch) -> scalar or one value per sample; None is next-token cross-entropy.
        dtype: of the parameters, buffers and real inputs during the run; None keeps the widest of float32 and the model's own.

    Raises:
        Refused: no batch, no parameter, or nothing to predict.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> batch = (torch.eye(2), torch.zeros(2, 1))
        >>> L = Objective(net, [batch], loss=lambda y, b: (y - b[1]).square().mean())
        >>> abs(L.mean(L.state()) - net.weight.square().mean().item()) < 1e-6
        True
    """

    model: nn.Module
    batches: Sequence[Any]
    loss: Callable[[Any, Any], Tensor] | None = None
    dtype: torch.dtype | None = None
    _weights: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not len(self.batches):
            raise Refused("loss: expected at least one calibration batch, found none.")
        if not any(p.is_floating_point() for p in self.model.parameters()):
            raise Refused(f"{type(self.model).__name__}: holds no real parameters (quantised?), so its loss has no derivative.")
        for i in range(len(self.batches)):
            self._weights.append(self._weight(i))
        if self.total == 0:
            raise Refused("loss: the calibration batches hold no token that follows another one.")

    @cached_property
    def compute(self) -> torch.dtype:
        """The dtype of the run."""
        if self.dtype is not None:
            return self.dtype
        return torch.float64 if any(p.dtype == torch.float64 for p in self.model.parameters()) else torch.float32

    @property
    def total(self) -> float:
        """Sum of the weights: predicted tokens, or batches."""
        return sum(self._weights)

    @property
    def weights(self) -> Tensor:
        """(batches,) float64."""
        return torch.tensor(self._weights, dtype=torch.float64)

    @property
    def unit(self) -> str:
        """What the loss is counted in."""
        return "nats per token" if self.loss is None else "the given loss per batch"

    def state(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Real parameters and buffers by name, detached, in the dtype of the run; of another model of the same names, if one is given."""
        source = model if model is not None else self.model
        named = [*source.named_parameters(), *source.named_buffers()]
        return {k: t.detach().to(self.compute) for k, t in named if t.is_floating_point()}

    def losses(self, state: State) -> Tensor:
        """(batches,) loss of each batch per unit of its weight, float64; NaN where it has none."""
        found = []
        with torch.no_grad():
            for i in range(len(self.batches)):
                found.append(float(self.term(state, i)[0]))
        return torch.tensor(found, dtype=torch.float64) / self.weights

    def mean(self, state: State) -> float:
        """L(w)."""
        found, weights = self.losses(state), self.weights
        return float((found * weights)[weights > 0].sum() / weights.sum())

    def term(self, state: State, i: int) -> tuple[Tensor, Any]:
        """(summed loss of batch i, output of the model) at a state; differentiable where the state's tensors ask for it."""
        args, kwargs, ids, mask = self._inputs(i)
        with self._running():
            output = torch.func.functional_call(self.model, dict(state), args, kwargs)
            return task_loss(output, ids, mask, self.loss, self.batches[i]), output

    def _inputs(self, i: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None, Tensor | None]:
        batch = self.batches[i]
        args, kwargs, _, ids, mask = unpack(self.model, i, arguments(self.model, batch), False)
        args = tuple(self._cast(a) for a in args)
        return args, {k: self._cast(v) for k, v in kwargs.items()}, ids, mask

    def _cast(self, x: Any) -> Any:
        return x.to(self.compute) if isinstance(x, Tensor) and x.is_floating_point() else x

    def _weight(self, i: int) -> float:
        if self.loss is not None:
            return 1.0
        _, _, ids, mask = self._inputs(i)
        if ids is None:
            raise UsageError("loss: batches without token ids need a loss of their own; pass loss=(output, batch) -> scalar.")
        return float(ids[:, 1:].numel() if mask is None else (mask[:, 1:] != 0).sum())

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Evaluation mode, and attention by plain products: fused kernels have no second derivative."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with evaluating(self.model), torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH):
            yield


def arguments(model: nn.Module, batch: Any) -> Any:
    """A batch without the trailing tensors that `forward` has no place for: labels, which only a loss reads."""
    if not isinstance(batch, tuple | list):
        return batch
    places = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in places):
        return batch
    takes = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in places)
    return tuple(batch[:takes])


def few(batches: Sequence[Any], most: int, rows: int | None = None) -> list[Any]:
    """The first batches that hold about `most` tokens (rows, where they are not token ids); batches of token ids are cut between rows.

    Args:
        batches: as for `Objective`.
        most: tokens, or rows of tensors; the first row is taken whatever its length.
        rows: most rows of a batch of token ids; None leaves batches as large as they are.

    Example:
        >>> from eckart.data import batches
        >>> [len(b.input_ids) for b in few(batches([[1, 2, 3]] * 8, batch_size=4), 15)]
        [4, 1]
    """
    out: list[Any] = []
    left = most
    for batch in batches:
        if left <= 0:
            break
        mask = getattr(batch, "attention_mask", None)
        if mask is None or getattr(batch, "input_ids", None) is None:
            first = batch if isinstance(batch, Tensor) else next((t for t in _tensors(batch)), None)
            left -= len(first) if first is not None else 1
            out.append(batch)
            continue
        kept = int((mask.sum(1).cumsum(0) <= left).sum())
        kept = max(kept, 1) if not out else kept
        step = rows or max(kept, 1)
        out += [_rows(batch, at, min(at + step, kept)) for at in range(0, kept, step)]
        left -= int(mask[:kept].sum())
        if kept < len(mask):
            break
    return out


def _rows(batch: Any, start: int, stop: int) -> Any:
    """Some rows of a batch of token ids, no wider than the longest of them."""
    from dataclasses import replace

    mask = batch.attention_mask[start:stop]
    width = int(mask.sum(1).max())
    cut = {"input_ids": batch.input_ids[start:stop, :width], "attention_mask": mask[:, :width]}
    if getattr(batch, "weights", None) is not None:
        cut["weights"] = batch.weights[start:stop, :width]
    return replace(batch, **cut)


def _tensors(batch: Any) -> Iterator[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    yield from (v for v in values if isinstance(v, Tensor))
