"""Jobs spread over the ranks of `torchrun`, for clusters under Slurm without Ray: `torchrun --nproc-per-node 2 -m eckart compress ...`.

Every rank runs the same program. Jobs are packed by their predicted cost before the first one starts, so there is no scheduler; results
(plain values) pass through torchrun's own key-value store. Source and output must be on a disk that every rank sees.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

from ..errors import UsageError

Job = TypeVar("Job")
Result = TypeVar("Result")
CONNECT = timedelta(minutes=5)
WAIT = timedelta(days=7)  # a rank that died is noticed by torchrun, which ends the others


def pack(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Indices of the items in each bin: dearest first into the emptiest bin. A pure function, so all ranks agree without talking.

    Example:
        >>> pack([5.0, 1.0, 4.0, 2.0], 2)
        [[0, 1], [2, 3]]
    """
    out: list[list[int]] = [[] for _ in range(bins)]
    load = [0.0] * bins
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(bins), key=lambda b: (load[b], b))
        out[least].append(item)
        load[least] += costs[item]
    return [sorted(one) for one in out]


class Torchrun:
    """Run jobs on the ranks that torchrun started. Not for a single process: `Local` is.

    Raises:
        UsageError: this process was not started by torchrun.
    """

    remote = True

    def __init__(self) -> None:
        missing = [k for k in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
        if missing:
            raise UsageError(
                f"engine torchrun: {missing[0]} is not set; start the ranks with: torchrun --nproc-per-node 2 -m eckart compress ... --engine torchrun"
            )
        self.rank = int(os.environ["RANK"])
        self.workers = int(os.environ["WORLD_SIZE"])
        self._calls = itertools.count()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def run(self, fn: Callable[[Job], Result], jobs: Sequence[Job], cost: Callable[[Job], float] | None = None) -> Iterator[Result]:
        """Yield all results in every rank: its own as they are done, those of the others as they arrive."""
        call = next(self._calls)
        shares = pack([cost(j) for j in jobs] if cost else [1.0] * len(jobs), self.workers)
        others = {i for rank, share in enumerate(shares) if rank != self.rank for i in share}
        for index in shares[self.rank]:
            value = fn(jobs[index])
            self._store.set(f"{call}/{index}", json.dumps(value))
            yield value
            for there in [i for i in sorted(others) if self._store.check([f"{call}/{i}"])]:
                others.discard(there)
                yield self._fetch(f"{call}/{there}")
        for there in sorted(others):
            yield self._fetch(f"{call}/{there}")

    def share(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, in every rank; the others wait for it."""
        key = f"{next(self._calls)}/shared"
        if self.leads:
            text = json.dumps(make())
            self._store.set(key, text)
            return json.loads(text)
        return self._fetch(key)

    def _fetch(self, key: str) -> Any:
        self._store.wait([key], WAIT)
        return json.loads(self._store.get(key))

    @cached_property
    def _store(self) -> Any:
        import torch.distributed

        dist: Any = torch.distributed
        own = self.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's agent keeps it
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.PrefixStore("eckart", dist.TCPStore(host, port, self.workers, own, CONNECT))
