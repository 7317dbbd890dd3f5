"""One pass over calibration batches that serves every need: forward for inputs and outputs, backward for gradients."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.protocols import Site, Stat
from ..errors import Refused, UsageError
from ..modes import evaluating, frozen
from ..progress import track
from .probes import Loss, auto_probe, embedding_of, random_projections, refuse_unless_finite, task_loss
from .record import Layout, Part, Recorder, join
from .result import Stats, batch_digest, data_digest, fingerprint_of, model_digest
from .slots import PROBES, Slot, slots_for
from .tree import Tree


@dataclass(frozen=True, eq=False)
class Partial:
    """Statistics of some of the batches. Parts over disjoint batches merge into what one pass would have given, bit for bit.

    Args:
        slots: the sums.
        trees: for each slot's key, the sum over the batches seen.
        digests: of the batches seen, by number.
        sites: for each site's name, the id of its input.
        model_id: fingerprint of the model.
        run: everything else that must agree: needs, sites, seed, probes.
    """

    slots: tuple[Slot, ...]
    trees: Mapping[str, Tree[Part]]
    digests: Mapping[int, str]
    sites: Mapping[str, str]
    model_id: str
    run: Mapping[str, Any]

    def merge(self, other: Partial) -> Partial:
        """The statistics of both parts' batches.

        Raises:
            UsageError: they share a batch, or were measured on another model, for other needs or with another seed.
        """
        if (self.model_id, self.run) != (other.model_id, other.run):
            raise UsageError("statistics: the parts were measured on different models, needs, sites or seeds; they cannot be merged.")
        trees = {key: tree.merge(other.trees[key]) for key, tree in self.trees.items()}
        return Partial(self.slots, trees, {**self.digests, **other.digests}, self.sites, self.model_id, self.run)

    def finish(self) -> Stats:
        """The statistics of all batches, from number 0 on without a gap.

        Raises:
            UsageError: a batch is missing.
        """
        count = len(self.digests)
        if sorted(self.digests) != list(range(count)):
            missing = next(i for i in range(count) if i not in self.digests)
            raise UsageError(f"statistics: calibration batch {missing} is missing from the merged parts.")
        values = {key: tree.finish(count) for key, tree in self.trees.items()}
        mark = fingerprint_of(self.model_id, data_digest(self.digests[i] for i in range(count)), self.run)
        return Stats.build(values, self.sites, mark, self.run["auto"])


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    needs: Iterable[Stat],
    sites: Collection[Site],
    *,
    seed: int = 0,
    probe: str = "auto",
    probes: int = 1,
    loss: Loss | None = None,
    model_id: str | None = None,
) -> Stats:
    """Measure everything that is needed in one pass over the calibration batches. The model is left as it was found.

    Measured are
    - moments at "in" (one Gram per input id) and at "out", and absmean at either: of all tokens but padding, with the token weights of
      the batch;
    - moments at "out" via backward: of the gradient of the probe with respect to the output, at each token;
    - fisher: per input channel, squared weight gradients summed over outputs; as mean over samples of each sample's own gradient, summed
      over its tokens first ("per_sample", exact), or as mean over batches of the gradient of the whole batch ("per_batch"). Token
      weights do not enter;
    - gradient_gram: products of each sample's weight gradient G, as mean over samples: of G^T G ("in", n n numbers row by row) or of G G^T
      ("out", m m numbers);
    - gradient: of the weight, m n numbers row by row, mean over samples of the gradient of each sample's summed loss.

    Parameters' `.grad` is not touched. Not measured: inputs that were propagated through what is already compressed.

    Args:
        model: a causal language model, an encoder, or with plain batches any module.
        batches: `data.Batch` values, mappings of keyword arguments, tensors, or tuples of positional arguments. The first dimension is
            samples. A batch is a unit of rounding: another batch size gives other last bits.
        needs: statistics, as axes declare them.
        sites: the linears to measure them at.
        seed: of the random projections.
        probe: what the probe "auto" stands for: "task_loss", "random_projection", or "auto": the first where the model generates text or
            a loss is given, else the second.
        probes: random projections per sample.
        loss: (output, batch) -> the loss of each sample, or their sum: replaces next-token cross-entropy.
        model_id: fingerprint of the model, for instance of its files; by default the sha256 of all its tensors.

    Returns:
        The statistics.

    Raises:
        Refused: no batch, an activation or gradient that is not finite (module and batch named), a site that the model lacks.
        UsageError: a need that cannot be measured, a probe that does not fit the model.

    Example:
        >>> from eckart.catalogue import from_model
        >>> net = nn.Sequential(nn.Linear(2, 3))
        >>> sites = from_model(net).sites
        >>> found = collect(net, [torch.tensor([[1.0, 2.0], [3.0, 4.0]])], {Stat("moments")}, sites)
        >>> found.get(Stat("moments"), sites[0]).gram.tolist()
        [[10.0, 14.0], [14.0, 20.0]]
    """
    options: dict[str, Any] = {"seed": seed, "probe": probe, "probes": probes, "loss": loss, "model_id": model_id}
    return accumulate(model, batches, needs, sites, **options).finish()


def accumulate(
    model: nn.Module,
    batches: Iterable[Any],
    needs: Iterable[Stat],
    sites: Collection[Site],
    *,
    seed: int = 0,
    probe: str = "auto",
    probes: int = 1,
    loss: Loss | None = None,
    model_id: str | None = None,
    start: int = 0,
) -> Partial:
    """As `collect`, over the batches `start`, `start` + 1, ... of a longer list: a part to be merged. `start` must be the same numbering
    in every part; all else must be equal."""
    slots, run = run_of(model, needs, sites, seed, probe, probes, loss)
    trees: dict[str, Tree[Part]] = {s.key: Tree(join) for s in slots}
    digests: dict[int, str] = {}
    recorder = Recorder(slots)
    with prepared(model, recorder):
        for leaf, batch in enumerate(track(batches, "collecting statistics"), start):
            digests[leaf] = batch_digest(batch)
            if slots:
                _one_batch(model, recorder, leaf, batch, run, loss)
            for key in trees:
                trees[key] = trees[key].add(leaf, recorder.parts.pop(key, None))
    if not digests:
        raise Refused("statistics: expected at least one calibration batch, found none.")
    return Partial(slots, trees, digests, run["sites"], model_id or model_digest(model), run)


def fingerprint(
    model: nn.Module,
    batches: Iterable[Any],
    needs: Iterable[Stat],
    sites: Collection[Site],
    *,
    seed: int = 0,
    probe: str = "auto",
    probes: int = 1,
    loss: Loss | None = None,
    model_id: str | None = None,
) -> str:
    """The fingerprint that `collect` would give with the same arguments, without running the model: what `Stats.load` asks for."""
    _, run = run_of(model, needs, sites, seed, probe, probes, loss)
    return fingerprint_of(model_id or model_digest(model), data_digest(batch_digest(b) for b in batches), run)


def run_of(
    model: nn.Module,
    needs: Iterable[Stat],
    sites: Collection[Site],
    seed: int = 0,
    probe: str = "auto",
    probes: int = 1,
    loss: Loss | None = None,
    propagated: bool = False,
) -> tuple[tuple[Slot, ...], dict[str, Any]]:
    """The sums, and everything but model and data that they depend on; arguments as for `collect` and `slots_for`."""
    if probe not in (*PROBES, "auto"):
        raise UsageError(f"probe {probe!r}: expected 'auto', {' or '.join(map(repr, PROBES))}.")
    if probes < 1:
        raise UsageError(f"probes: expected at least 1, found {probes}.")
    auto = auto_probe(model, loss) if probe == "auto" else probe
    slots = slots_for(needs, sites, auto, propagated=propagated)
    run = {
        "auto": auto,
        "needs": sorted(s.key for s in slots),
        "sites": {s.name: s.reads or s.name for s in sorted(sites, key=lambda s: s.name)},
        "seed": seed,
        "probes": probes,
        "loss": "" if loss is None else getattr(loss, "__qualname__", type(loss).__name__),
    }
    return slots, run


def _one_batch(model: nn.Module, recorder: Recorder, leaf: int, batch: Any, run: Mapping[str, Any], loss: Loss | None) -> None:
    wanted = [p for p in PROBES if any(s.stat.probe == p for s in recorder.slots)]
    args, kwargs, layout, ids, mask = unpack(model, leaf, batch, "random_projection" in wanted)
    recorder.begin(layout)
    output = model(*args, **kwargs)
    scalars: list[tuple[str, Tensor]] = []
    for name in wanted:
        if name == "task_loss":
            scalars.append((name, task_loss(output, ids, mask, loss, batch)))
        else:
            scalars += [(name, s) for s in random_projections(embedding_of(output, mask), run["seed"], leaf, run["probes"])]
    for index, (name, scalar) in enumerate(scalars):
        refuse_unless_finite(scalar.detach(), f"the probe {name}{_damage(model, scalar)}", leaf)
        if scalar.requires_grad:
            recorder.probe = name
            torch.autograd.grad(scalar, recorder.roots, retain_graph=index + 1 < len(scalars), allow_unused=True)
            recorder.settle()
    recorder.release()


def _damage(model: nn.Module, scalar: Tensor) -> str:
    """Which weight makes a scalar NaN or Inf, in brackets, where one does."""
    if bool(torch.isfinite(scalar.detach()).all()):
        return ""
    bad = next((n for n, p in model.named_parameters() if p.is_floating_point() and not bool(torch.isfinite(p.detach()).all())), None)
    return f" ({bad} holds NaN or Inf)" if bad else ""


@contextlib.contextmanager
def prepared(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Hooks on, evaluation mode, parameters frozen, gradients as needed; all as before afterwards, also after an exception."""
    backward = any(s.stat.via == "backward" for s in recorder.slots)
    with contextlib.ExitStack() as stack:
        for handle in recorder.install(model):
            stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(backward))
        yield


Unpacked = tuple[tuple[Any, ...], dict[str, Any], Layout, Tensor | None, Tensor | None]


def unpack(model: nn.Module, leaf: int, batch: Any, hidden: bool, place: torch.device | None = None) -> Unpacked:
    """(args, kwargs, layout, ids, mask) of a batch on the model's device; ids and mask only where the batch has them.

    Args:
        model: what the arguments are for.
        leaf: number of the batch.
        batch: `data.Batch`, a mapping, a tensor, or a tuple of positional arguments.
        hidden: ask a model with a head for its hidden states too.
        place: where the arguments go; None is where the model is.

    Raises:
        UsageError: another type, no tensor, or a mask or weights of a wrong shape.
    """
    where = place or next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def move(x: Any) -> Any:
        return x.to(where) if isinstance(x, Tensor) else x

    if isinstance(batch, Tensor) or (isinstance(batch, tuple | list) and any(isinstance(b, Tensor) for b in batch)):
        args = (move(batch),) if isinstance(batch, Tensor) else tuple(move(b) for b in batch)
        return args, {}, Layout(leaf, next(len(a) for a in args if isinstance(a, Tensor))), None, None
    weights = None
    if isinstance(batch, Mapping):
        kwargs = {str(k): move(v) for k, v in batch.items()}
    elif hasattr(batch, "input_ids") and hasattr(batch, "attention_mask"):
        kwargs = {name: move(getattr(batch, name)) for name in ("input_ids", "attention_mask")}
        weights = move(getattr(batch, "weights", None))
    else:
        found = type(batch).__name__
        raise UsageError(f"calibration batch {leaf}: expected a Batch, a mapping, a tensor or a tuple of tensors, found {found}.")
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    first = next((v for v in (mask, ids, *kwargs.values()) if isinstance(v, Tensor)), None)
    if first is None:
        raise UsageError(f"calibration batch {leaf}: holds no tensor.")
    tokens = first.shape[1] if first.ndim == 2 else 0
    if mask is not None and mask.ndim != 2:
        raise UsageError(f"calibration batch {leaf}: expected an attention_mask of shape (B, T), found {tuple(mask.shape)}.")
    weight = None if mask is None or bool((mask != 0).all()) else (mask != 0).float()
    if weights is not None:
        if tuple(weights.shape) != (len(first), tokens) or not bool((weights >= 0).all()):
            expected = f"token weights of shape {(len(first), tokens)}, none negative"
            raise UsageError(f"calibration batch {leaf}: expected {expected}, found shape {tuple(weights.shape)}.")
        weight = weights.double() if weight is None else weights.double() * weight
    extra: dict[str, Any] = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        extra["use_cache"] = False  # a cache only costs memory here
    if hidden and getattr(model, "base_model", model) is not model:  # a model with a head: its output has no last_hidden_state
        extra["output_hidden_states"] = True
    return (), {**kwargs, **extra}, Layout(leaf, len(first), tokens, weight), ids, mask
