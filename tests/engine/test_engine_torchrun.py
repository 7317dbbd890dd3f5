"""The packing of jobs, and two ranks for real."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eckart.engine.torchrun import pack

PROGRAM = """
import json, sys
from pathlib import Path
from eckart.engine.torchrun import Torchrun
from eckart.errors import Refused

engine = Torchrun()
def square(n):
    if "fail" in sys.argv and n == 2:
        raise Refused("job 2: not this one")
    return {"n": n, "square": n * n, "rank": engine.rank}
first = sorted(engine.run(square, list(range(7)), cost=float), key=lambda f: f["n"])
shared = engine.share(lambda: {"made by": engine.rank, "list": (1, 2)})
second = list(engine.run(square, [5]))
Path(sys.argv[1], f"rank{engine.rank}.json").write_text(json.dumps([first, shared, second, engine.leads]))
"""


@given(st.lists(st.floats(0, 100), max_size=30), st.integers(1, 6))
def test_every_item_is_in_one_bin(costs, bins) -> None:
    found = pack(costs, bins)
    assert len(found) == bins
    assert sorted(itertools.chain(*found)) == list(range(len(costs)))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
def test_no_packing_is_better_by_more_than_a_third(costs, bins) -> None:
    best = min(
        max(sum(c for c, b in zip(costs, where, strict=True) if b == bin) for bin in range(bins))
        for where in itertools.product(range(bins), repeat=len(costs))
    )
    ours = max(sum(costs[i] for i in one) for one in pack([float(c) for c in costs], bins))
    assert ours <= best * (4 / 3 - 1 / (3 * bins)) + 1e-9  # Graham 1969


def start(tmp_path, *more: str) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(program), str(tmp_path), *more]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)


def test_two_ranks_see_all_results(tmp_path) -> None:
    done = start(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    zero, one = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert zero[0] == one[0]
    assert [f["square"] for f in zero[0]] == [n * n for n in range(7)]
    assert {f["rank"] for f in zero[0]} == {0, 1}
    assert zero[1] == one[1] == {"made by": 0, "list": [1, 2]}
    assert zero[2] == one[2]
    assert (zero[3], one[3]) == (True, False)


def test_a_failure_in_one_rank_ends_all(tmp_path) -> None:
    done = start(tmp_path, "fail")
    assert done.returncode != 0
    assert "job 2: not this one" in done.stderr
    assert not (tmp_path / "rank0.json").exists()


def test_costs_decide() -> None:
    with pytest.raises(ValueError, match="min"):
        pack([1.0], 0)
    assert pack([3.0, 3.0, 2.0, 2.0, 2.0], 2) == [[0, 2, 4], [1, 3]]
