"""How jobs are run: here, in threads; an engine knows nothing of what a job does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from .local import Local

Job = TypeVar("Job")
Result = TypeVar("Result")


class Engine(Protocol):
    """Anything that runs independent jobs: each at least once, results in any order."""

    def run(self, fn: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield `fn(job)` for every job; jobs start in their order."""
        ...


__all__ = ["Engine", "Local"]
