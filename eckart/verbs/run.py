"""What any run over a model has: its identity, its threads, and the time of its steps."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..axes.protocols import Bundle
from ..errors import Refused, UsageError
from ..plan import Plan
from ..progress import track
from ..store import read_manifest
from .host import Host
from .output import versions


def identity(host: Host, plan: Plan, statistics: str) -> dict[str, str]:
    """What a resume, and a finished output, must agree with."""
    return {
        "plan": plan.fingerprint,
        "source": host.reader.fingerprint,
        "statistics": statistics,
        "versions": json.dumps(versions(), sort_keys=True),
    }


def check_seed(seed: int) -> None:
    """Refuses a seed that a manifest cannot hold."""
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed: expected an integer in [0, 2**63), found {seed}.")


def is_output(out: str | Path) -> bool:
    """Whether an earlier run of ours has made this folder."""
    try:
        read_manifest(Path(out))
    except Refused:
        return False
    return True


class Clock:
    """Seconds per step."""

    def __init__(self, began: float) -> None:
        self.last = began
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What has passed since the last lap belongs to `name`."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now


@contextlib.contextmanager
def torch_threads(wanted: int | None) -> Iterator[int]:
    """Within the block torch uses that many threads, also in threads started there; yields the number."""
    import torch

    before = torch.get_num_threads()
    if wanted is not None and wanted < 1:
        raise UsageError(f"threads: expected at least 1, found {wanted}.")
    count = wanted if wanted is not None else before
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def content(host: Host, bundles: Sequence[Bundle]) -> str:
    """sha256 of every targeted tensor, each of which must be finite, before an hour of statistics is spent on the others."""
    import hashlib

    import torch

    from ..store.dtypes import to_bytes

    digest = hashlib.sha256()
    for bundle in track(bundles, "checking weights"):
        for key in bundle.keys:
            value = host.reader.read(key)
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise Refused(
                    f"{key}: {bad} of {value.numel()} values are NaN or Inf. Nothing was written; repair or re-download {host.name}."
                )
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(to_bytes(value))
    return digest.hexdigest()
