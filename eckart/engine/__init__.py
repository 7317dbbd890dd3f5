"""How jobs are run: here in threads, in a Ray cluster, or by ranks; an engine knows nothing of what a job does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..errors import UsageError, did_you_mean
from .local import Local

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

Job = TypeVar("Job")
Result = TypeVar("Result")

NAMES = ("local", "ray", "torchrun")


class Engine(Protocol):
    """Anything that runs independent jobs: each at least once, results in any order.

    `remote`: jobs run in other processes, so function and jobs are plain values (paths and names, no tensors), and results are JSON.
    `leads`: this process decides, writes and prints. All ranks of a `torchrun` engine call the same methods in the same order.
    """

    @property
    def remote(self) -> bool: ...
    @property
    def leads(self) -> bool: ...
    @property
    def workers(self) -> int: ...

    def run(self, fn: Callable[[Job], Result], jobs: Sequence[Job], cost: Callable[[Job], float] | None = None) -> Iterator[Result]:
        """Yield `fn(job)` for every job; `cost` (any unit) helps to spread them."""
        ...

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the leading process, in every process; JSON values."""
        ...


def engine_named(name: str, workers: int = 1, threads: int = 1) -> Engine:
    """An engine from its name: "local", "ray", "ray:ADDRESS", "torchrun".

    Args:
        name: as above; an address is what `ray.init` takes ("auto", "host:port").
        workers: jobs at once; "torchrun" has as many as it was started with.
        threads: threads of each job, by which Ray counts processors.

    Raises:
        UsageError: an unknown name, a missing package, or ranks that were not started by torchrun.

    Example:
        >>> engine_named("local", workers=2)
        Local(workers=2, retries=0)
    """
    kind, _, address = name.partition(":")
    if kind == "local" and not address:
        return Local(workers)
    if kind == "ray":
        from .ray import Ray

        return Ray(workers, threads, address or None)
    if kind == "torchrun" and not address:
        from .torchrun import Torchrun

        return Torchrun()
    raise UsageError(f"engine: expected local, ray, ray:ADDRESS or torchrun, found {name!r}.{did_you_mean(kind, NAMES)}")


__all__ = ["Engine", "Local", "engine_named"]
