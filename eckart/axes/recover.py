"""What is trained for a short while after the cut, with the whole model at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import UsageError
from .base import Choice

Goal = Literal["task", "original"]


@dataclass(frozen=True)
class _Recovery(Choice):
    """Settings of every recovery. Adam on the calibration batches, in a seeded order, without dropout; weights outside of the pairs are frozen.

    Args:
        steps: optimiser steps, one batch each.
        lr: peak learning rate; a linear warm-up over a tenth of the steps, then linear to zero.
        goal: "task" trains on next-token cross-entropy, "original" on what the original model says: the divergence of its next-token
            distribution, or the distance of its embedding or output where there is none.
    """

    axis: ClassVar[str] = "recover"
    takes: ClassVar[frozenset[str]] = frozenset({"pair"})

    steps: int = 100
    lr: float = 1e-4
    goal: Goal = "task"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0:
            raise UsageError(f"recover: expected at least one step and a positive learning rate, found {self.steps} and {self.lr:g}.")


@dataclass(frozen=True)
class Factors(_Recovery):
    """Train the factors themselves, those whose role is `train`: WeLore's fine-tuning of the low-rank layers alone."""

    kind: ClassVar[str] = "factors"


@dataclass(frozen=True)
class Lora(_Recovery):
    """Train a LoRA branch on each factor, through peft, and merge it: SVD-LLM's second stage.

    Args:
        rank: of the branches.
        alpha: their scale times the rank.
        in_turn: train all branches of `up` for half of the steps and merge them, then those of `down`, as published; else both together.
    """

    kind: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float = 16.0
    in_turn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.alpha > 0:
            raise UsageError(f"recover.lora: expected a rank of at least 1 and a positive alpha, found {self.rank} and {self.alpha:g}.")
