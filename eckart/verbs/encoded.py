"""What a text model makes of phrases: the states into which it turns their tokens, in the space from which it reads tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site, Stat
from ..errors import Refused, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .calibrate import Calibration
    from .host import Host


@dataclass(frozen=True, eq=False)
class Encoded:
    """States as statistics.

    Args:
        rows: (q, d) float32.
        sites: none of them shares an input.
    """

    rows: Tensor
    sites: dict[str, str] = field(default_factory=dict)

    def get(self, stat: Stat, site: Site) -> Tensor:
        """The rows, whatever the site."""
        if stat.kind != "encoded":
            raise Refused(f"{site.name}: {stat.kind} was not measured; these statistics are states of phrases.")
        return self.rows


def measure_for_adapter(host: Host, needs: frozenset[Stat], sites: Sequence[Site], how: Calibration) -> Any:
    """Statistics of a text as every recipe takes them, for `target.turns` with the path of the hidden state, or for `source.encoded` the
    states of phrases."""
    from .calibrate import measure

    rest = frozenset(s for s in needs if s.kind != "path")
    if rest != needs:
        from .hidden_path import measure_path

        return measure_path(host, sites, how, measure_for_adapter(host, rest, sites, how) if rest else None)
    return measure_encoded(host, sites, how) if any(s.kind == "encoded" for s in needs) else measure(host, needs, sites, how)


def measure_encoded(host: Host, sites: Sequence[Site], how: Calibration) -> Encoded:
    """The last states of the tokens of a mean phrase.

    Token by token the phrases are averaged where they enter the model, as many tokens as the shortest has; the model then runs once, with the
    tokenizer's special tokens around, and its states at these places (after the last norm) are the result. Of one phrase they are its own.

    Args:
        host: the model and its tokenizer.
        sites: the embedding table.
        how: with the phrases: texts, or lists of token ids.

    Raises:
        UsageError: phrases that are tensors, or a phrase without a token.
        Refused: a model that gives no states, or states that are not finite.
    """
    import torch

    from ..data.batches import encode
    from ..modes import evaluating
    from .calibrate import is_tensors

    if is_tensors(how.texts):
        raise UsageError("encoded phrases: expected texts or lists of token ids (calib), found tensors.")
    if [s.kind for s in sites] != ["embedding"]:
        found = ", ".join(f"{s.name} ({s.kind})" for s in sites) or "no layer"
        raise UsageError(f"encoded phrases: expected one embedding table (target), found {found}.")
    model: Any = host.live()
    tokenizer = host.tokenizer() if any(isinstance(t, str) for t in how.texts) else None
    phrases = [encode(t, tokenizer) for t in how.texts]
    count = min(len(body) for _, body, _ in phrases)
    if count < 1:
        empty = next(i for i, (_, body, _) in enumerate(phrases) if not body)
        raise UsageError(f"calibration phrase {empty} has no token; every phrase needs at least one.")
    front, body, behind = phrases[0]
    table: nn.Module = model.get_submodule(sites[0].name)
    device = next(table.parameters()).device
    ids = torch.tensor([front + body[:count] + behind], device=device)
    inside = slice(len(front), len(front) + count)
    with evaluating(model), torch.no_grad():
        mean = torch.stack([table(torch.tensor(b[:count], device=device)) for _, b, _ in phrases]).double().mean(0)

        def enter(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, inside] = mean.to(output.dtype)
            return output

        handle = table.register_forward_hook(enter)
        try:
            output = getattr(model, "base_model", model)(input_ids=ids)
        finally:
            handle.remove()
    states = getattr(output, "last_hidden_state", None)
    if states is None or states.ndim != 3:
        raise Refused(f"{type(model).__name__}: expected a text model with .last_hidden_state, found {type(output).__name__}.")
    rows = states[0, inside].float()
    if not bool(torch.isfinite(rows).all()):
        raise Refused(f"{sites[0].name}: the states of the phrases are NaN or Inf. Check the weights (eckart inspect).")
    return Encoded(rows)
