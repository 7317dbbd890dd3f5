"""What measures that run the model share: its loss on some of the text, and which parameters a run is about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..catalogue.parts import live_bias, live_key
from ..errors import Refused, UsageError

if TYPE_CHECKING:
    from ..stats.objective import Objective
    from .base import ModelView, Record

BYTES = 8 << 30  # of all vectors that a Lanczos basis may take


def objective(view: ModelView, tokens: int, dtype: Any = None, rows: int | None = None) -> Objective:
    """The loss of the view's model on its first `tokens` tokens (rows, of tensors), in batches of at most `rows` texts.

    Raises:
        Refused: the model has no loss: an encoder, or a plain module without `loss`.
    """
    from ..stats.objective import Objective, few

    if view.loss is None and not view.causal:
        raise Refused("this model predicts no next token, so it has no loss of its own: pass loss=(output, batch) -> scalar")
    try:
        return Objective(view.model, few(view.batches, tokens, rows), loss=view.loss, dtype=dtype)
    except UsageError as error:
        raise Refused(str(error)) from error


def parameters(view: ModelView) -> list[str] | None:
    """Names of the parameters of the run's matrices with their biases, or None for all: when the run is about every linear."""
    linears = {s.name for s in view.catalogue.sites if s.kind == "linear"}
    if linears <= {s.name for s in view.sites}:
        return None
    wanted = {k for s in view.sites for k in (live_key(s), live_bias(s))}
    return [k for k, p in view.model.named_parameters() if k in wanted and p.is_floating_point()]


def fits(size: int, vectors: int, itemsize: int) -> None:
    """Refuse a basis that is too large to hold.

    Raises:
        Refused: more than `BYTES`.
    """
    if size * vectors * itemsize > BYTES:
        raise Refused(
            f"{size:,} parameters times {vectors} Lanczos vectors is more than {BYTES >> 30} GiB; name fewer matrices (only=[...], --only)"
        )


def settings(loss: Objective) -> dict[str, Any]:
    """What a record says of the data."""
    return {"loss": loss.unit, "batches": len(loss.batches), "weight": loss.total, "dtype": str(loss.compute).removeprefix("torch.")}


def reasons(records: Iterator[Record], missing: Any) -> Iterable[Record]:
    """The records, with one of the reason where the measure cannot go on."""
    try:
        yield from records
    except Refused as error:
        yield missing("", str(error))
