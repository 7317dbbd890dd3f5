"""Terms on what the model gives out, added to the loss as gradients: the loss that is reported stays the task's.

A term is a mean over the positions (or samples) that are learnt from, so its weight means the same at every batch size and accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..errors import UsageError
from .training import Piece

if TYPE_CHECKING:
    from torch import Tensor


class Output(Piece):
    """Base of terms on the logits. The host calls `of` in every forward pass that trains; see `hub.peft.outputs`."""

    axis: ClassVar[str] = "loss"

    weight: float

    @property
    def compares(self) -> bool:
        """Whether it wants the logits of the model without its adapter."""
        return False

    def of(self, logits: Tensor, reference: Tensor | None) -> Tensor:
        """The term, a scalar.

        Args:
            logits: (rows, classes) float32; the positions or samples that are learnt from.
            reference: likewise, of the model without its adapter, without gradient.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Consistency(Output):
    """Distance of what the model gives out from what it gave before.

    Args:
        weight: lambda 1.
        measure: "kl", the divergence KL(before || now) per position, or "mse" of logits whose rows are scaled to length 1, per entry.
    """

    kind: ClassVar[str] = "consistency"

    weight: float = 1e-4
    measure: Literal["kl", "mse"] = "kl"

    @property
    def compares(self) -> bool:
        return True

    def of(self, logits: Tensor, reference: Tensor | None) -> Tensor:
        import torch.nn.functional as F

        assert reference is not None
        if self.measure == "mse":
            return (F.normalize(logits, dim=-1) - F.normalize(reference, dim=-1)).square().mean()
        now, before = F.log_softmax(logits, -1), F.log_softmax(reference, -1)
        return F.kl_div(now, before, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Diversity(Output):
    """Outputs that are spread: little certainty, or classes that do not vary together.

    Args:
        weight: lambda 2.
        measure: "entropy", minus the mean entropy of a position in nats, or "covariance", the squared covariances of different classes over
            the rows, summed and divided by the classes (0 for a single row).
    """

    kind: ClassVar[str] = "diversity"

    weight: float = 3e-4
    measure: Literal["entropy", "covariance"] = "entropy"

    def of(self, logits: Tensor, reference: Tensor | None) -> Tensor:
        import torch.nn.functional as F

        if self.measure == "entropy":
            now = F.log_softmax(logits, -1)
            return (now.exp() * now).sum(-1).mean()
        centred = logits - logits.mean(0)
        rows, classes = centred.shape
        if rows < 2:
            return centred.sum() * 0
        # through the smaller Gram: the sum of all squared entries of the covariance, less its diagonal
        gram = centred @ centred.T if rows < classes else centred.T @ centred
        squares = gram.square().sum() / (rows - 1) ** 2
        diagonal = (centred.square().sum(0) / (rows - 1)).square().sum()
        return (squares - diagonal) / classes


@dataclass(frozen=True)
class LeadingShare(Output):
    """Minus the share of the largest singular values of the logit matrix in the sum of all: few directions carry the output.

    Args:
        weight: lambda 3.
        k: how many values lead.
        rows: at most so many rows are taken, evenly spread, since the matrix is decomposed at every pass.
    """

    kind: ClassVar[str] = "leading_share"

    weight: float = 1e-4
    k: int = 3
    rows: int = 256

    def __post_init__(self) -> None:
        if self.k < 1 or self.rows < 2:
            raise UsageError(f"loss.leading_share: expected k of at least 1 and rows of at least 2, found {self.k} and {self.rows}.")

    def of(self, logits: Tensor, reference: Tensor | None) -> Tensor:
        from ..linalg.nuclear import leading_share

        count = len(logits)
        if count > self.rows:
            import torch

            logits = logits[torch.linspace(0, count - 1, self.rows, device=logits.device).round().long()]
        return -leading_share(logits, self.k)
