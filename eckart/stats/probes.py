"""Scalars to differentiate: the task's loss, or a random projection of the embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refused, UsageError
from ..seeds import generator

Loss = Callable[[Any, Any], Tensor]


def auto_probe(model: nn.Module, loss: Loss | None) -> str:
    """ "task_loss" for models that generate text by themselves and wherever a loss is given, else "random_projection"."""
    generates = getattr(model, "can_generate", None)
    seq2seq = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "task_loss" if loss is not None or (callable(generates) and bool(generates()) and not seq2seq) else "random_projection"


def task_loss(output: Any, ids: Tensor | None, mask: Tensor | None, loss: Loss | None, batch: Any) -> Tensor:
    """Sum of next-token cross-entropies in nats, in float32 or better: each sequence its own loss, not divided by its length.

    Differentiated at the text's own next tokens, so second moments of its gradients are the "empirical Fisher", not the Fisher
    information, whose labels the model itself would draw.

    Args:
        output: of the model: with `.logits` (B, T, vocabulary).
        ids: (B, T).
        mask: (B, T), 0 at padding; None where all are tokens.
        loss: replaces all of it: (output, batch) -> the loss of each sample, or their sum.
        batch: the batch as it was given, for `loss`.
    """
    if loss is not None:
        return loss(output, batch).sum()
    logits = getattr(output, "logits", None)
    if ids is None or logits is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        expected = "expected token ids and a causal model with .logits (B, T, vocabulary)"
        raise UsageError(f"probe task_loss: {expected}, found {type(output).__name__}. Pass loss=(output, batch) -> tensor.")
    target = ids[:, 1:]
    if mask is not None:
        target = target.masked_fill(mask[:, 1:] == 0, -100)
    return nn.functional.cross_entropy(_wide(logits[:, :-1]).flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")


def embedding_of(output: Any, mask: Tensor | None) -> Tensor:
    """(B, d), float32 or better: mean over tokens of the last hidden state, scaled to length 1; of a (B, d) output, that output scaled."""
    hidden = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    states = getattr(output, "hidden_states", None)
    if hidden is None and states:
        hidden = states[-1]
    if hidden is None or hidden.ndim not in (2, 3):
        expected = "expected a (B, d) or (B, T, d) output, .last_hidden_state or .hidden_states"
        raise UsageError(f"probe random_projection: {expected}, found {type(output).__name__}. Use probe 'task_loss'.")
    hidden = _wide(hidden)
    if hidden.ndim == 3:
        if mask is not None and mask.shape == hidden.shape[:2]:
            weight = mask.to(hidden.dtype).unsqueeze(-1)
            hidden = (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
        else:
            hidden = hidden.mean(1)
    return nn.functional.normalize(hidden, dim=-1)


def random_projections(embedding: Tensor, seed: int, leaf: int, probes: int) -> list[Tensor]:
    """Sums over samples of <v, embedding>, v standard normal per sample and probe: gradients whose second moment is, in expectation, that
    of the Jacobian of the embedding (its Gauss-Newton output metric).

    The draws depend on the seed and the number of the batch, not on what else was computed.
    """
    shape = (probes, *embedding.shape)
    draws = torch.randn(shape, generator=generator(seed, "random_projection", str(leaf))).to(embedding)
    return [(embedding * v).sum() for v in draws]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def refuse_unless_finite(values: Tensor, what: str, leaf: int) -> None:
    """Raise Refused, naming what is not finite and the batch."""
    if not values.is_meta and not bool(torch.isfinite(values).all()):
        raise Refused(f"{what} is not finite in calibration batch {leaf}. Check the weights (eckart inspect), or run in float32.")
