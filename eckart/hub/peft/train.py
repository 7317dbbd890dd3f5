"""A small complete fine-tune: one protocol for every recipe, so that recipes can be compared by anyone with one command."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...axes import Recipe
from ...data import batches, load_texts
from ...data import evaluate as measures
from ...errors import Refused, UsageError
from ...progress import track
from ...registry import get_recipe
from ...store import check_output
from ...verbs.adapter_folder import CONFIG, check_folder, whole_folder
from ...verbs.evaluate import causal_rows
from ...verbs.host import is_causal
from .train_report import report_of, save_run

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT = 0.1  # of the texts, where no evaluation file is given


class Diverged(Refused):
    """The loss of a run left the finite numbers."""


@dataclass(frozen=True)
class Protocol:
    """What all recipes of a comparison share.

    Args:
        steps: of the optimiser.
        batch_size: rows per forward pass.
        accumulate: forward passes per step.
        length: tokens per row.
        lr: peak learning rate; None is the recipe's own, which its paper tuned for large models.
        warmup: share of the steps.
        weight_decay: None is the recipe's.
        clip: largest norm of the gradient, 0 for none.
        seed: of initialisation and order.
        device: None is CUDA where it is there.
    """

    steps: int = 200
    batch_size: int = 8
    accumulate: int = 1
    length: int = 256
    lr: float | None = None
    warmup: float = 0.03
    weight_decay: float | None = None
    clip: float = 1.0
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, found {getattr(self, name)}.")
        if self.lr is not None and not self.lr > 0:
            raise UsageError(f"lr: expected a positive number, found {self.lr}.")


@dataclass(frozen=True)
class Run:
    """One fine-tune.

    Args:
        recipe: what ran.
        rows: metrics before and after.
        losses: (step, training loss).
        trained: numbers that trained.
        seconds: of initialisation and of training.
        model: the model with its adapter.
        lr: peak learning rate.
    """

    recipe: Recipe
    rows: list[dict[str, Any]]
    losses: list[tuple[int, float]]
    trained: int
    seconds: dict[str, float]
    model: Any = field(repr=False, default=None)
    lr: float = 0.0


@dataclass(frozen=True)
class Texts:
    """Training and held-out text of a run."""

    train: list[str]
    held_out: list[str]
    name: str

    @property
    def seen(self) -> int:
        """Held-out texts that are also trained on."""
        known = set(self.train)
        return sum(t in known for t in self.held_out)


def texts_of(data: Any, held_out: Any = None) -> Texts:
    """Training text, and text that is kept from it.

    Args:
        data: texts, or a path to .txt or .jsonl.
        held_out: likewise; None keeps the last tenth of `data`.

    Raises:
        UsageError: too few texts, or token ids.
    """
    train: Any = load_texts(data)
    if not all(isinstance(t, str) for t in train):
        raise UsageError("adapt --data: expected texts; token ids have no bytes to be scored on.")
    name = Path(held_out).name if isinstance(held_out, str | Path) else "held-out texts"
    if held_out is not None:
        kept: Any = load_texts(held_out)
        if not all(isinstance(t, str) for t in kept):
            raise UsageError("adapt --eval: expected texts; token ids have no bytes to be scored on.")
        return Texts(list(train), list(kept), name)
    count = max(1, round(HELD_OUT * len(train)))
    if len(train) < 2:
        raise UsageError("adapt --data: one text cannot be both trained on and held out. Give more lines, or --eval FILE.")
    where = Path(data).name if isinstance(data, str | Path) else "the data"
    return Texts(list(train[:-count]), list(train[-count:]), f"last {count} of {where}")


def run(
    model: Any, tokenizer: Any, recipe: Recipe, texts: Texts, protocol: Protocol, *, before: dict[str, Any] | None = None, **how: Any
) -> Run:  # fmt: skip
    """Adapt a model in memory, train it, and score it before and after. The model is changed.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        recipe: what to train, with the budget of the run.
        texts: from `texts_of`.
        protocol: how.
        before: `data.evaluate.causal` of the model as it is, where that is known.
        **how: further arguments of `adapt`.

    Raises:
        Refused: not a causal language model.
    """
    import torch

    from .adapt import adapt, refuse_misfit
    from .glue import glue

    if not is_causal(model):
        raise Refused(
            f"{type(model).__name__}: adapt --data trains causal language models. Use ek.adapt and a Trainer of your own for others."
        )
    refuse_misfit(model, recipe, **how)
    began = time.perf_counter()
    before = before if before is not None else measures.causal(model, tokenizer, texts.held_out)
    clock = {"evaluation before": time.perf_counter() - began}
    calib = how.pop("calib", None)
    if recipe.needs() and calib is None:
        calib = texts.train[:256]
    adapted = adapt(model, recipe, calib=calib, tokenizer=tokenizer, seed=protocol.seed, **how)
    clock["initialisation"] = time.perf_counter() - began - sum(clock.values())
    rows = _rows(texts.train, tokenizer, protocol)
    rate = protocol.lr if protocol.lr is not None else float(recipe.train.get("lr", 2e-4))
    decay = protocol.weight_decay if protocol.weight_decay is not None else float(recipe.train.get("weight_decay", 0.0))
    state = torch.get_rng_state()
    try:
        losses = _train(adapted, rows, protocol, rate, decay, glue(adapted))
    finally:
        torch.set_rng_state(state)  # Trainer seeds the global generator
    clock["training"] = time.perf_counter() - began - sum(clock.values())
    adapted.eval()
    after = measures.causal(adapted, tokenizer, texts.held_out)
    clock["evaluation after"] = time.perf_counter() - began - sum(clock.values())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Run(recipe, causal_rows(before, after, texts.name), losses, trained, clock, adapted, rate)


def _rows(texts: Sequence[str], tokenizer: Any, protocol: Protocol) -> list[dict[str, Tensor]]:
    """Windows of the texts, shuffled by the seed."""
    import torch

    from ...seeds import generator

    out: list[dict[str, Tensor]] = []
    for batch in batches(list(texts), tokenizer, max_length=protocol.length, batch_size=1, split_long=True):
        ids = batch.input_ids[0][batch.attention_mask[0] > 0]
        if len(ids) > 1:
            out.append({"input_ids": ids, "labels": ids})
    if not out:
        raise UsageError("adapt --data: the texts hold no two tokens in a row to learn from.")
    order = torch.randperm(len(out), generator=generator(protocol.seed, "order of rows")).tolist()
    return [out[i] for i in order]


def _pad(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([r["input_ids"] for r in rows], batch_first=True)
    lengths = torch.tensor([len(r["input_ids"]) for r in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _train(model: Any, rows: list[dict[str, Tensor]], protocol: Protocol, rate: float, decay: float, glue: Any) -> list[tuple[int, float]]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    losses: list[tuple[int, float]] = []

    class Progress(TrainerCallback):
        bar: Iterator[int]

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = track(range(protocol.steps), "training", protocol.steps)
            next(self.bar, None)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            next(self.bar, None)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append((state.global_step, float(logs["loss"])))

    with tempfile.TemporaryDirectory() as work:
        args = TrainingArguments(
            work, max_steps=protocol.steps, per_device_train_batch_size=protocol.batch_size, gradient_accumulation_steps=protocol.accumulate,
            learning_rate=rate, weight_decay=decay, lr_scheduler_type="cosine", warmup_steps=round(protocol.warmup * protocol.steps),
            max_grad_norm=protocol.clip, logging_steps=max(1, protocol.steps // 40), save_strategy="no", report_to=[], disable_tqdm=True,
            seed=protocol.seed, remove_unused_columns=False, use_cpu=protocol.device == "cpu" or not torch.cuda.is_available(),
            dataloader_pin_memory=False, logging_nan_inf_filter=False,
        )  # fmt: skip
        data: Any = rows
        trainer = Trainer(model, args, train_dataset=data, data_collator=_pad, callbacks=[glue, Progress()])  # pyright: ignore[reportArgumentType]
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for step, loss in losses:
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise Diverged(f"training diverged at step {step} (loss {loss}). Lower the rate: --lr {rate / 4:g}.")
    return losses


def load_base(path: str | Path, device: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder; in float32 on a CPU, where half precision is slow and saves little."""
    import torch

    from ..load import load, load_tokenizer

    cuda = torch.cuda.is_available() and device != "cpu"
    model = load(str(path), dtype=None if cuda else torch.float32, device=device or ("cuda" if cuda else None))
    return model, load_tokenizer(str(path))


def finetune(
    model: str | Path, data: Any, recipe: str | Recipe = "lora", rank: float | None = None, *, out: str | Path, protocol: Protocol | None = None,
    held_out: Any = None, overwrite: bool = False, command: str = "", variant: str | None = None, glue: Sequence[str | Recipe] = (),
    settings: Sequence[str] = (), base: str | None = None, **how: Any,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune one recipe and write the adapter with its card and report.

    Args:
        model: folder of a causal language model, or a Hub id.
        data: training texts, or a path to .txt or .jsonl.
        recipe, rank, variant, glue, settings, base: as in `adapt`.
        out: adapter folder to write.
        protocol: steps, sizes, learning rate.
        held_out: texts to score on; None keeps the last tenth of the data.
        overwrite: replace an earlier adapter folder.
        command: the command line, for the report.
        **how: further arguments of `adapt`.

    Returns:
        The report.
    """
    from ...verbs.adapt_request import resolve

    protocol = protocol or Protocol()
    found = resolve(recipe, rank, variant=variant, glue=glue, settings=settings, base=base)
    folder = check_folder(out, [model] if Path(model).exists() else [], overwrite)
    texts = texts_of(data, held_out)
    inner, tokenizer = load_base(model, protocol.device)
    done = run(inner, tokenizer, found.with_(name=_named(found, variant, glue)), texts, protocol, **how)
    report = report_of(str(model), [done], protocol, texts, command)
    save_run(folder, done, report, str(model))
    return report


def _named(recipe: Recipe, variant: str | None, glue: Sequence[str | Recipe]) -> str:
    """The name of a recipe with what was added to it, as `entry` reads it."""
    first = f"{recipe.name}:{variant}" if variant else recipe.name
    return "+".join((first, *(g if isinstance(g, str) else g.name for g in glue)))


def entry(text: str, rank: float | None = None, **how: Any) -> Recipe:
    """The recipe that one entry of a comparison names: "pissa", "corda:kpm" (a variant), "pissa+lora_pro" (with glue), or all of it.

    Args:
        text: the entry.
        rank: for recipes that have one.
        **how: glue, base and settings as in `adapt`, for all entries.

    Raises:
        UsageError: a name that is none.

    Example:
        >>> entry("corda:kpm+sorsa", 4).penalty[0].kind
        'orth'
    """
    from ...verbs.adapt_request import resolve

    first, *more = (part.strip() for part in text.split("+"))
    name, _, variant = first.partition(":")
    how["glue"] = (*more, *how.get("glue", ()))
    ranked = get_recipe(name).form.ranked
    return resolve(name, rank if ranked else None, variant=variant or None, **how)


def compare(
    model: str | Path, data: Any, recipes: Sequence[str], rank: float | None = None, *, out: str | Path, protocol: Protocol | None = None,
    held_out: Any = None, overwrite: bool = False, command: str = "", glue: Sequence[str | Recipe] = (), settings: Sequence[str] = (),
    base: str | None = None, **how: Any,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune several recipes under one protocol; write an adapter folder each, one table and the curves.

    Args:
        model, data, protocol, held_out, command: as in `finetune`.
        recipes: entries as `entry` reads them.
        rank: of all recipes that have one.
        out: folder for the adapters, `report.html` and `report.json`; there when all recipes are done, or not at all.
        overwrite: replace an earlier comparison.
        glue, settings, base: as in `adapt`, for every recipe.
        **how: further arguments of `adapt`.

    Returns:
        The report. A recipe whose loss diverges under the protocol has a warning in it, and neither row nor folder.

    Raises:
        UsageError: fewer than two recipes, a name that is none, too few texts.
        Diverged: every recipe did.
    """
    from ...report.html import save
    from .adapt import refuse_misfit

    protocol = protocol or Protocol()
    if len(set(recipes)) < len(recipes) or len(recipes) < 2:
        raise UsageError(f"--compare: expected at least two different recipes, found {', '.join(recipes) or 'none'}.")
    found = {n: entry(n, rank, glue=glue, settings=settings, base=base) for n in recipes}
    folder = _comparison(out, [model] if Path(model).exists() else [], overwrite)
    texts = texts_of(data, held_out)
    runs: list[Run] = []
    failed: dict[str, str] = {}
    before: dict[str, Any] | None = None
    with whole_folder(folder) as work:
        for name in recipes:
            inner, tokenizer = load_base(model, protocol.device)
            if before is None:
                for each in found.values():
                    refuse_misfit(inner, each, **how)
                before = measures.causal(inner, tokenizer, texts.held_out)
            try:
                done = run(inner, tokenizer, found[name].with_(name=name), texts, protocol, before=before, **how)
            except Diverged as error:
                failed[name] = str(error)
                continue
            save_run(work / name.replace(":", "-"), done, report_of(str(model), [done], protocol, texts, command), str(model))
            runs.append(replace(done, model=None))
        if not runs:
            raise Diverged("; ".join(f"{k}: {v}" for k, v in failed.items()))
        report = report_of(str(model), runs, protocol, texts, command, failed)
        save(report, work / "report.html")
    return report


def _comparison(out: str | Path, sources: Sequence[str | Path], overwrite: bool) -> Path:
    """The folder of a comparison, checked before any work: new, or an earlier comparison that may be replaced."""
    given = Path(out).expanduser()
    if overwrite and given.is_dir() and not given.is_symlink() and (given / "report.json").is_file():
        foreign = [p.name for p in given.iterdir() if not p.name.startswith("report.") and not (p / CONFIG).is_file()]
        if foreign:
            raise Refused(f"{out}: holds more than an earlier comparison ({', '.join(sorted(foreign)[:3])}). Choose another output.")
        return given.resolve()
    return check_output(given, list(sources), overwrite=False)
