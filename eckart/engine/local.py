"""Jobs on this machine, one after another or in threads."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import EckartError, UsageError

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Local:
    """Run jobs in threads of this process. It does not make a job faster: torch's own threads do that.

    Jobs start in their order, at most `workers` at once, and are only taken from the iterable when one can start. After a failure no job
    starts; those that run finish, and the failure of the job that comes first is raised. So the same failing jobs give the same error
    with any number of workers.

    Args:
        workers: jobs at once; 1 runs them in the caller's thread.
        retries: how often a failed job is tried again. Refusals and wrong calls (`EckartError`) are final.

    Example:
        >>> sorted(Local(workers=2).run(lambda n: n * n, range(4)))
        [0, 1, 4, 9]
    """

    workers: int = 1
    retries: int = 0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"workers: expected at least 1, found {self.workers}.")
        if self.retries < 0:
            raise UsageError(f"retries: expected at least 0, found {self.retries}.")

    @property
    def remote(self) -> bool:
        """Jobs run in this process."""
        return False

    @property
    def leads(self) -> bool:
        """There is no other process."""
        return True

    def share(self, make: Callable[[], Any]) -> Any:
        """The value itself."""
        return make()

    def run(self, fn: Callable[[Job], Result], jobs: Iterable[Job], cost: Callable[[Job], float] | None = None) -> Iterator[Result]:
        """Yield the results as they come; with one worker, in the order of the jobs."""
        if self.workers == 1:
            for job in jobs:
                yield self._attempt(fn, job)
            return
        waiting = enumerate(jobs)
        running: dict[Future[Result], int] = {}
        failed: dict[int, BaseException] = {}
        with ThreadPoolExecutor(self.workers, thread_name_prefix="eckart") as pool:
            while True:
                while not failed and len(running) < self.workers and (item := next(waiting, None)) is not None:
                    number, job = item
                    running[pool.submit(contextvars.copy_context().run, self._attempt, fn, job)] = number
                if not running:
                    break
                for future in sorted(wait(running, return_when=FIRST_COMPLETED).done, key=running.__getitem__):
                    number = running.pop(future)
                    error = future.exception()
                    if error is None:
                        yield future.result()
                    else:
                        failed[number] = error
        if failed:
            raise failed[min(failed)]

    def _attempt(self, fn: Callable[[Job], Result], job: Job) -> Result:
        left = self.retries
        while True:
            try:
                return fn(job)
            except EckartError:
                raise
            except Exception:
                if left == 0:
                    raise
                left -= 1
