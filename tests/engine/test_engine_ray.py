"""Ray started for real: a lost worker or node costs the jobs it was at, and no more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from eckart.errors import Refused, UsageError

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """Two nodes on this machine, of one processor each."""
    from ray.cluster_utils import Cluster

    here = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", here)  # workers import this file by its name
        yield from _nodes(Cluster)


def _nodes(kind: type) -> Iterator[object]:
    made = kind(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@dataclass(frozen=True)
class Square:
    """Squares, and says who did it; a job named in `lethal` kills its process the first time."""

    folder: Path
    lethal: int = -1
    slow: float = 0.0

    def __call__(self, n: int) -> dict[str, object]:
        if self.slow:
            time.sleep(self.slow)
        mark = self.folder / f"died-{n}"
        if n == self.lethal and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(self.folder / "calls", "a") as file:
            file.write(f"{n}\n")
        return {"n": n, "square": n * n, "node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}


def test_results_of_all_jobs_from_both_nodes(cluster, tmp_path) -> None:
    from eckart.engine.ray import Ray

    found = list(Ray(workers=2).run(Square(tmp_path, slow=0.2), list(range(8)), cost=float))
    assert {f["n"]: f["square"] for f in found} == {n: n * n for n in range(8)}
    assert len({f["node"] for f in found}) == 2
    assert os.getpid() not in {f["pid"] for f in found}


def test_a_killed_worker_costs_one_job(cluster, tmp_path) -> None:
    from eckart.engine.ray import Ray

    found = list(Ray(workers=2).run(Square(tmp_path, lethal=3), list(range(6))))
    assert (tmp_path / "died-3").exists()
    assert sorted(f["square"] for f in found) == [n * n for n in range(6)]
    calls = [int(line) for line in (tmp_path / "calls").read_text().split()]
    assert sorted(calls) == list(range(6)), "no other job was run again"


def test_a_lost_node_costs_the_jobs_it_was_at(cluster, tmp_path) -> None:
    from eckart.engine.ray import Ray

    extra = cluster.add_node(num_cpus=1)
    results = Ray(workers=3).run(Square(tmp_path, slow=0.4), list(range(9)))
    found = [next(results)]
    cluster.remove_node(extra, allow_graceful=False)
    found += list(results)
    assert sorted(f["square"] for f in found) == [n * n for n in range(9)]


def refuse(n: int) -> int:
    raise Refused(f"job {n}: not this one")


def test_a_refusal_arrives_as_it_was(cluster) -> None:
    from eckart.engine.ray import Ray

    with pytest.raises(Refused, match="job 1: not this one"):
        list(Ray(workers=1).run(refuse, [1]))


def test_no_jobs_start_nothing() -> None:
    from eckart.engine.ray import Ray

    assert list(Ray(workers=1, address="nowhere:1").run(refuse, [])) == []


def test_bad_calls() -> None:
    from eckart.engine import engine_named
    from eckart.engine.ray import Ray

    with pytest.raises(UsageError, match="workers: expected at least 1"):
        Ray(workers=0)
    with pytest.raises(UsageError, match=r"expected local, ray, ray:ADDRESS or torchrun, found 'rey'\. Did you mean 'ray'"):
        engine_named("rey")
    with pytest.raises(UsageError, match="RANK is not set; start the ranks with: torchrun"):
        engine_named("torchrun")
