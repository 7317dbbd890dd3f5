"""One pass of calibration text through a model that feeds every measure of activations. The model is left exactly as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from ..axes.protocols import Site
from ..errors import Refused
from ..measures.base import Observer, OfText, Record, TextView
from ..modes import evaluating
from ..progress import track

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..stats.record import Layout

Side = Literal["in", "out"]


def observe(model: nn.Module, batches: Iterable[Any], view: TextView, measures: Sequence[OfText]) -> list[Record]:
    """Run calibration batches through a model once and let every measure of activations watch.

    Padding is removed before a measure sees anything; token weights of a batch do not enter. It does not decide which measures run, and
    measures that need gradients run the model themselves. An activation that is NaN or infinite, a module that no text passes, and rows
    that cannot be matched with the tokens give records that say so; a model that cannot run the batch at all raises what it raises.

    Args:
        model: a causal language model, an encoder, or with tensors as batches any module.
        batches: `data.Batch` values, mappings of keyword arguments, tensors, or tuples of positional arguments. The first dimension is
            texts: a row is one text of the run, numbered in order.
        view: what is known before the run. Where `read` is None, weights are read from the model; where `specials` is (0, 0) and every
            batch says that its rows begin with the begin-of-sequence token, that token is counted.
        measures: measures of activations.

    Returns:
        The records, measure by measure.

    Raises:
        UsageError: a batch of another type.

    Example:
        >>> import torch
        >>> from eckart.catalogue import from_model
        >>> from eckart.measures.anisotropy import MEASURE
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
        >>> cat = from_model(net)
        >>> found = observe(net, [torch.eye(2)], TextView(cat, cat.sites, {}, False, 2), [MEASURE])
        >>> [r.module for r in found]
        ['0', '']
    """
    import torch

    if isinstance(batches, Sequence) and batches and view.specials == (0, 0) and all(getattr(b, "bos", False) for b in batches):
        view = replace(view, specials=(1, 0))
    if view.read is None:
        view = replace(view, read=_reader(model))
    observers = [m.observer(view) for m in measures]
    run = _Run(_places(observers))
    handles: list[Any] = []
    try:
        handles += run.install(model)
        with evaluating(model), torch.inference_mode(False), torch.no_grad():
            for leaf, batch in enumerate(track(batches, "observing activations")):
                run.one(model, leaf, batch)
                for observer in observers:
                    observer.end_batch()
    finally:
        for handle in handles:
            handle.remove()
    run.finish()
    return [record for observer in observers for record in observer.records()]


@dataclass
class _Place:
    """One side of one module, and who watches it."""

    module: str
    side: Side
    observers: list[Observer] = field(default_factory=list)
    seen: bool = False
    lost: bool = False

    def lose(self, why: str) -> None:
        self.lost = True
        for observer in self.observers:
            observer.lose(self.module, self.side, why)


@dataclass
class _Run:
    """What the hooks need to know of the batch that is passing."""

    places: list[_Place]
    layout: Layout | None = None
    first: int = 0  # number of the first text of the batch
    batches: int = 0

    def install(self, model: nn.Module) -> Iterator[Any]:
        """Hook the modules; yields the handles."""
        for place in self.places:
            module = _module(model, place.module)
            if module is None:
                place.lose("the model has no such module")
            elif place.side == "in":
                yield module.register_forward_pre_hook(self._before(place), with_kwargs=True)
            else:
                yield module.register_forward_hook(self._after(place))

    def one(self, model: nn.Module, leaf: int, batch: Any) -> None:
        from ..stats.collect import unpack

        args, kwargs, layout, _, mask = unpack(model, leaf, batch, hidden=False)
        weight = None if mask is None or bool((mask != 0).all()) else (mask != 0).float()
        self.layout = replace(layout, weight=weight)
        model(*args, **kwargs)
        self.first += layout.samples
        self.batches += 1

    def finish(self) -> None:
        why = "no row of text passed this module" if self.batches else "there is no calibration text: the list of batches is empty"
        for place in self.places:
            if not place.seen and not place.lost:
                place.lose(why)

    def _before(self, place: _Place) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = [kwargs["hidden_states"]] if "hidden_states" in kwargs else list(kwargs.values())
            self._show(place, _tensor((*args, *named)))

        return hook

    def _after(self, place: _Place) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            hidden = getattr(output, "last_hidden_state", None)
            values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else (output,)
            self._show(place, hidden if hidden is not None else _tensor(values))

        return hook

    def _show(self, place: _Place, x: Tensor | None) -> None:
        import torch

        if place.lost:
            return
        assert self.layout is not None
        if x is None or not x.is_floating_point() or x.ndim == 0:
            what = "input" if place.side == "in" else "output"
            place.lose(f"its {what} is {'no tensor' if x is None else f'a tensor of {x.dtype}, not of activations'}")
            return
        try:
            rows, _ = self.layout.rows(x, place.module or "the last hidden state")
            text = self.first + _texts(self.layout, x, place.module or "the last hidden state")
        except Refused as error:
            place.lose(str(error))
            return
        bad = rows.numel() - int(torch.isfinite(rows).sum())
        if bad:
            place.lose(f"{bad} of {rows.numel()} activations are NaN or Inf in calibration batch {self.layout.leaf}")
        elif len(rows):
            place.seen = True
            for observer in place.observers:
                observer.see(place.module, place.side, rows, text)


def _places(observers: Sequence[Observer]) -> list[_Place]:
    places: dict[tuple[str, Side], _Place] = {}
    for observer in observers:
        for module, side in dict.fromkeys(observer.wants()):
            places.setdefault((module, side), _Place(module, side)).observers.append(observer)
    return list(places.values())


def _module(model: nn.Module, path: str) -> nn.Module | None:
    """The module of a path; "" is what gives the last hidden state: a model with a head knows the model below it."""
    import torch

    if not path:
        base = getattr(model, "base_model", None)
        return base if isinstance(base, torch.nn.Module) else model
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _tensor(values: Iterable[Any]) -> Tensor | None:
    """The first tensor of real numbers, else the first tensor."""
    import torch

    found = [v for v in values if isinstance(v, torch.Tensor)]
    return next((v for v in found if v.is_floating_point()), found[0] if found else None)


def _texts(layout: Layout, x: Tensor, name: str) -> Tensor:
    """Which text of its batch each row of `layout.rows(x)` belongs to, (t,).

    Raises:
        Refused: the rows are not those of the texts one after another.
    """
    import torch

    lead = tuple(x.shape[:-1])
    count = prod(lead)
    if layout.samples == 1:
        owner = torch.zeros(count, dtype=torch.int64, device=x.device)
    elif lead and lead[0] in (layout.samples, layout.samples * layout.tokens):
        owner = torch.arange(layout.samples, device=x.device).repeat_interleave(count // layout.samples)
    else:
        what = f"its rows {lead} cannot be told apart by the {layout.samples} texts of calibration batch {layout.leaf}"
        raise Refused(f"{name}: {what}. Use a batch size of 1.")
    if layout.weight is None or (lead == (layout.samples,) and layout.tokens != 1):  # a row per text, as in a pooler
        return owner
    weight = layout.weight.reshape(*layout.weight.shape, *([1] * (len(lead) - 2))).expand(lead) if len(lead) > 1 else layout.weight
    return owner[weight.reshape(-1) > 0]


def _reader(model: nn.Module) -> Callable[[Site], Tensor]:
    tensors = model.state_dict(keep_vars=True)

    def read(site: Site) -> Tensor:
        missing = [k for k in site.tensors if k not in tensors]
        if missing:
            raise Refused(f"{site.name}: the model has no tensor {missing[0]!r}. The catalogue is of another model.")
        first, *rest = (tensors[k].detach() for k in site.tensors)
        if site.view == "product":
            return first @ rest[0]
        return first.T if site.view == "transposed" else first.reshape(site.shape)

    return read
