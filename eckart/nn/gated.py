"""A branch of which each sample uses a part: triples that all share, and groups of triples that a gate opens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refused, UsageError
from .branch import LowRank

Opening = int | Sequence[int] | Tensor | None


def owners(rank: int, shared: float, groups: int) -> list[int]:
    """Which group each triple belongs to; -1 for the shared ones, which come first.

    Args:
        rank: triples in all.
        shared: share of them that every sample uses, at least one triple.
        groups: number of groups among the others, as equal as can be; some are empty where there are fewer triples.

    Example:
        >>> owners(8, 0.5, 2)
        [-1, -1, -1, -1, 0, 0, 1, 1]
    """
    first = min(rank, max(1, round(shared * rank)))
    rest = rank - first
    return [-1] * first + [i * groups // rest for i in range(rest)]


class Gated(LowRank):
    """`LowRank` with a mask over its triples for what it adds; what it takes away is whole. Open, as it begins, it is a `LowRank`.

    With the gate on one group the layer is y = W_rest x + (shared + that group) x: still a matrix, and mergeable. With a gate per sample it is not.

    Args:
        *args: as of `LowRank`.
        shared: share of the triples that are always there.
        groups: number of groups.
        **how: as of `LowRank`.
    """

    owner: Tensor

    def __init__(self, *args: Any, shared: float, groups: int, **how: Any) -> None:
        super().__init__(*args, **how)
        self.groups = groups
        # not persistent: it follows from the recipe
        self.register_buffer("owner", torch.tensor(owners(self.rank, shared, groups)), persistent=False)
        self.opening: int | Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        return {k: v for k, v in super().parts().items() if k != "owner"}

    def open(self, opening: Opening) -> None:
        """Open groups: None for all, the number of one, (B,) numbers of one per sample, or (B, groups) weights per sample.

        Raises:
            UsageError: a number or a shape that does not fit.
        """
        if opening is not None and not isinstance(opening, int):
            opening = torch.as_tensor(opening, device=self.owner.device)
            if opening.ndim not in (1, 2) or (opening.ndim == 2 and opening.shape[1] != self.groups):
                raise UsageError(f"gate: expected (B,) group numbers or (B, {self.groups}) weights, found shape {tuple(opening.shape)}.")
            if opening.ndim == 1 and (opening.is_floating_point() or bool((opening < 0).any()) or bool((opening >= self.groups).any())):
                raise UsageError(f"gate: expected group numbers from 0 to {self.groups - 1}, found {opening.tolist()[:8]}.")
        elif opening is not None and not 0 <= opening < self.groups:
            raise UsageError(f"gate: expected a group number from 0 to {self.groups - 1}, found {opening}.")
        self.opening = opening
        self.not_mergeable = "its gate opens another part of it for each sample" if isinstance(opening, Tensor) else ""

    def mask(self) -> Tensor | None:
        """(r,) or (B, r) weights of the triples; None where all are open."""
        opening, owner = self.opening, self.owner
        if opening is None:
            return None
        if not isinstance(opening, Tensor):
            return ((owner < 0) | (owner == opening)).to(self.left.dtype)
        opening = opening.to(owner.device)
        if opening.ndim == 1:
            return ((owner < 0) | (owner == opening[:, None])).to(self.left.dtype)
        weights = opening.to(self.left.dtype)[:, owner.clamp_min(0)]
        return torch.where(owner < 0, torch.ones_like(weights), weights)

    def _shared(self) -> str | None:
        return None if self.opening is not None else super()._shared()

    def gain(self, x: Tensor) -> Tensor:
        mask = self.mask()
        if mask is None:
            return super().gain(x)
        t = self._tensors()
        z = self.action.down(x, t["right"])
        core = self.core_kind.value(t)
        z = z if core is None else self.action.scale(z, core)
        if mask.ndim == 1:
            z = self.action.scale(z, mask)
        else:
            if z.shape[0] != mask.shape[0]:
                raise UsageError(
                    f"gate: it was opened for {mask.shape[0]} samples, and the layer sees {z.shape[0]}. Open it anew for every batch, without merging samples."
                )
            axis = self.action.channels % z.ndim
            mask = mask.repeat(1, z.shape[axis] // self.rank)
            shape = [1] * z.ndim
            shape[0], shape[axis] = mask.shape
            z = z * mask.reshape(shape)
        y = self.action.up(z, t["left"])
        return y if self.scale == 1.0 else y * self.scale

    def _product(self, initial: bool = False) -> Tensor:
        mask = None if initial else self.mask()
        if mask is None:
            return super()._product(initial)
        if mask.ndim == 2:
            raise Refused(f"{self.recipe_name}: {self.not_mergeable}, so it is no matrix.")
        t = self._tensors()
        core = self.core_kind.value(t)
        left = t["left"] if core is None else t["left"] * core if core.ndim == 1 else t["left"] @ core
        return ((left * mask) @ t["right"]) * self.scale

    def lora(self) -> tuple[Tensor, Tensor] | None:
        if self.opening is None:
            return super().lora()
        then = self._tensors(initial=True)
        core, before = self.core_kind.value(self._tensors()), self.core_kind.value(then)
        mask = self.mask()
        if mask is None or mask.ndim == 2 or (core is not None and core.ndim == 2) or self.minus != "initial":
            return None
        now = self._tensors()

        def times(left: Tensor, core: Tensor | None) -> Tensor:
            return left * self.scale if core is None else left * core * self.scale

        return torch.cat([now["right"], then["right"]]), torch.cat([times(now["left"], core) * mask, -times(then["left"], before)], 1)


@contextmanager
def gate(model: nn.Module, opening: Opening) -> Iterator[None]:
    """Open a gate in every gated branch of a model, for the forward and backward passes inside the block.

    Under gradient checkpointing the backward pass runs the layers again, so it must stand inside too.

    Args:
        model: with adapters of `form.gated`, for instance of kind.
        opening: None for all groups, the number of one, (B,) numbers of one per sample, or (B, groups) weights per sample.

    Raises:
        UsageError: no gate in the model, or an opening that does not fit.

    Example:
        >>> from eckart.hub.peft.adapt import adapt
        >>> net = adapt(nn.Sequential(nn.Linear(8, 8)), "kind", rank=8)
        >>> with gate(net, [0, 3]):
        ...     net(torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """
    found = [m for m in model.modules() if isinstance(m, Gated)]
    if not found:
        raise UsageError(f"gate: {type(model).__name__} has no gated adapter. The recipe kind has one.")
    before = [m.opening for m in found]
    try:
        for module in found:
            module.open(opening)
        yield
    finally:
        for module, old in zip(found, before, strict=True):
            module.open(old)
