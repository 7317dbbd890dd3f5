"""Calibration data -> the statistics that a recipe needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..axes.protocols import Site, Stat
from ..data import batches, load_texts
from ..errors import UsageError, did_you_mean
from ..stats import Stats, collect, fingerprint, predict_bytes
from .host import Host, is_causal

PROBES = 3  # random projections per text; on MiniLM at 40% of the parameters 1 gave a mean cosine of .780, 3 gave .797
Runner = Literal["auto", "whole", "blocks"]
RUNNERS: tuple[str, ...] = get_args(Runner)
MAX_STATS = 4 << 30  # bytes of a statistics file that is written without being asked twice


@dataclass(frozen=True)
class Calibration:
    """How statistics are taken: part of the result's identity, except for the file.

    Args:
        texts: texts, token-id lists, or input tensors of a plain module.
        max_length: tokens per text or window; None is the model's limit, at most 512.
        batch_size: texts per forward; sums are taken per batch.
        seed: of random probes.
        probes: random projections per text, where gradients are those of random projections.
        loss: for a plain module and a backward statistic: (output, batch) -> scalar.
        file: where statistics are kept for the next run, if anywhere.
        max_bytes: larger statistics are not written.
        runner: "whole" has the model in memory, "blocks" one block of it, "auto" the first where that fits into the limit and can do it. The
            sums are the same.
        limit: bytes of memory that the run may take beside the program; None for no limit.
    """

    texts: Any
    max_length: int | None = None
    batch_size: int = 8
    seed: int = 0
    probes: int = PROBES
    loss: Any = None
    file: Path | None = None
    max_bytes: int = MAX_STATS
    runner: Runner = "auto"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.runner not in RUNNERS:
            raise UsageError(f"calibrate: expected {', '.join(RUNNERS)}, found {self.runner!r}.{did_you_mean(self.runner, RUNNERS)}")


def load_calibration(calib: Any, needs: frozenset[Stat], recipe: str, judges: bool = False) -> Any:
    """The calibration texts, checked before any work.

    Raises:
        UsageError: the recipe needs statistics and there is no calibration.
        Refused: an empty or unreadable source.
    """
    if calib is None:
        if needs or judges:
            what = ", ".join(sorted({f"{s.kind} ({s.via})" for s in needs} | ({"the model's loss"} if judges else set())))
            raise UsageError(
                f"{recipe} measures {what} on calibration text, and there is none. Give --calib FILE (calib=...), or use --recipe svd, which needs no data."
            )
        return None
    return list(calib) if is_tensors(calib) else load_texts(calib)


def is_tensors(calib: Any) -> bool:
    """Whether calibration is a list of input tensors."""
    import torch

    return isinstance(calib, Sequence) and len(calib) > 0 and isinstance(calib[0], torch.Tensor)


def measure(
    host: Host, needs: frozenset[Stat], sites: Sequence[Site], how: Calibration, by_blocks: Callable[[], Stats] | None = None
) -> Stats:  # fmt: skip
    """One pass over the calibration text through the original model, or the file of an earlier one.

    Args:
        host, needs, sites, how: what is measured.
        by_blocks: measures in the place of the whole model; what is read from a file then stays there until it is asked for.

    Raises:
        Refused: the file holds statistics of another model, other data or other needs.
    """
    rows, options = rows_of(host, how), options_of(host, how)
    if how.file is not None and how.file.exists():
        expected = fingerprint(host.outline(), rows, needs, sites, **options)
        return Stats.load(how.file, expected, None if by_blocks is None else 0)
    found = by_blocks() if by_blocks is not None else collect(host.live(), rows, needs, sites, **options)
    if how.file is not None and predict_bytes(needs, sites) <= how.max_bytes:
        found.save(how.file)
    return found


def rows_of(host: Host, how: Calibration) -> list[Any]:
    """The calibration text as batches."""
    if is_tensors(how.texts):
        return list(how.texts)
    tokenizer = host.tokenizer() if isinstance(how.texts[0], str) else None
    limit = length_limit(host, how.max_length)
    return list(batches(how.texts, tokenizer, max_length=limit, batch_size=how.batch_size, split_long=is_causal(host.outline())))


def options_of(host: Host, how: Calibration) -> dict[str, Any]:
    """What `stats.collect` is told beside model, batches, needs and sites."""
    return {"seed": how.seed, "probes": how.probes, "loss": how.loss, "model_id": host.reader.fingerprint}


def length_limit(host: Host, wanted: int | None, top: int = 512) -> int:
    """Tokens per text: what is wanted, else the model's own limit, at most `top`."""
    config = host.reader.config
    own = config.get("max_position_embeddings") or config.get("n_positions") or top
    return wanted if wanted is not None else min(int(own), top)
