"""Memory that is freed goes back to the system at once."""

from __future__ import annotations

import contextlib
import ctypes
import sys

M_MMAP_THRESHOLD = -3  # number of the option in glibc's malloc.h
THRESHOLD = 128 << 10  # bytes; glibc's own start value


def return_freed_memory() -> None:
    """Let every large tensor be a mapping of its own, from now on in this process.

    glibc raises its threshold to the size of what is freed, up to 32 MiB, and keeps what lies below it. Weights, activations and Grams of
    many sizes then leave holes: block-by-block calibration took 419 MiB where 255 were in use, 343 with `malloc_trim` after every batch,
    and 260 with a fixed threshold, for 8% more time (`bench/blocks.py`). Another libc is left as it is.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD)
