"""How good a changed model is, on calibration batches: what searches compare and what short trainings lower."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refused, UsageError
from ..modes import evaluating
from ..stats.collect import unpack
from ..stats.probes import Loss, auto_probe, embedding_of, task_loss

Goal = str  # "task" or "original"


@dataclass(frozen=True, eq=False)
class Judge:
    """The loss of a model that was made from another, over fixed batches. Lower is better; it is not an evaluation on held-out text.

    "task" is next-token cross-entropy in nats per token, or a loss of one's own per sample. "original" is the distance from the model itself: the
    divergence of its next-token distribution in nats per token, else 1 - cos to its embedding, else the squared distance of outputs relative to
    the original's. Where a model has no next token and no loss is given, "task" is "original".

    Args:
        live: the original model; called once, never changed.
        batches: calibration batches.
        loss: (output, batch) -> the loss of each sample, or their sum.
    """

    live: Callable[[], nn.Module]
    batches: Sequence[Any]
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if not len(self.batches):
            raise UsageError("measuring the loss of a model needs calibration, and there is none. Give --calib FILE (calib=...).")

    @cached_property
    def predicts(self) -> bool:
        """Whether there is a task: a next token, or a loss of one's own."""
        return auto_probe(self.live(), self.loss) == "task_loss"

    def copy(self) -> nn.Module:
        """The original, to be changed."""
        return copy.deepcopy(self.live())

    def of_batch(self, model: nn.Module, index: int, goal: Goal = "task") -> tuple[Tensor, float]:
        """(sum, weight) of one batch; the sum can be differentiated.

        Raises:
            Refused: it is not finite.
        """
        batch = self.batches[index]
        args, kwargs, layout, ids, mask = unpack(model, index, batch, not self.predicts)
        output = model(*args, **kwargs)
        if goal == "task" and self.predicts:
            total = task_loss(output, ids, mask, self.loss, batch)
            weight = float(layout.samples) if self.loss is not None else _predicted(ids, mask)
        else:
            with torch.no_grad(), evaluating(self.live()) as original:
                reference = original(*args, **kwargs)
            total, weight = self._distance(output, reference, mask)
        if not bool(torch.isfinite(total.detach())):
            raise Refused(
                f"the loss of the changed model is not finite in calibration batch {index}. Keep more, or lower the learning rate."
            )
        return total, weight

    def _distance(self, output: Any, reference: Any, mask: Tensor | None) -> tuple[Tensor, float]:
        if self.predicts and getattr(output, "logits", None) is not None:
            new, old = (x.logits.float().log_softmax(-1) for x in (output, reference))
            each = nn.functional.kl_div(new, old, log_target=True, reduction="none").sum(-1)
            on = torch.ones_like(each) if mask is None else mask.to(each.dtype)
            return (each * on).sum(), float(on.sum())
        try:
            a, b = embedding_of(output, mask), embedding_of(reference, mask)
        except UsageError:
            a = b = torch.zeros(0)
        if a.ndim == 2 and a.shape[-1] > 1 and hasattr(self.live(), "config"):
            return (1 - (a * b).sum(-1)).sum(), float(len(a))
        x, y = (t if isinstance(t, Tensor) else next(v for v in t.values() if isinstance(v, Tensor)) for t in (output, reference))
        return (x - y).square().sum() / y.square().sum().clamp_min(1e-12) * len(y), float(len(y))

    def __call__(self, model: nn.Module, goal: Goal = "task", batches: int | None = None) -> float:
        """Mean over the first `batches` batches, None for all of them."""
        total, weight = self.sums(model, range(len(self.batches) if batches is None else min(batches, len(self.batches))), goal)
        return total / weight if weight else 0.0

    @torch.no_grad()
    def sums(self, model: nn.Module, batches: range, goal: Goal = "task") -> tuple[float, float]:
        """(sum of the loss, sum of the weights) over these batches: what further batches are added to."""
        total = weight = 0.0
        with evaluating(model):
            for i in batches:
                part, count = self.of_batch(model, i, goal)
                total, weight = total + float(part), weight + count
        return total, weight


def _predicted(ids: Tensor | None, mask: Tensor | None) -> float:
    assert ids is not None
    return float(ids[:, 1:].numel() if mask is None else (mask[:, 1:] != 0).sum())
