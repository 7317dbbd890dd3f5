"""Weight gradients of single samples, layer by layer as the backward pass reaches them, as thin factors: G = delta^T x is never formed here.

The parameters' `.grad` is not touched, and no more than the gradients of the layer at hand is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.protocols import Site
from ..errors import Refused, UsageError
from ..modes import evaluating, frozen
from ..progress import track
from ..seeds import generator
from .collect import unpack

Scalars = Callable[["Sample", Any], Sequence[tuple[str, Tensor]]]
Take = Callable[["Sample", str, Site, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample of a batch, padding cut off.

    Args:
        number: of the sample in the run, from 0.
        batch: as it was given, with this one row.
        ids: (1, T) token ids, where the batch has them.
        weights: (1, T) weights of the tokens in the loss, where the batch has them.
    """

    number: int
    batch: Any
    ids: Tensor | None = None
    weights: Tensor | None = None


def samples(batches: Iterable[Any]) -> Iterator[Sample]:
    """The rows of batches, one by one.

    Args:
        batches: `data.Batch` values, mappings, tensors, or tuples of tensors whose first dimension is samples.

    Raises:
        UsageError: another type.

    Example:
        >>> from eckart.data import batches
        >>> [s.ids.tolist() for s in samples(batches([[5, 6], [7]]))]
        [[[5, 6]], [[7]]]
    """
    number = 0
    for batch in batches:
        for row in range(_size(batch)):
            yield _row(batch, row, number)
            number += 1


def drawn(batches: Sequence[Any], limit: int, seed: int, name: str) -> list[Sample]:
    """At most `limit` samples, drawn by the seed where there are more, in their order."""
    count = sum(_size(b) for b in batches)
    if count <= limit:
        return list(samples(batches))
    keep = frozenset(torch.randperm(count, generator=generator(seed, name))[:limit].tolist())
    return [s for s in samples(batches) if s.number in keep]


def _size(batch: Any) -> int:
    if hasattr(batch, "input_ids") and hasattr(batch, "attention_mask"):
        return len(batch.input_ids)
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    first = next((v for v in values if isinstance(v, Tensor)), None)
    if first is None:
        raise UsageError(f"calibration batch: expected a Batch, a mapping, a tensor or a tuple of tensors, found {type(batch).__name__}.")
    return len(first)


def _row(batch: Any, row: int, number: int) -> Sample:
    if hasattr(batch, "input_ids") and hasattr(batch, "attention_mask"):
        keep = batch.attention_mask[row] != 0
        weights = None if getattr(batch, "weights", None) is None else batch.weights[row : row + 1, keep]
        ids = batch.input_ids[row : row + 1, keep]
        one = replace(batch, input_ids=ids, attention_mask=batch.attention_mask[row : row + 1, keep], weights=weights)
        return Sample(number, one, ids, weights)
    count = _size(batch)

    def cut(x: Any) -> Any:
        return x[row : row + 1] if isinstance(x, Tensor) and x.ndim and len(x) == count else x

    if isinstance(batch, Tensor):
        return Sample(number, cut(batch))
    if not isinstance(batch, Mapping):
        return Sample(number, tuple(cut(x) for x in batch))
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        one = {k: cut(x) for k, x in batch.items()}
    else:
        keep, shape = mask[row] != 0, tuple(mask.shape)
        one = {k: cut(x)[:, keep] if isinstance(x, Tensor) and tuple(x.shape[:2]) == shape else cut(x) for k, x in batch.items()}
    return Sample(number, one, one.get("input_ids"))


@dataclass
class _Calls:
    """The calls of one module in one forward: inputs with their versions, and the gradients that have arrived."""

    inputs: list[tuple[Tensor, int]] = field(default_factory=list)
    grads: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class _Hooks:
    sites: Sequence[Site]
    take: Take
    sample: Sample | None = None
    probe: str = ""
    calls: dict[str, _Calls] = field(default_factory=dict)
    roots: list[Tensor] = field(default_factory=list)

    def install(self, model: nn.Module) -> Iterator[Any]:
        for site in self.sites:
            try:
                module = model.get_submodule(site.name)
            except AttributeError as error:
                raise Refused(f"{site.name}: the model has no such module. The catalogue is of another model.") from error
            yield module.register_forward_hook(self._hook(site), with_kwargs=True)

    def _hook(self, site: Site) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            calls = self.calls.setdefault(site.name, _Calls())
            x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)).detach()
            index = len(calls.inputs)
            calls.inputs.append((x, x._version))
            if not output.requires_grad:  # parameters are frozen: nothing before this module was differentiated
                self.roots.append(output.requires_grad_())
                output = output.clone()  # the model may change it in place, which a leaf forbids
            output.register_hook(lambda grad: self._arrived(site, calls, index, grad))
            return output

        return hook

    def _arrived(self, site: Site, calls: _Calls, index: int, grad: Tensor) -> None:
        calls.grads[index] = grad
        if len(calls.grads) == len(calls.inputs):
            self._give(site, calls)

    def settle(self) -> None:
        """After a backward: layers of which some calls had no gradient."""
        for site in self.sites:
            calls = self.calls.get(site.name)
            if calls is not None and calls.grads:
                self._give(site, calls)

    def _give(self, site: Site, calls: _Calls) -> None:
        assert self.sample is not None
        xs: list[Tensor] = []
        deltas: list[Tensor] = []
        for index, grad in sorted(calls.grads.items()):
            x, version = calls.inputs[index]
            if x._version != version:
                raise Refused(
                    f"{site.name}: its input is changed in place after it was read, so weight gradients cannot be formed from it."
                )
            xs.append(x.reshape(-1, x.shape[-1]))
            deltas.append(grad.detach().reshape(-1, grad.shape[-1]))
        calls.grads = {}
        self.take(self.sample, self.probe, site, torch.cat(xs), torch.cat(deltas))


def each_gradient(
    model: nn.Module, chosen: Iterable[Sample], sites: Sequence[Site], scalars: Scalars, take: Take, *, hidden: bool = False
) -> int:
    """Run samples one by one, forward and backward, and hand over the gradient of each layer as it is reached.

    The model is left as it was found: modes, `requires_grad`, `.grad`, hooks.

    Args:
        model: run in evaluation mode, its parameters frozen.
        chosen: samples.
        sites: linear layers.
        scalars: (sample, output of the model) -> named scalars to differentiate; none leaves the sample out.
        take: (sample, name of the scalar, site, x (t, n), delta (t, m)): the gradient of the scalar by the weight (m, n) is delta^T x.
        hidden: ask a model with a head for its hidden states too.

    Returns:
        The number of samples that had a scalar.

    Raises:
        Refused: a site that the model lacks, a scalar that is not finite, or an input that the model writes over.
    """
    hooks = _Hooks(sites, take)
    done = 0
    with contextlib.ExitStack() as stack:
        for handle in hooks.install(model):
            stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for sample in track(chosen, "gradients"):
            done += _one(model, hooks, sample, scalars, hidden)
    return done


def _one(model: nn.Module, hooks: _Hooks, sample: Sample, scalars: Scalars, hidden: bool) -> int:
    hooks.sample, hooks.calls, hooks.roots = sample, {}, []
    args, kwargs, _, _, _ = unpack(model, sample.number, sample.batch, hidden)
    named = list(scalars(sample, model(*args, **kwargs)))
    for index, (name, scalar) in enumerate(named):
        if not bool(torch.isfinite(scalar.detach())):
            raise Refused(f"the {name} of sample {sample.number} is not finite. Check the weights (eckart inspect), or run in float32.")
        if scalar.requires_grad and hooks.roots:
            hooks.probe = name
            torch.autograd.grad(scalar, hooks.roots, retain_graph=index + 1 < len(named), allow_unused=True)
            hooks.settle()
    hooks.calls, hooks.roots = {}, []
    return int(bool(named))


def token_losses(output: Any, ids: Tensor) -> Tensor:
    """(T - 1,) next-token cross-entropies in nats of one text, float32 or better.

    Raises:
        UsageError: no logits (1, T, vocabulary).
    """
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim != 3 or tuple(logits.shape[:2]) != tuple(ids.shape):
        raise UsageError(f"next-token loss: expected a causal model with .logits (1, T, vocabulary), found {type(output).__name__}.")
    wide = logits[0, :-1] if logits.dtype == torch.float64 else logits[0, :-1].float()
    return nn.functional.cross_entropy(wide, ids[0, 1:].to(wide.device), reduction="none")


def outer_square(x: Tensor, delta: Tensor) -> float:
    """Squared Frobenius norm of delta^T x, by the products of rows where these are fewer than the entries; summed in float64.

    Args:
        x: (t, n).
        delta: (t, m).

    Example:
        >>> outer_square(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]))
        45.0
    """
    a, b = (v.cpu() if v.device.type == "mps" else v for v in (x, delta))  # it has no float64
    t, n, m = len(a), a.shape[1], b.shape[1]
    if t * (m + n) < m * n:  # these products cancel in the sum, those of entries do not
        a, b = a.to(torch.float64), b.to(torch.float64)
        return max(0.0, float(((a @ a.T) * (b @ b.T)).sum()))
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return float((b.to(wide).T @ a.to(wide)).to(torch.float64).square().sum())
