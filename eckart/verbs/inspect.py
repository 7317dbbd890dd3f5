"""`inspect`: every measure of a model, or of two, in one report. Reads, never writes into a model."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Refused, UsageError
from ..measures.base import Measure, OfCheckpoint, OfPair, OfSpectrum, OfWeight, Record
from ..report.schema import plain
from .inspect_columns import cells
from .inspect_report import inspect_report
from .inspect_run import Text, choose, of_checkpoint, of_text, of_weights
from .inspect_source import choose_sites, open_weights, pair_up, unreadable


@dataclass(frozen=True)
class Report:
    """What `inspect` returns.

    Args:
        records: one per module and measure.
        report: plain data for the HTML page.
    """

    records: tuple[Record, ...]
    report: dict[str, Any]

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row per number: `module`, `measure`, `part` (its name within the value, "" for a single number), `value`, `uncertainty`,
        `valid`, `note`, `estimator`, `settings`. A record whose value is no number (a spectrum) has one row without one: see `.records`.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas as pd  # pyright: ignore[reportMissingTypeStubs]
        except ImportError as error:
            raise UsageError("to_pandas needs pandas, which is not installed. Next: pip install pandas") from error
        rows: list[dict[str, Any]] = []
        for record in self.records:
            common = {"valid": record.valid, "note": record.note, "estimator": record.estimator, "settings": dict(record.settings)}
            numbers = [(c.part, c.value, c.spread) for c in cells(record)] or [("", None, None)]
            for part, value, spread in numbers:
                rows.append(
                    {"module": record.module, "measure": record.measure, "part": part, "value": value, "uncertainty": spread, **common}
                )
        names = ["module", "measure", "part", "value", "uncertainty", "valid", "note", "estimator", "settings"]
        return pd.DataFrame(rows, columns=names).astype({"value": "float64", "uncertainty": "float64"})

    def save_html(self, path: str | Path, *, overwrite: bool = False) -> None:
        """The self-contained page, with its data as JSON of the same name beside it; an existing one is kept unless `overwrite`."""
        from ..report.html import save

        save(self.report, path, overwrite=overwrite)

    def save_json(self, path: str | Path, *, overwrite: bool = False) -> None:
        """All records as JSON, a list of objects; numbers that are not finite are null there. An existing file is kept unless `overwrite`."""
        place = Path(path)
        if place.exists() and not overwrite:
            raise Refused(f"report: {str(place)!r} exists, and is never replaced unasked. Choose another name, or pass overwrite.")
        place.write_text(json.dumps(self.to_list(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def to_list(self) -> list[dict[str, Any]]:
        """The records as plain data that JSON can hold."""
        keys = ("module", "measure", "value", "estimator", "valid", "note", "settings", "uncertainty")
        return [{k: plain(getattr(r, k)) for k in keys} for r in self.records]


def inspect(
    model: Any,
    other: Any = None,
    measures: Sequence[str | Measure] | None = None,
    calib: Any = None,
    only: Sequence[str] = (),
    *,
    kinds: Sequence[str] = ("linear",),
    advise: bool = False,
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int = 8,
    loss: Any = None,
    seed: int = 0,
    device: str | None = None,
    command: str = "",
) -> Report:
    """Measure a model: its weights, what became of them in another checkpoint, its activations on text.

    Weights of a folder are read one matrix at a time; the model is loaded only where text runs through it. A model that transformers does
    not know is inspected by the names of its tensors. It repairs nothing and changes nothing, and a number is no verdict: each record
    has its estimator, its caveat, and whether it is valid at all.

    Args:
        model: checkpoint folder, `.safetensors` file, Hub id, or module.
        other: a second one to compare with, usually the fine-tuned model; matrices are paired by name.
        measures: names from `eckart ls --kind measure`, or `Measure` values of your own; None takes every one that is meant for each run
            and whose input is there: of weights always, of pairs with `other`, of activations with `calib`.
        calib: texts, lists of token ids, or a path to a text or JSONL file; for a plain module also a list of input tensors.
        only: regular expressions, of which one must be found in a matrix's name; empty takes all.
        kinds: of matrices: "linear", "embedding", "conv" (flattened to out x rest), "other" (stacked experts and the like).
        advise: add suggestions, which rest on measured correlations alone; see `eckart.verbs.advise`. Where `measures` is None, what they
            rest on is measured too if its input is there.
        tokenizer: for a module that does not know its own.
        max_length: tokens per text; None is the model's limit, at most 512. What is longer is cut.
        batch_size: texts per forward pass.
        loss: for a plain module under a measure with gradients: (output, batch) -> scalar.
        seed: of everything that draws numbers.
        device: where weights are measured and the model runs ("cuda"); None is the CPU for folders, the module's own otherwise.
        command: the command line, for the report.

    Returns:
        `Report` with `.records`, `.to_pandas()`, `.save_html()`, `.save_json()`.

    Raises:
        UsageError: an unknown measure, one whose input is missing, or no matrix that fits.
        Refused: an unreadable checkpoint or text, or one in which no matrix holds real numbers.

    Example:
        >>> import torch
        >>> found = inspect(torch.nn.Sequential(torch.nn.Linear(8, 8)), measures=["stable_rank"])
        >>> 1 <= found.records[0].value <= 8
        True
    """
    from .advise import advise as suggest
    from .advise import rests_on
    from .calibrate import is_tensors, load_calibration

    there = {"other": other is not None, "text": calib is not None}
    chosen = choose(measures, **there, more=rests_on() if advise else ())
    texts = load_calibration(calib, frozenset(), "inspect")
    example = texts[0][:1] if is_tensors(texts) else None
    clock = _Clock()
    host = open_weights(model, tokenizer, device, example)
    mate = None if other is None else open_weights(other, tokenizer, device, example)
    sites = choose_sites(host, only, kinds)
    partner = {} if mate is None else pair_up(sites, mate)
    _refuse_unreadable(host, sites, chosen)
    clock("reading headers")
    lively = of_text(host, sites, chosen, Text(texts, max_length, batch_size, loss, seed), mate) if texts is not None else []
    clock("text")
    found = of_weights(host, sites, chosen, mate, partner)
    clock("weights")
    found.records += of_checkpoint(host, sites, chosen)
    clock("across weights")
    found.records += lively
    advice = suggest(found.records, sites) if advise else None
    report = inspect_report(host, sites, chosen, found, other=mate, command=command, advice=advice, timings=clock.seconds)
    return Report(tuple(found.records), report)


def _refuse_unreadable(host: Any, sites: Sequence[Any], chosen: Sequence[Measure]) -> None:
    """A checkpoint without one real number gets no report full of blanks."""
    if all(isinstance(m, OfSpectrum | OfWeight | OfPair | OfCheckpoint) for m in chosen):
        reasons = [unreadable(host, s) for s in sites]
        if all(reasons):
            raise Refused(
                f"{host.name}: none of its {len(sites)} matrices can be measured: {sites[0].name} is {reasons[0].removeprefix('the matrix is ')}. "
                "Inspect the checkpoint that it was made from: eckart inspect ORIGINAL"
            )


class _Clock:
    """Seconds per pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
