"""Whether a model is a chain of blocks, proved by one forward pass without data.

What must hold for blocks to be run one after the other: the first tensor that block i is given is the very output of block i - 1, and
nothing else that a block makes is read by another block or, before the last block, by anything between them. Both are watched operation
by operation, not guessed from names or classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..catalogue.trace import storage_id
from ..errors import Refused
from ..modes import evaluating
from ..stats.record import Layout, Recorder
from .known import Known, tensors_in
from .watch import OUTSIDE, FusedKernels, Watch

AFTER = -2  # scope of what follows the last block


class Unwalkable(Refused):
    """The model is no chain of blocks, or cannot be shown to be one. It may still be calibrated as a whole."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of one batch, counted storage by storage.

    Args:
        before: most that lives outside of the blocks up to the first one.
        inside: for each block, most that it adds to what is there when it is entered, its output included.
        after: most that lives behind the last block, what stems from before the first one included.
        hidden: the hidden state at each block's entry, and behind the last one.
        others: all other tensors that blocks are given, each counted once.
    """

    before: int
    inside: tuple[int, ...]
    after: int
    hidden: tuple[int, ...]
    others: int


@dataclass(frozen=True)
class Walk:
    """How a chain of blocks is called.

    Args:
        blocks: names of their modules, in order.
        hidden: where each block takes the hidden state: a position, or the name of a keyword.
        wraps: how each block returns it: None as it is, else the number of elements of the tuple of which it is the first.
        before, after: names of the parameters and stored buffers that are read outside of the blocks, up to the last block and behind it.
        early: names of the modules outside of the blocks that are called up to the last block and not behind it.
        inside: the same for each block.
        tail: why what follows the last block cannot be run by itself; empty when it can.
        sizes: of the batch that was walked with.
    """

    blocks: tuple[str, ...]
    hidden: tuple[int | str, ...]
    wraps: tuple[int | None, ...]
    before: frozenset[str]
    after: frozenset[str]
    early: frozenset[str]
    inside: tuple[frozenset[str], ...]
    tail: str
    sizes: Sizes


def walk(
    model: nn.Module,
    blocks: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    recorder: Recorder | None = None,
    layout: Layout | None = None,
) -> Walk:
    """One forward pass of a model on the meta device, watched.

    Args:
        model: with its parameters on the meta device; left as it was.
        blocks: names of its repeated blocks, as `Catalogue.blocks` has them.
        args, kwargs: of the model, on the CPU. Their values answer what models ask of masks and positions.
        recorder: measures along, so that what statistics take is counted too.
        layout: of that batch, for the recorder.

    Returns:
        How the blocks are called.

    Raises:
        Unwalkable: it is no such chain, or its forward pass cannot run without data. The message is a sentence.
    """
    if not blocks:
        raise Unwalkable("the model has no repeated blocks.")
    stacks = sorted({name.rpartition(".")[0] for name in blocks})
    if len(stacks) > 1:
        raise Unwalkable(f"the model has {len(stacks)} stacks of blocks ({', '.join(stacks)}).")
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(storage_id(tensor), name)
    trial = _Trial(tuple(blocks), Watch(names), recorder, layout)
    handles: list[Any] = []
    error: Exception | None = None
    try:
        for name, module in model.named_modules():
            if not any(name == b or name.startswith(b + ".") for b in blocks):
                handles.append(module.register_forward_pre_hook(trial.call(name)))
        for number, name in enumerate(blocks):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(trial.enter(number), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(trial.leave(number)))
        handles.extend(recorder.install(model) if recorder is not None else ())
        if recorder is not None and layout is not None:
            recorder.begin(layout)
        known = trial.watch.known
        with evaluating(model), _buffers_on_meta(model, known), torch.inference_mode(False), torch.no_grad():
            given = [_to_meta(a, known) for a in args], {k: _to_meta(v, known) for k, v in kwargs.items()}
            with trial.watch, FusedKernels(trial.watch):
                model(*given[0], **given[1])
    except Unwalkable:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, KeyError, AttributeError) as found:
        error = found
    finally:
        for handle in handles:
            handle.remove()
        if recorder is not None:
            recorder.begin(Layout(0, 0))
    return trial.finish(error)


class _Trial:
    """The state of one watched pass."""

    def __init__(self, blocks: tuple[str, ...], watch: Watch, recorder: Recorder | None, layout: Layout | None) -> None:
        self.blocks, self.watch, self.recorder, self.layout = blocks, watch, recorder, layout
        self.hidden: list[int | str] = []
        self.wraps: list[int | None] = []
        self.entry = self.before = 0
        self.inside: list[int] = []
        self.sizes: list[int] = []
        self.others: dict[int, Tensor] = {}  # held, so that no id comes twice
        self.called: dict[int, set[str]] = {OUTSIDE: set(), AFTER: set()}
        self.tail = ""
        self.last: Tensor | None = None
        watch.crossing = self.crossing

    def call(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            self.called.get(self.watch.scope, set()).add(name)

        return hook

    def enter(self, number: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if number != len(self.hidden) or len(self.wraps) != number:
                raise Unwalkable(f"{self.blocks[number]}: the blocks are not called once each, in their order.")
            place, hidden = first_tensor(args, kwargs)
            if hidden is None or place is None:
                raise Unwalkable(f"{self.blocks[number]}: is given no tensor.")
            if self.last is not None and hidden is not self.last:
                raise Unwalkable(f"{self.blocks[number]}: what it is given is not the output of the block before it.")
            for tensor in tensors_in((args, kwargs)):
                origin = self.watch.origin(tensor)
                if tensor is not hidden and origin is not None and origin >= 0:
                    raise Unwalkable(f"{self.blocks[number]}: is given more than the hidden state of {self.blocks[origin]}.")
                if tensor is not hidden:
                    self.others[id(tensor)] = tensor
            self.hidden.append(place)
            self.sizes.append(_bytes(hidden))
            if number == 0:
                self.before = self.watch.peak
            self.entry = self.watch.peak = self.watch.live
            self.last, self.watch.scope = hidden, number

        return hook

    def leave(self, number: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(hidden, Tensor):
                raise Unwalkable(
                    f"{self.blocks[number]}: expected it to return a tensor, or a tuple with one first, found {_kind(output)}."
                )
            self.wraps.append(None if hidden is output else len(output))
            self.inside.append(self.watch.peak - self.entry)
            if self.recorder is not None and self.layout is not None:
                self.recorder.begin(self.layout)  # the sums of a block are gone before the next one runs
            self.watch.peak = self.watch.live
            self.last = hidden
            self.watch.scope = OUTSIDE if number + 1 < len(self.blocks) else AFTER

        return hook

    def crossing(self, origin: int | None, storage: int, written: bool) -> None:
        """Refuse what would get lost when blocks run one after the other."""
        scope = self.watch.scope
        mine = self.last is not None and storage == storage_id(self.last)
        if origin is None or origin < 0:
            if written and scope >= 0:
                raise Unwalkable(f"{self.blocks[scope]}: changes in place what it is given.")
        elif origin != scope:
            if scope == AFTER:
                if not mine:
                    self.tail = f"what follows the blocks reads more than the output of the last one (of {self.blocks[origin]})."
            elif scope == OUTSIDE:
                raise Unwalkable(f"{self.blocks[origin]}: its output is changed or read before the next block.")
            elif written or not mine:
                what = "changes in place what it is given" if mine else f"reads more than the hidden state of {self.blocks[origin]}"
                raise Unwalkable(f"{self.blocks[scope]}: {what}.")

    def finish(self, error: Exception | None) -> Walk:
        count = len(self.blocks)
        if len(self.wraps) < count:
            if error is not None:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise Unwalkable(f"its forward pass cannot run without data ({reason}).") from error
            raise Unwalkable(f"{self.blocks[len(self.hidden)]}: is not called.")
        if error is not None:
            self.tail = f"what follows the blocks cannot run without data ({str(error).strip().partition(chr(10))[0]})."
        assert self.last is not None
        sizes = Sizes(
            self.before, tuple(self.inside), self.watch.peak, (*self.sizes, _bytes(self.last)), sum(map(_bytes, self.others.values()))
        )  # fmt: skip
        reads = self.watch.reads
        inside = tuple(frozenset(reads.get(i, ())) for i in range(count))
        before, after = frozenset(reads.get(OUTSIDE, ())), frozenset(reads.get(AFTER, ()))
        early = frozenset(self.called[OUTSIDE] - self.called[AFTER])
        return Walk(self.blocks, tuple(self.hidden), tuple(self.wraps), before, after, early, inside, self.tail, sizes)


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int | str | None, Tensor | None]:
    """Place and value of the first tensor among arguments, positional ones first."""
    for place, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor):
            return place, value
    return None, None


@contextlib.contextmanager
def _buffers_on_meta(model: nn.Module, known: Known) -> Generator[None]:
    """Within the block every buffer is on the meta device, as the parameters are; afterwards all are what they were."""
    places = [(m, n, b) for m in model.modules() for n, b in m.named_buffers(recurse=False)]
    try:
        for module, name, buffer in places:
            setattr(module, name, _to_meta(buffer, known))
        yield
    finally:
        for module, name, buffer in places:
            setattr(module, name, buffer)


def _to_meta(value: Any, known: Known) -> Any:
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    out = value.to("meta")
    known.learn(out, value.detach().cpu().clone())
    return out


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kind(value: Any) -> str:
    return type(value).__name__
