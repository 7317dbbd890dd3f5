"""Jobs on a Ray cluster. A lost worker or node costs the jobs it was at: they are run again elsewhere.

Tensors never travel through Ray: a job carries paths and names, and a result is a few plain values. Source and output must be on a disk
that every node sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import EckartError, Incomplete, UsageError

Job = TypeVar("Job")
Result = TypeVar("Result")
RETRIES = 3  # lost workers that a single job survives


@dataclass(frozen=True)
class Ray:
    """Run jobs as Ray tasks. It starts a cluster on this machine unless an address is given or one is running in this process.

    Args:
        workers: jobs at once.
        threads: processors that Ray counts for each job.
        address: as `ray.init` takes it ("auto", "host:port"); None for this machine alone.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """

    workers: int = 2
    threads: int = 1
    address: str | None = None

    remote = True
    leads = True

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"workers: expected at least 1, found {self.workers}.")
        _ray()

    def run(self, fn: Callable[[Job], Result], jobs: Sequence[Job], cost: Callable[[Job], float] | None = None) -> Iterator[Result]:
        """Yield the results as they come; dear jobs start first."""
        if not jobs:
            return
        ray = self._start()
        todo = sorted(range(len(jobs)), key=lambda i: (-cost(jobs[i]), i)) if cost else list(range(len(jobs)))
        todo.reverse()
        task: Any = ray.remote(num_cpus=self.threads, max_retries=RETRIES, retry_exceptions=False)(_call)
        shared = ray.put(fn)
        running: list[Any] = []
        try:
            while todo or running:
                while todo and len(running) < self.workers:
                    running.append(task.remote(shared, jobs[todo.pop()]))
                (ready, *_), running = ray.wait(running, num_returns=1)
                yield self._value(ray, ready)
        finally:
            for one in running:
                ray.cancel(one, force=False)

    def share(self, make: Callable[[], Any]) -> Any:
        """The value itself: jobs of this engine share nothing but what they carry."""
        return make()

    def _start(self) -> Any:
        ray = _ray()
        if ray.is_initialized():
            return ray
        try:
            if self.address is None:
                ray.init(num_cpus=self.workers * self.threads, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            else:
                ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError) as error:
            raise UsageError(
                f"engine ray:{self.address}: no cluster answers there ({error}). Start one with `ray start --head`."
            ) from error
        return ray

    def _value(self, ray: Any, ready: Any) -> Any:
        try:
            return ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, EckartError) else error) from error
        except ray.exceptions.RayError as error:  # a worker or node was lost more often than the retries allow
            raise Incomplete(f"engine ray: a job was lost {RETRIES + 1} times ({type(error).__name__}).", "the same command") from error


def _call(fn: Callable[[Any], Any], job: Any) -> Any:
    return fn(job)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError('engine ray: Ray is not installed. Install it with: pip install "eckart[ray]"') from error
    return ray
