"""Any sequence of runs, kills, full disks, changed recipes, edited sources and damage: the output is absent or verified, and damage to it is
found. Once over the store alone and once through `ek.compress`."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import hypothesis.strategies as st
from faultlib import NOTES, RUNS, WRITES, Disk, Failing, PowerCut, Stop, edit_a_row, make_source, result, times, tree
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eckart.errors import Incomplete, Refused
from eckart.store import verify, work

RECIPES = ("svd", "older")
# with the disk well, only these are in the way of a run: an output, or the finished jobs of another recipe or another source
IN_THE_WAY = ("exists and is not empty", "unfinished run with other settings", "begun on other files")


class Machine(RuleBasedStateMachine):
    how: ClassVar[str]
    calls: ClassVar[int]  # about as many as a run makes
    edits: ClassVar[bool] = True

    @initialize()
    def begin(self) -> None:
        memory = Path("/dev/shm")
        self.place = Path(tempfile.mkdtemp(prefix="eckart-test-", dir=memory if memory.is_dir() else None))
        self.run: Callable[..., None] = RUNS[self.how]
        self.source = make_source(self.place / "source")
        for edited in (False, True):
            shutil.copytree(self.source, self.place / f"source-{edited}")
        edit_a_row(self.place / "source-True")
        self.expected = {}
        for self.edited in (True, False):
            self.put_source()
            for recipe in RECIPES:
                self.run(self.source, self.place / f"{recipe}-{self.edited}", recipe=recipe)
                self.expected[recipe, self.edited] = result(self.place / f"{recipe}-{self.edited}")
        assert self.expected["svd", True] != self.expected["svd", False]
        (self.place / "box").mkdir()
        self.out = self.place / "box" / "out"
        self.damaged = False

    def put_source(self) -> None:
        for file in (self.place / f"source-{self.edited}").glob("*.safetensors"):
            shutil.copyfile(file, self.source / file.name)
        self.before = tree(self.source), times(self.source)

    def attempt(self, recipe: str, overwrite: bool, disk: Disk) -> None:
        done_before = result(self.out) if self.out.exists() else None
        try:
            with disk.installed():
                self.run(self.source, self.out, recipe=recipe, overwrite=overwrite)
        except Refused as err:
            if not disk.hit and not any(reason in str(err) for reason in IN_THE_WAY):
                raise
        except (Incomplete, Stop):
            assert disk.hit
        else:
            if self.damaged and result(self.out) == done_before:
                return
            self.damaged = False
            assert result(self.out) == self.expected[recipe, self.edited]
        if self.out.exists() and result(self.out) != done_before:
            self.damaged = False

    @rule(recipe=st.sampled_from(RECIPES), overwrite=st.booleans())
    def starts(self, recipe: str, overwrite: bool) -> None:
        self.attempt(recipe, overwrite, Disk(0))

    @rule(recipe=st.sampled_from(RECIPES), overwrite=st.booleans(), at=st.integers(1, 1000), seed=st.integers(0, 9))
    def is_killed(self, recipe: str, overwrite: bool, at: int, seed: int) -> None:
        self.attempt(recipe, overwrite, PowerCut(1 + at % self.calls, seed))

    @rule(recipe=st.sampled_from(RECIPES), overwrite=st.booleans(), at=st.integers(1, 1000))
    def fills_the_disk(self, recipe: str, overwrite: bool, at: int) -> None:
        self.attempt(recipe, overwrite, Failing(1 + at % (self.calls * 2 // 3), errno.ENOSPC, forever=True, ops=WRITES))

    @precondition(lambda self: self.edits and hasattr(self, "out"))
    @rule()
    def the_source_is_edited(self) -> None:
        """One row, or that row back; neither is a change that the fingerprint sees."""
        self.edited = not self.edited
        self.put_source()

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
            _flip(victims[which % len(victims)], at)

    @precondition(lambda self: hasattr(self, "out") and work.siblings(self.out))
    @rule()
    def work_is_removed(self) -> None:
        folder = work.siblings(self.out)[0]
        if not (folder / work.OLD).exists():
            shutil.rmtree(folder)

    @precondition(lambda self: hasattr(self, "out") and self.out.exists() and not self.damaged)
    @rule(which=st.integers(0, 99), at=st.integers(0, 10**6))
    def output_is_damaged(self, which: int, at: int) -> None:
        victims = [p for p in sorted(self.out.rglob("*")) if p.is_file() and p.name not in NOTES]
        _flip(victims[which % len(victims)], at)
        self.damaged = True

    @precondition(lambda self: hasattr(self, "out") and self.out.exists())
    @rule()
    def output_is_removed(self) -> None:
        shutil.rmtree(self.out)
        self.damaged = False

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


def _flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 1
    file.write_bytes(data)


class StoreMachine(Machine):
    how, calls = "store", 170


class CompressMachine(Machine):
    how, calls = "compress", 200


def _settings(examples: int) -> settings:
    times = float(os.environ.get("ECKART_MACHINE", "1"))  # nightly: more
    return settings(
        max_examples=max(1, round(examples * times)),
        stateful_step_count=15,
        deadline=None,
        derandomize=times == 1,
        suppress_health_check=list(HealthCheck),
    )


TestStore = StoreMachine.TestCase
TestStore.settings = _settings(15)
TestCompress = CompressMachine.TestCase
TestCompress.settings = _settings(5)
