"""Hooks that turn what passes through modules into the partial sums of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refused
from .moments import Centred, centred, combine, product_type
from .probes import refuse_unless_finite
from .products import gradient_products
from .slots import WATCHED, Slot
from .watch import watch


@dataclass(frozen=True, eq=False)
class Sums:
    """A weighted sum of vectors: count and total (n,), float64 on the CPU."""

    count: float
    total: Tensor


Part = Centred | Sums
WHOLE = ("fisher", "gradient_gram")  # kinds that need the gradient of all calls of a module at once


def join(a: Part, b: Part) -> Part:
    """The sum of two parts of one kind."""
    if isinstance(a, Sums) and isinstance(b, Sums):
        return Sums(a.count + b.count, a.total + b.total)
    assert isinstance(a, Centred)
    assert isinstance(b, Centred)
    return combine(a, b)


@dataclass(frozen=True, eq=False)
class Layout:
    """Which rows of a batch count, and whose they are.

    Args:
        leaf: number of the batch.
        samples: B.
        tokens: T where the batch is (B, T) token ids or a mask, else 0.
        weight: (B, T): 0 at padding, else the weight of the token; None when every row counts once.
    """

    leaf: int
    samples: int
    tokens: int = 0
    weight: Tensor | None = None

    def rows(self, x: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
        """x (..., n) as (t, n) rows that count, and their weights if these are not all 1."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if self.weight is None:
            return flat, None
        lead = tuple(x.shape[:-1])
        size = (self.samples, self.tokens)
        if lead[:2] == size:
            extra = self.weight.reshape(*size, *([1] * (len(lead) - 2)))
            weight = extra.expand(lead).reshape(-1)
        elif lead == (size[0] * size[1],):
            weight = self.weight.reshape(-1)
        elif lead == (size[0],):  # one row per sample, as in a pooler: no padding among them
            return flat, None
        else:
            raise Refused(
                f"{name}: its rows {lead} cannot be matched with the {size} tokens of calibration batch {self.leaf}, "
                f"so padding would be measured. Collect with batch_size=1, where nothing is padded."
            )
        chosen = weight > 0
        weight = weight[chosen]
        return flat[chosen], None if bool((weight == 1).all()) else weight

    def by_sample(self, x: Tensor, name: str) -> Tensor:
        """x (..., n) as (B, rows, n)."""
        if self.samples in (1, x.shape[0]) or (x.ndim == 2 and len(x) == self.samples * self.tokens):
            return x.reshape(self.samples, -1, x.shape[-1])
        raise Refused(
            f"{name}: its rows {tuple(x.shape[:-1])} cannot be split by the {self.samples} samples of calibration batch {self.leaf}. "
            f"Use Fisher per batch, or collect with batch_size=1."
        )


@dataclass
class _Call:
    """One call of a module whose gradients are wanted."""

    x: Tensor | None = None
    version: int = 0
    grad: Tensor | None = None  # held only where several calls of one module wait for each other

    def pair(self, grad: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """(input, output gradient) of the call."""
        assert self.x is not None
        if self.x._version != self.version:
            raise Refused(f"{name}: its input is changed in place after it was read, so weight gradients cannot be formed from it.")
        return self.x, grad


@dataclass
class Recorder:
    """The sums of one batch, filled by the hooks it installs. Set `layout` before each forward and `probe` before each backward.

    Args:
        slots: what to measure.
    """

    slots: Sequence[Slot]
    layout: Layout = field(default_factory=lambda: Layout(0, 0))
    probe: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    roots: list[Tensor] = field(default_factory=list)  # the leaves of this batch's graph
    calls: dict[str, list[_Call]] = field(default_factory=dict)

    def begin(self, layout: Layout) -> None:
        """Forget the last batch."""
        self.layout, self.parts, self.roots, self.calls = layout, {}, [], {}

    def install(self, model: nn.Module) -> Iterator[Any]:
        """Hook one module after the other; yields the handle of each before the next, which the model may lack."""
        backward: dict[str, list[Slot]] = {}
        for slot in self.slots:
            if slot.stat.kind in WATCHED:
                yield watch(model, slot, self)
                continue
            module = _module(model, slot)
            if slot.stat.via == "backward":
                backward.setdefault(slot.site.name, []).append(slot)
            elif slot.stat.at == "in":
                yield module.register_forward_pre_hook(self._input_hook(slot), with_kwargs=True)
            else:
                yield module.register_forward_hook(self._output_hook(slot))
        for name, slots in backward.items():
            keep = any(s.stat.at == "weight" for s in slots)
            yield _module(model, slots[0]).register_forward_hook(self._graph_hook(name, slots, keep), with_kwargs=True)

    def settle(self) -> None:
        """After a backward: sum what had to wait for all calls of a module."""
        for name, calls in self.calls.items():
            if len(calls) > 1:
                slots = [s for s in self.slots if s.site.name == name and s.stat.kind in WHOLE and s.stat.probe == self.probe]
                self._whole(slots, [c.pair(c.grad, name) for c in calls if c.grad is not None])
            for call in calls:
                call.grad = None

    def release(self) -> None:
        """Let go of the graph and of the inputs; the parts stay."""
        self.roots, self.calls = [], {}

    def _input_hook(self, slot: Slot) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._measure(slot, _first_tensor(args, kwargs), "input")

        return hook

    def _output_hook(self, slot: Slot) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            self._measure(slot, output, "output")

        return hook

    def _graph_hook(self, name: str, slots: list[Slot], keep: bool) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # the model itself forbids gradients here: none will arrive
                return output
            x = _first_tensor(args, kwargs)
            call = _Call(x.detach(), x._version) if keep else _Call()
            self.calls.setdefault(name, []).append(call)
            if not output.requires_grad:  # parameters are frozen: nothing before this module was differentiated
                self.roots.append(output.requires_grad_())
                output = output.clone()  # the model may change it in place, which a leaf forbids
            output.register_hook(lambda grad: self._on_grad(slots, call, grad))
            return output

        return hook

    def _on_grad(self, slots: list[Slot], call: _Call, grad: Tensor) -> None:
        mine = [s for s in slots if s.stat.probe == self.probe]
        for slot in mine:
            if slot.stat.kind == "moments":
                self._measure(slot, grad, "output gradient")
            elif slot.stat.kind == "gradient":
                self._gradient(slot, *call.pair(grad, slot.site.name))
        whole = [s for s in mine if s.stat.kind in WHOLE]
        if not whole:
            return
        name = whole[0].site.name
        if len(self.calls[name]) == 1:
            self._whole(whole, [call.pair(grad, name)])
        else:
            call.grad = grad

    def _measure(self, slot: Slot, x: Tensor, what: str) -> None:
        name = slot.site.name
        if x.shape[-1] != slot.width:
            found = f"found shape {tuple(x.shape)}. The catalogue is of another model."
            raise Refused(f"{name}: expected an {what} of {slot.width} channels, {found}")
        rows, weights = self.layout.rows(x, name)
        part: Part | None
        if slot.stat.kind == "moments":
            part = centred(rows, weights)
            check = None if part is None else part.scatter.diagonal()
        else:
            part = _absolute(rows, weights)
            check = part.total if part is not None else None
        if part is not None and check is not None:
            refuse_unless_finite(check, f"{name}: its {what}", self.layout.leaf)
            self.keep(slot, part)

    def _whole(self, slots: Sequence[Slot], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """What is not linear in the gradient of one module: squares and products, of all its calls together."""
        if not slots or not pairs:
            return
        by = {s.stat.opts[0]: s for s in slots}  # no two of these kinds have an option in common
        name, count = slots[0].site.name, self.layout.samples
        found: dict[str, Tensor] = {}
        if "per_batch" in by:
            found["per_batch"] = _squared([(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])) for x, g in pairs])
        if by.keys() - {"per_batch"}:
            split = [(self.layout.by_sample(x, name), self.layout.by_sample(g, name)) for x, g in pairs]
            if sides := [side for side in ("in", "out") if side in by]:
                found |= {side: total.reshape(-1) for side, total in gradient_products(split, sides).items()}
            if "per_sample" in by:
                found["per_sample"] = torch.zeros(by["per_sample"].width, dtype=torch.float64)
                for sample in range(count):
                    found["per_sample"] += _squared([(x[sample], g[sample]) for x, g in split])
        for key, total in found.items():
            refuse_unless_finite(total, f"{name}: its weight gradient", self.layout.leaf)
            self.keep(by[key], Sums(1.0 if key == "per_batch" else float(count), total))

    def _gradient(self, slot: Slot, x: Tensor, grad: Tensor) -> None:
        """The weight's gradient of the batch, row by row; calls of one module add up, and count their samples once."""
        dtype = product_type(max(x.shape[-1], grad.shape[-1]))
        x, grad = (v.detach().reshape(-1, v.shape[-1]) for v in ((x.cpu(), grad.cpu()) if grad.device.type == "mps" else (x, grad)))
        total = (grad.to(dtype).T @ x.to(dtype)).to(torch.float64).reshape(-1).cpu()
        refuse_unless_finite(total, f"{slot.site.name}: its weight gradient", self.layout.leaf)
        self.keep(slot, Sums(0.0 if slot.key in self.parts else float(self.layout.samples), total))

    def keep(self, slot: Slot, part: Part) -> None:
        """Add to a slot's sum of this batch."""
        old = self.parts.get(slot.key)
        self.parts[slot.key] = part if old is None else join(old, part)


def _squared(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Per input channel, the sum over outputs of the squared weight gradient sum_calls g^T x; x (t, n), g (t, m) -> (n,) float64."""
    dtype = product_type(max(max(x.shape[-1], g.shape[-1]) for x, g in pairs))
    if pairs[0][0].device.type == "mps":  # it has no float64
        pairs = [(x.cpu(), g.cpu()) for x, g in pairs]
    gradient, *more = [g.to(dtype).T @ x.to(dtype) for x, g in pairs]
    for term in more:
        gradient = gradient + term
    return (gradient * gradient).sum(0, dtype=torch.float64).cpu()


def _absolute(rows: Tensor, weights: Tensor | None) -> Sums | None:
    if rows.device.type == "mps":
        rows, weights = rows.cpu(), None if weights is None else weights.cpu()
    size = rows.abs() if weights is None else rows.abs().double() * weights.double()[:, None]
    count = float(len(rows)) if weights is None else weights.sum(dtype=torch.float64).item()
    total = size.sum(0, dtype=torch.float64)
    return Sums(count, total if total.is_meta else total.cpu()) if count else None


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))


def _module(model: nn.Module, slot: Slot) -> nn.Module:
    try:
        return model.get_submodule(slot.site.name)
    except AttributeError as error:
        raise Refused(f"{slot.site.name}: the model has no such module. The catalogue is of another model.") from error
