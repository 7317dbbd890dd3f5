"""How blocks are called: their arguments taken down while the model's own forward runs over stubs, and put back when a block is run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from .known import tensors_in
from .spool import Spool
from .walk import Unwalkable, Walk, first_tensor


class _Stop(Exception):
    """All blocks have been called."""


class _Hidden:
    """Stands where the hidden state goes."""


class _Kept:
    """Stands for a tensor in the spool."""

    def __init__(self, key: tuple[str, int, int]) -> None:
        self.key = key


class Calls:
    """The arguments of every block for every batch. Tensors lie in a spool, each once, however many blocks are given it.

    Args:
        model: the model whose blocks are called.
        walk: how.
        spool: where tensors go; hidden states are not put there.
        device: where blocks run.
    """

    def __init__(self, model: nn.Module, walk: Walk, spool: Spool, device: torch.device) -> None:
        self.model, self.walk, self.spool, self.device = model, walk, spool, device
        self._taken: dict[tuple[int, int], tuple[Any, Any]] = {}

    def record(self, leaf: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the model up to its last block, every block a stub, and take down what they are given.

        Returns:
            The hidden state that the first block is given.

        Raises:
            Unwalkable: with real data the blocks are called in another way than without.
        """
        seen: dict[int, tuple[Tensor, int, _Kept]] = {}
        states: list[Tensor] = []

        def keep(tensor: Tensor) -> _Kept:
            if any(tensor is s for s in states[1:]):
                raise Unwalkable(f"batch {leaf}: a block is given more than the hidden state of the one before it.")
            if id(tensor) not in seen:
                kept = _Kept(("argument", leaf, len(seen)))
                self.spool.put(kept.key, tensor.detach().cpu())
                seen[id(tensor)] = tensor, tensor._version, kept
            return seen[id(tensor)][2]

        def stub(number: int) -> Callable[..., Any]:
            def forward(*given: Any, **named: Any) -> Any:
                place, hidden = first_tensor(given, named)
                expected = not states or hidden is states[-1]
                if hidden is None or place != self.walk.hidden[number] or not expected or (leaf, number) in self._taken:
                    raise Unwalkable(f"{self.walk.blocks[number]}: with real data it is called in another way than without (batch {leaf}).")
                if not states:
                    states.append(hidden)
                self._taken[leaf, number] = _mapped((given, named), lambda t: _Hidden() if t is hidden else keep(t))
                if number + 1 == len(self.walk.blocks):
                    raise _Stop
                states.append(hidden.view_as(hidden))  # another object, by which the next block is checked
                return _wrapped(states[-1], self.walk.wraps[number])

            return forward

        with _stubs(self.model, self.walk, stub), contextlib.suppress(_Stop):
            self.model(*args, **kwargs)
        missing = next((b for n, b in enumerate(self.walk.blocks) if (leaf, n) not in self._taken), None)
        if missing is not None:
            raise Unwalkable(f"{missing}: is not called with real data (batch {leaf}).")
        if any(tensor._version != version for tensor, version, _ in seen.values()):
            raise Unwalkable(f"batch {leaf}: an argument of the blocks is changed in place between them.")
        return states[0]

    def run(self, number: int, leaf: int, hidden: Tensor) -> Tensor:
        """Run one block on one batch."""
        args, kwargs = self._back(self._taken[leaf, number], hidden)
        output = self.model.get_submodule(self.walk.blocks[number])(*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def finish(self, leaf: int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> None:
        """Run the model with stubs of which the last returns this hidden state, for the sake of what lies outside of the blocks."""
        last = len(self.walk.blocks) - 1

        def stub(number: int) -> Callable[..., Any]:
            def forward(*given: Any, **named: Any) -> Any:
                state = hidden if number == last else first_tensor(given, named)[1]
                assert state is not None
                return _wrapped(state, self.walk.wraps[number])

            return forward

        with _stubs(self.model, self.walk, stub):
            self.model(*args, **kwargs)

    def forget(self, number: int) -> None:
        """Drop what only this block was given."""
        mine = [k for k in self._taken if k[1] == number]
        keys = {t.key for k in mine for t in _kept_in(self._taken.pop(k))}
        for key in keys - {t.key for taken in self._taken.values() for t in _kept_in(taken)}:
            self.spool.drop(key)

    def _back(self, value: Any, hidden: Tensor) -> Any:
        # no closure: one that calls itself is a cycle, which keeps the hidden state until the collector comes by
        if isinstance(value, _Hidden):
            return hidden
        if isinstance(value, _Kept):
            return self.spool.get(value.key).to(self.device)
        if isinstance(value, dict):
            return {k: self._back(v, hidden) for k, v in value.items()}
        return type(value)(self._back(v, hidden) for v in value) if type(value) in (tuple, list) else value


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nested plain tuples, lists and dicts with other tensors.

    Raises:
        Unwalkable: a tensor lies in a container of another kind, which could not be put together again.
    """
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {k: _mapped(v, change) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(v, change) for v in value)
    if any(True for _ in tensors_in(value)):
        raise Unwalkable(f"a block is given tensors in a {type(value).__name__}.")
    return value


def _kept_in(value: Any) -> Generator[_Kept]:
    if isinstance(value, _Kept):
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _kept_in(item)


def _wrapped(hidden: Tensor, wraps: int | None) -> Any:
    """The hidden state as the block returns it; what else it returns is None, since nothing reads it."""
    return hidden if wraps is None else (hidden, *[None] * (wraps - 1))


@contextlib.contextmanager
def _stubs(model: nn.Module, walk: Walk, make: Callable[[int], Callable[..., Any]]) -> Generator[None]:
    """Within the block the forward of every block is a stub. The modules stay, since models read attributes off them."""
    modules = [model.get_submodule(name) for name in walk.blocks]
    try:
        for number, module in enumerate(modules):
            module.forward = make(number)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
