"""Statistics for jobs in other processes: measured here or by all ranks together, and left in a file that every process reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..axes.protocols import Site, Stat
from ..engine import Engine
from ..stats import Stats, accumulate, fingerprint
from ..stats.share import load_partial, save_partial
from .calibrate import Calibration, measure, options_of, rows_of
from .host import Host


def measure_for(
    engine: Engine, host: Host, needs: frozenset[Stat], sites: Sequence[Site], how: Calibration, out: Path, by_blocks: Callable[[], Stats] | None = None
) -> tuple[Stats, Path]:  # fmt: skip
    """The statistics, and the file from which other processes read them.

    Ranks of torchrun each take a part of the batches; the sums are those of one process, bit for bit. Other engines, and the block runner,
    measure in the leading process. The file is kept until `tidy`, so a run that was killed does not measure again.

    Args:
        engine: where jobs will run.
        host, needs, sites, how, by_blocks: as for `measure`.
        out: the output, beside which the file lies unless `how` names another.
    """
    name = fingerprint(host.outline(), rows_of(host, how), needs, sites, **options_of(host, how))
    file = how.file or file_beside(out, name)
    where = replace(how, file=file, max_bytes=1 << 62)
    if file.exists() or by_blocks is not None or not _ranked(engine):
        engine.share(lambda: measure(host, needs, sites, where, by_blocks).fingerprint)
    else:
        _by_ranks(engine, host, needs, sites, how, file)
    return Stats.load(file, name, None if by_blocks is None else 0), file


def file_beside(out: Path, name: str) -> Path:
    """Where statistics of that fingerprint lie for a run into `out`."""
    import hashlib

    return out.with_name(f"{out.name}.partial-stats-{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors")


def tidy(out: Path, file: Path) -> None:
    """Remove the file after the run, if it lies where `file_beside` puts it."""
    if file.name.startswith(f"{out.name}.partial-stats-"):
        file.unlink(missing_ok=True)


def _ranked(engine: Engine) -> bool:
    """Whether every worker runs this very function."""
    return hasattr(engine, "rank") and engine.workers > 1


def _by_ranks(engine: Engine, host: Host, needs: frozenset[Stat], sites: Sequence[Site], how: Calibration, file: Path) -> None:
    rows, options = rows_of(host, how), options_of(host, how)
    shares = min(engine.workers, len(rows))
    bounds = [len(rows) * i // shares for i in range(shares + 1)]

    def part(number: int) -> str:
        start, stop = bounds[number], bounds[number + 1]
        made = accumulate(host.live(), rows[start:stop], needs, sites, start=start, **options)
        path = file.with_name(f"{file.name}.{number}")
        save_partial(made, path)
        return str(path)

    def merge() -> str:
        paths = [file.with_name(f"{file.name}.{number}") for number in range(shares)]
        like = accumulate(host.live(), rows[:1], needs, sites, **options)
        whole = load_partial(paths[0], like)
        for path in paths[1:]:
            whole = whole.merge(load_partial(path, like))
        found = whole.finish()
        found.save(file)
        for path in paths:
            path.unlink()
        return found.fingerprint

    for _ in engine.run(part, range(shares)):
        pass
    engine.share(merge)
