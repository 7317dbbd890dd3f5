"""Any sequence of runs, kills, full disks, changed recipes and damage: the output is absent or verified, and damage to it is found."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from faultlib import WRITES, Disk, Failing, PowerCut, Stop, make_source, run, times, tree
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eckart.errors import Incomplete, Refused
from eckart.store import verify, work

RECIPES = ("svd", "older")


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        memory = Path("/dev/shm")
        self.place = Path(tempfile.mkdtemp(prefix="eckart-test-", dir=memory if memory.is_dir() else None))
        self.source = make_source(self.place / "source")
        self.expected = {}
        for recipe in RECIPES:
            run(self.source, self.place / recipe, recipe=recipe)
            self.expected[recipe] = tree(self.place / recipe)
        self.before = tree(self.source), times(self.source)
        (self.place / "box").mkdir()
        self.out = self.place / "box" / "out"
        self.damaged = False

    def attempt(self, recipe: str, overwrite: bool, disk: Disk) -> None:
        done_before = tree(self.out) if self.out.exists() else None
        try:
            with disk.installed():
                run(self.source, self.out, recipe=recipe, overwrite=overwrite)
        except Refused as err:
            # with the disk well, only two things are in the way: an output, or the finished jobs of another recipe
            if not disk.hit and "exists and is not empty" not in str(err) and "recipe: was" not in str(err):
                raise
        except (Incomplete, Stop):
            assert disk.hit
        else:
            if self.damaged and tree(self.out) == done_before:
                return
            self.damaged = False
            assert tree(self.out) == self.expected[recipe]
        if self.out.exists() and tree(self.out) != done_before:
            self.damaged = False

    @rule(recipe=st.sampled_from(RECIPES), overwrite=st.booleans())
    def starts(self, recipe: str, overwrite: bool) -> None:
        self.attempt(recipe, overwrite, Disk(0))

    @rule(recipe=st.sampled_from(RECIPES), overwrite=st.booleans(), at=st.integers(1, 170), seed=st.integers(0, 9))
    def is_cut_off(self, recipe: str, overwrite: bool, at: int, seed: int) -> None:
        self.attempt(recipe, overwrite, PowerCut(at, seed))

    @rule(recipe=st.sampled_from(RECIPES), overwrite=st.booleans(), at=st.integers(1, 110))
    def fills_the_disk(self, recipe: str, overwrite: bool, at: int) -> None:
        self.attempt(recipe, overwrite, Failing(at, errno.ENOSPC, forever=True, ops=WRITES))

    @precondition(lambda self: hasattr(self, "out") and work.siblings(self.out))
    @rule(which=st.integers(0, 99), at=st.integers(0, 10**6))
    def work_is_damaged(self, which: int, at: int) -> None:
        folder = work.siblings(self.out)[0]
        victims = [
            p
            for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != work.FINGERPRINT and p.stat().st_size and work.OLD not in p.parts
        ]
        if victims:
            victim = victims[which % len(victims)]
            data = bytearray(victim.read_bytes())
            data[at % len(data)] ^= 4
            victim.write_bytes(data)

    @precondition(lambda self: hasattr(self, "out") and work.siblings(self.out))
    @rule()
    def work_is_removed(self) -> None:
        folder = work.siblings(self.out)[0]
        if not (folder / work.OLD).exists():
            shutil.rmtree(folder)

    @precondition(lambda self: hasattr(self, "out") and self.out.exists() and not self.damaged)
    @rule(which=st.integers(0, 99), at=st.integers(0, 10**6))
    def output_is_damaged(self, which: int, at: int) -> None:
        victims = [p for p in sorted(self.out.rglob("*")) if p.is_file() and p.name != "run.json"]
        victim = victims[which % len(victims)]
        data = bytearray(victim.read_bytes())
        data[at % len(data)] ^= 1
        victim.write_bytes(data)
        self.damaged = True

    @invariant()
    def absent_or_verified(self) -> None:
        if hasattr(self, "out") and self.out.exists():
            assert verify(self.out).ok is not self.damaged

    @invariant()
    def source_is_untouched(self) -> None:
        if hasattr(self, "out"):
            assert (tree(self.source), times(self.source)) == self.before

    def teardown(self) -> None:
        if hasattr(self, "place"):
            shutil.rmtree(self.place)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=int(os.environ.get("ECKART_MACHINE", "15")),
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
