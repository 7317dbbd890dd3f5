"""Progress of long loops: a bar on a terminal, plain lines elsewhere, nothing for what ends within two seconds.

Libraries call `track`; who owns the screen chooses with `shown`. From Python the default is "auto".
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Literal, TypeVar

T = TypeVar("T")
Mode = Literal["auto", "bar", "lines", "none"]
_mode: ContextVar[Mode] = ContextVar("eckart_progress", default="auto")
PATIENCE = 2.0  # seconds before anything is shown
EVERY = 10.0  # seconds between two plain lines


@contextlib.contextmanager
def shown(mode: Mode) -> Iterator[None]:
    """Within the block, show progress as `mode` says: "auto", "bar", "lines" or "none"."""
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield the items of a loop and show how far it is.

    Args:
        items: what is iterated over.
        label: what the loop does, for instance "factorising".
        total: number of items; taken from `len(items)` when it has one.
    """
    mode = _mode.get()
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "lines"
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    if mode == "none":
        yield from items
    elif mode == "bar":
        yield from _bar(items, label, total)
    else:
        yield from _lines(items, label, total)


def _lines(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    spoke = False
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - start >= PATIENCE and (not spoke or now - last >= EVERY):
            left = f", about {(now - start) / done * (total - done):.0f} s left" if total else ""
            print(f"{label}: {done}{f' of {total}' if total else ''}, {now - start:.0f} s{left}", file=sys.stderr, flush=True)
            last, spoke = now, True
    if spoke:
        print(f"{label}: {done} done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _bar(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total)
    start = time.monotonic()
    running = False
    try:
        for item in items:
            yield item
            if not running and time.monotonic() - start >= PATIENCE:
                bar.start()
                running = True
            bar.advance(task)
    finally:
        if running:
            bar.stop()
