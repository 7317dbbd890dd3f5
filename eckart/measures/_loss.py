"""The loss whose gradients a measure takes, sample by sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from ..stats.gradients import Sample
    from .base import ModelView

NO_LOSS = "there is no loss: the model does not predict the next token. Pass loss=(output, batch) -> tensor."
HALF = "the model computes in float16, where small gradients vanish: run it in float32"


def text_loss(view: ModelView, sample: Sample, output: Any) -> tuple[Tensor, float] | None:
    """(sum of the losses, their total weight) of a sample; None where nothing is predicted.

    Next-token cross-entropy in nats, each token weighted by `Batch.weights` where the batch has them: 0 leaves a prompt out of the loss. A
    loss of one's own has weight 1.
    """
    if view.loss is not None:
        return view.loss(output, sample.batch).sum(), 1.0
    if sample.ids is None:
        raise Refused("next-token loss: the batches hold no token ids. Pass loss=(output, batch) -> tensor.")
    if sample.ids.shape[1] < 2:
        return None
    from ..stats.gradients import token_losses

    losses = token_losses(output, sample.ids)
    weight = target_weights(sample, losses)
    total = float(weight.sum())
    return ((losses * weight).sum(), total) if total > 0 else None


def target_weights(sample: Sample, losses: Tensor) -> Tensor:
    """(T - 1,) weight of each predicted token."""
    import torch

    return torch.ones_like(losses) if sample.weights is None else sample.weights[0, 1:].to(losses)


def half(view: ModelView) -> str:
    """A warning where gradients may vanish by underflow, else empty."""
    import torch

    return HALF if any(p.dtype == torch.float16 for p in view.model.parameters()) else ""


def nothing(view: ModelView, done: int) -> str:
    """Why no text was measured; empty when some were."""
    if done:
        return ""
    return "no text has a token to predict" if len(view.batches) else "there is no calibration text: the list of batches is empty"
