"""An adapter's part of a layer: what is added to the layer's own output, and what is taken away from it so that nothing changes at the start.

    y = base(x) + s L C R x - s L0 C0 R0 x

What is trained is a parameter, what is not is a buffer; both are saved. At the start both products are made of equal numbers by equal
operations, so their difference is exactly zero whatever the precision of the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .action import Action
from .cores import Core

Minus = Literal["nothing", "initial", "kept"]
Policy = Literal["subtract", "mutate"]
FROZEN = "initial_"  # prefix of the frozen copies


class Branch(nn.Module):
    """One adapter at one layer. Abstract: a subclass says what it adds (`gain`) and what it takes away (`loss`), both as maps and as matrices.

    It holds no reference to the layer's weight. Its tensors are float32 whatever the base is: an adapter that is rounded to
    half precision does not train.

    Args:
        action: how matrices act on this layer's input.
        policy: "subtract" leaves the base alone and takes away in the forward pass; "mutate" expects that the host took `loss_matrix` out
            of the base weight.
    """

    not_mergeable: str = ""
    """Why the branch cannot become part of the weight, for those that are no matrix (a gate, a nonlinearity); empty for all others."""

    def __init__(self, action: Action, policy: Policy = "subtract") -> None:
        super().__init__()
        self.action = action
        self.policy: Policy = policy
        self.recipe_name = ""

    # what a subclass provides

    def gain(self, x: Tensor) -> Tensor:
        """What the adapter adds: s L C R x."""
        raise NotImplementedError

    def loss(self, x: Tensor) -> Tensor | None:
        """What is taken away from the base: None when nothing is."""
        raise NotImplementedError

    def gain_matrix(self) -> Tensor:
        """The added map as a matrix (m, n), float32."""
        raise NotImplementedError

    def loss_matrix(self) -> Tensor | None:
        """The map that is taken away as a matrix (m, n), float32, or None."""
        raise NotImplementedError

    def lora(self) -> tuple[Tensor, Tensor] | None:
        """(A (r, n), B (m, r)) with `delta_matrix() == B @ A`, exact and thin; None for a branch that has no such form."""
        return None

    # what all share

    def forward(self, x: Tensor) -> Tensor:
        """What the layer's output changes by, with the adapter active."""
        y = self.gain(x)
        if self.policy == "mutate":
            return y
        taken = self.loss(x)
        return y if taken is None else y - taken

    def delta_matrix(self) -> Tensor:
        """What merging adds to the weight (m, n), float32, the loss included whatever the policy."""
        gain, taken = self.gain_matrix(), self.loss_matrix()
        return gain if taken is None else gain - taken

    def bias_delta(self) -> Tensor | None:
        """What merging adds to the bias (m,), or None."""
        return getattr(self, "bias", None)

    def parts(self) -> dict[str, Tensor]:
        """Every tensor of the adapter by its name in the checkpoint: parameters and buffers."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def keep(self, name: str, shape: tuple[int, ...]) -> None:
        """Add a frozen tensor that is saved with the branch, zero at first: what training must remember over a resume."""
        self.register_buffer(f"state_{name}", torch.zeros(shape))

    def layers(self) -> dict[str, Branch]:
        """The branches that hold tensors, by what tells them apart inside the layer: itself, under an empty name."""
        return {"": self}

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters, whether or not they require gradients at the moment."""
        return dict(self.named_parameters())

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Write the initial values.

        Raises:
            UsageError: a name or a shape that the branch does not have, or one that is missing.
        """
        own = self.parts()
        if own.keys() != values.keys():
            raise UsageError(f"an adapter of {self.recipe_name or 'this form'} has the tensors {sorted(own)}, found {sorted(values)}.")
        for name, value in values.items():
            if own[name].shape != value.shape:
                raise UsageError(f"{name}: expected shape {tuple(own[name].shape)}, found {tuple(value.shape)}.")
            own[name].copy_(value)

    @torch.no_grad()
    def poison(self) -> None:
        """Fill every tensor with NaN: values that must come from a checkpoint before the first use."""
        for tensor in self.parts().values():
            tensor.fill_(torch.nan)

    def poisoned(self) -> list[str]:
        """Tensors that hold NaN."""
        return [k for k, v in self.parts().items() if v.device.type == "meta" or bool(torch.isnan(v).any())]


class LowRank(Branch):
    """Two thin factors with a core between them: nearly every adapter of the literature.

    Args:
        action: how matrices act on this layer's input.
        rank: r.
        core: what stands between the factors.
        trained: names of the parts that train; the others are frozen.
        scale: s.
        minus: what is taken away: "nothing", the branch's own "initial" value, or the "kept" part of the weight.
        policy: "subtract" or "mutate".
        kept: rank of the kept part where it is stored (for `minus="kept"`, or to be protected), 0 where it is not.
        bias: train a change of the layer's bias, from zero.
        dropout: probability of dropping an input, the same inputs in everything that is added and taken away.

    Raises:
        UsageError: a rank outside 1..min(m, n), or a part that does not exist.

    Example:
        >>> from eckart.nn.action import action_of
        >>> branch = LowRank(action_of(nn.Linear(4, 3)), rank=2, trained=("left", "right"), minus="initial")
        >>> sorted(branch.parts())
        ['initial_left', 'initial_right', 'left', 'right']
    """

    left: Tensor
    right: Tensor
    kept_left: Tensor
    kept_right: Tensor

    def __init__(
        self,
        action: Action,
        rank: int,
        core: Core | None = None,
        trained: Iterable[str] = ("left", "right"),
        scale: float = 1.0,
        minus: Minus = "nothing",
        policy: Policy = "subtract",
        kept: int = 0,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(action, policy)
        m, n = action.out, action.into
        if not 1 <= rank <= min(m, n):
            raise UsageError(f"LowRank: a {m}x{n} layer takes a rank from 1 to {min(m, n)}, found {rank}.")
        self.rank, self.core_kind, self.scale, self.minus = rank, core or Core(), float(scale), minus
        shapes = {"left": (m, rank), **self.core_kind.shapes(rank), "right": (rank, n)}
        if bias:
            shapes["bias"] = (m,)
        wanted = set(trained)
        unknown = wanted - shapes.keys()
        if unknown:
            raise UsageError(f"LowRank: no part is called {sorted(unknown)}; there are {', '.join(shapes)}.")
        self.copied = tuple(k for k in shapes if minus == "initial" and k in wanted and k != "bias")
        for name, shape in shapes.items():
            self._part(name, shape, name in wanted)
        for name in self.copied:
            self._part(FROZEN + name, shapes[name], False)
        if kept:
            self._part("kept_left", (m, kept), False)
            self._part("kept_right", (kept, n), False)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def _part(self, name: str, shape: tuple[int, ...], train: bool) -> None:
        zeros = torch.zeros(shape)
        if train:
            self.register_parameter(name, nn.Parameter(zeros))
        else:
            self.register_buffer(name, zeros)

    def _tensors(self, initial: bool = False) -> dict[str, Tensor]:
        """left, right and the core's tensors, as they are or as they began."""
        names = ("left", *self.core_kind.names, "right")
        return {k: getattr(self, FROZEN + k if initial and k in self.copied else k) for k in names}

    def _shared(self) -> str | None:
        """The one factor that differs from its beginning, when gain and loss share all others; "core" stands for the core's tensors."""
        if self.minus != "initial" or self.policy == "mutate":
            return None
        groups = {"core" if k in self.core_kind.names else k for k in self.copied}
        return groups.pop() if len(groups) == 1 else None

    def _map(self, x: Tensor, left: Tensor, core: Tensor | None, right: Tensor) -> Tensor:
        z = self.action.down(x, right)
        if core is not None:
            z = self.action.scale(z, core)
        y = self.action.up(z, left)
        return y if self.scale == 1.0 else y * self.scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.action.prepare(x, self.left.dtype)
        if self.dropout is not None and x.is_floating_point():
            x = self.dropout(x)  # once: the same inputs are dropped from what is added and what is taken away
        only = self._shared()
        y = super().forward(x) if only is None else self._difference(x, only)
        bias = self.bias_delta()
        return y if bias is None else self.action.add(y, bias)

    def _difference(self, x: Tensor, only: str) -> Tensor:
        """One product instead of two where only one factor moves: as exact at the start, and half the work."""
        now, then = self._tensors(), self._tensors(initial=True)
        core = self.core_kind.value(now)
        if only == "core":
            before = self.core_kind.value(then)
            assert core is not None
            assert before is not None
            return self._map(x, now["left"], core - before, now["right"])
        if only == "left":
            return self._map(x, now["left"] - then["left"], core, now["right"])
        return self._map(x, now["left"], core, now["right"] - then["right"])

    def gain(self, x: Tensor) -> Tensor:
        t = self._tensors()
        return self._map(x, t["left"], self.core_kind.value(t), t["right"])

    def loss(self, x: Tensor) -> Tensor | None:
        if self.minus == "kept":
            return self.action.up(self.action.down(x, self.kept_right), self.kept_left)
        if self.minus == "initial":
            t = self._tensors(initial=True)
            return self._map(x, t["left"], self.core_kind.value(t), t["right"])
        return None

    def _product(self, initial: bool = False) -> Tensor:
        t = self._tensors(initial)
        core = self.core_kind.value(t)
        left = t["left"] if core is None else t["left"] * core if core.ndim == 1 else t["left"] @ core
        return (left @ t["right"]) * self.scale

    def gain_matrix(self) -> Tensor:
        return self._product()

    def loss_matrix(self) -> Tensor | None:
        if self.minus == "kept":
            return self.kept_left @ self.kept_right
        return self._product(initial=True) if self.minus == "initial" else None

    def lora(self) -> tuple[Tensor, Tensor] | None:
        t = self._tensors()
        core = self.core_kind.value(t)

        def times(left: Tensor, core: Tensor | None) -> Tensor:
            left = left * self.scale
            return left if core is None else left * core if core.ndim == 1 else left @ core

        a, b = t["right"], times(t["left"], core)
        if self.minus == "nothing":
            return a, b
        if self.minus == "kept":
            return torch.cat([a, self.kept_right]), torch.cat([b, -self.kept_left], 1)
        then = self._tensors(initial=True)
        before = times(then["left"], self.core_kind.value(then))
        if "right" not in self.copied:  # the row space is shared: rank r is enough
            return a, b - before
        return torch.cat([a, then["right"]]), torch.cat([b, -before], 1)

    def extra_repr(self) -> str:
        core = type(self.core_kind).__name__.lower()
        return f"out={self.action.out}, in={self.action.into}, rank={self.rank}, core={core}, scale={self.scale:g}, minus={self.minus}"
