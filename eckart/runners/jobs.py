"""One job, wherever it runs. In this process it shares open files; in another it is given paths and names, and opens them itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Bundle, Edits, Parts, Read, Site, StatsView
from ..axes.recipe import Recipe
from ..axes.solve import ReadBias, solve, spectrum
from ..errors import Refused
from ..stats import Stats
from ..store import Reader, TensorInfo
from ..store.parts import write_job

if TYPE_CHECKING:
    from torch import Tensor


HELD = 1 << 28  # bytes of statistics that another process keeps in memory; more are read from their file when a job wants them


@dataclass(frozen=True)
class Task:
    """What is to be done with one bundle; plain values.

    Args:
        bundle: the matrices, by name.
        rank: triples kept; 0 for a bundle that stays dense and is only stored otherwise.
        cap: where spectra decide, the most triples that the cut may want; 0 where the rank follows from the shape.
        algorithm, seed: as the plan has them.
        seconds: predicted, to spread jobs.
        places: where its tensors go, for a job that writes by itself.
    """

    bundle: Bundle
    rank: int
    algorithm: str
    seed: int
    cap: int = 0
    seconds: float = 0.0
    places: Mapping[str, TensorInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What every job of a run shares in one process. Tensors are read to the CPU, and factored on `device`."""

    recipe: Recipe
    read: Read
    read_bias: ReadBias
    stats: StatsView
    device: str = "cpu"

    def look(self, task: Task) -> tuple[tuple[float, ...], Parts | None]:
        """Wave one: the value of each rank, and the leading triples."""
        found = spectrum(
            self.recipe, task.bundle, self.read, self.stats, cap=max(1, task.cap), algorithm=task.algorithm, seed=task.seed, device=self.device
        )  # fmt: skip
        return found.curve, found.parts

    def cut(self, task: Task, parts: Parts | None = None) -> Edits:
        """The new tensors of a bundle. Parts that were not kept are made again as they were, so that keeping them changes no byte."""
        if task.rank == 0:
            return self.recipe.form.leave(task.bundle, self.read, self.read_bias)
        if parts is None and task.cap:
            parts = self.look(task)[1]
        return solve(
            self.recipe, task.bundle, self.read, self.read_bias, self.stats, rank=task.rank, algorithm=task.algorithm, seed=task.seed, parts=parts,
            device=self.device,
        )  # fmt: skip


class NoStats:
    """Stands where a recipe measures nothing."""

    def get(self, stat: Any, site: Site) -> Any:
        """Refuses."""
        raise Refused(f"{site.name}: {stat.kind} was never declared in `needs`, so it was not measured.")


@dataclass(frozen=True)
class Desk:
    """The same for a job in another process: paths and plain values.

    Args:
        source: folder of the checkpoint.
        recipe: the choices.
        threads: of torch, for this job.
        stats: file of the statistics, "" where nothing is measured.
        shards: folder of the preallocated shards, for jobs that write.
        device: where matrices are factored.
    """

    source: str
    recipe: Recipe
    threads: int
    stats: str = ""
    shards: str = ""
    device: str = "cpu"

    def context(self) -> Context:
        """The context, on files that stay open in this process."""
        import torch

        torch.set_num_threads(self.threads)
        reader = _reader(self.source)
        return Context(self.recipe, reading(reader), reader.read, _stats(self.stats) if self.stats else NoStats(), place(self.device))


@dataclass(frozen=True)
class Look:
    """Wave one in another process: task -> the value of each rank."""

    desk: Desk

    def __call__(self, task: Task) -> dict[str, Any]:
        """JSON values: name and curve."""
        return {"name": task.bundle.name, "curve": list(self.desk.context().look(task)[0])}


@dataclass(frozen=True)
class Write:
    """The cut in another process: task -> tensors in the shards, and what the journal will say of them."""

    desk: Desk

    def __call__(self, task: Task) -> dict[str, Any]:
        """JSON values of a journal entry."""
        edits = self.desk.context().cut(task)
        entry = write_job(Path(self.desk.shards), task.places, task.bundle.name, edits.tensors, dict(edits.record))
        return {"job": entry.job, "tensors": dict(entry.tensors), "record": dict(entry.record)}


def place(device: str) -> str:
    """The GPU of this process, where several processes of a machine share its GPUs: "cuda" under torchrun is the one of the local rank.

    Example:
        >>> place("cpu"), place("cuda:1")
        ('cpu', 'cuda:1')
    """
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    import torch

    return f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"


def reading(reader: Any) -> Callable[[Site], Tensor]:
    """site -> W (out, in), whatever its storage."""

    def read(site: Site) -> Tensor:
        first, *more = site.tensors
        stored = reader.read(first)
        if more:  # a stack whose parts are tensors of their own
            import torch

            stored = torch.cat([stored.flatten(), *(reader.read(k).flatten() for k in more)])
        return stored.T if site.view == "transposed" else stored.reshape(site.shape)

    return read


@lru_cache(maxsize=2)
def _reader(path: str) -> Reader:
    return Reader(path)


@lru_cache(maxsize=1)
def _stats(path: str) -> Stats:
    return Stats.load(path, max_bytes=HELD)
