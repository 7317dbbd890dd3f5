"""Threads change neither the results nor the error."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from eckart.engine import Engine, Local
from eckart.errors import Refused, UsageError


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_job_runs_once(workers: int) -> None:
    engine: Engine = Local(workers)
    assert sorted(engine.run(lambda n: n * n, range(40))) == [n * n for n in range(40)]
    assert list(engine.run(lambda n: n, [])) == []


def test_one_worker_runs_in_order_in_the_callers_thread() -> None:
    seen = list(Local().run(lambda n: (n, threading.current_thread() is threading.main_thread()), range(5)))
    assert seen == [(n, True) for n in range(5)]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_jobs_are_taken_only_when_one_can_start(workers: int) -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for n in range(30):
            taken.append(n)
            yield n

    for done, _ in enumerate(Local(workers).run(lambda n: n, jobs()), 1):
        assert len(taken) <= done + workers


def test_jobs_really_run_at_once() -> None:
    barrier = threading.Barrier(3, timeout=30)
    assert sorted(Local(3).run(lambda n: (barrier.wait(), n)[1], range(3))) == [0, 1, 2]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_first_failing_job_is_the_one_that_raises(workers: int) -> None:
    late = threading.Event()

    def job(n: int) -> int:
        if n == 4:
            late.wait(0.05)  # the later failure comes first in time
            raise ValueError("job 4")
        if n == 5:
            late.set()
            raise ValueError("job 5")
        return n

    for _ in range(5):
        late.clear()
        got: list[int] = []
        with pytest.raises(ValueError, match="job 4"):
            got.extend(Local(workers).run(job, range(100)))
        assert set(got) <= set(range(4)) | {6, 7, 8, 9, 10, 11, 12}


def test_running_jobs_finish_after_a_failure_and_no_other_starts() -> None:
    started: list[int] = []
    ended: list[int] = []
    slow = threading.Event()

    def job(n: int) -> int:
        started.append(n)
        if n == 1:
            slow.set()
            raise ValueError("no")
        slow.wait(10)
        threading.Event().wait(0.05)
        ended.append(n)
        return n

    with pytest.raises(ValueError, match="no"):
        list(Local(2).run(job, range(50)))
    assert sorted(ended) == [n for n in sorted(started) if n != 1]
    assert len(started) == 2


def test_a_consumer_that_stops_early_waits_for_what_runs() -> None:
    ended: list[int] = []
    for _ in Local(3).run(ended.append, range(100)):
        break
    count = len(ended)
    threading.Event().wait(0.02)
    assert len(ended) == count <= 10


def test_retries() -> None:
    tries: dict[int, int] = {}

    def job(n: int) -> int:
        tries[n] = tries.get(n, 0) + 1
        if n == 2 and tries[n] < 3:
            raise OSError("flaky")
        return n

    assert sorted(Local(2, retries=2).run(job, range(4))) == [0, 1, 2, 3]
    assert tries == {0: 1, 1: 1, 2: 3, 3: 1}
    tries.clear()
    with pytest.raises(OSError, match="flaky"):
        list(Local(2, retries=1).run(job, range(4)))


def test_refusals_are_not_retried() -> None:
    tries: list[int] = []

    def job(n: int) -> int:
        tries.append(n)
        raise Refused("no")

    with pytest.raises(Refused):
        list(Local(retries=5).run(job, [1]))
    assert tries == [1]


def test_context_reaches_the_threads() -> None:
    from contextvars import ContextVar

    variable: ContextVar[str] = ContextVar("variable", default="unset")
    variable.set("set")
    assert set(Local(2).run(lambda _: variable.get(), range(4))) == {"set"}


@pytest.mark.parametrize("options", [{"workers": 0}, {"retries": -1}])
def test_wrong_numbers(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Local(**options)
