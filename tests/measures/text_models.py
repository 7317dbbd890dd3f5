"""Runs of measures of activations on tiny models, and the states that they should have seen."""

from __future__ import annotations

from typing import Any

import torch

from eckart.catalogue import from_model
from eckart.data import batches
from eckart.measures.base import ModelView, Record, TextView
from eckart.runners.observe import observe
from tests.stats import stats_models
from tests.stats.stats_models import VOCAB

KINDS = ("llama", "gpt2", "bert", "albert")
CAUSAL = ("llama", "gpt2")


def make(kind: str) -> Any:
    """A tiny float64 model in training mode, the same one every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return stats_models.make(kind)


def texts(lengths=(9, 4, 1, 12, 7, 7, 2, 5), seed: int = 3) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=g).tolist() for n in lengths]


def view_of(model: Any, count: int, causal: bool = True, **more: Any) -> TextView:
    example = torch.zeros(1, 4, dtype=torch.long) if hasattr(model, "config") else None
    catalogue = from_model(model, example)
    config = model.config.to_dict() if hasattr(model, "config") else {}
    return TextView(catalogue, [s for s in catalogue.sites if s.kind == "linear"], config, causal, count, **more)


def run(model: Any, measure: Any, ids: list[list[int]] | None = None, *, rows: Any = None, size: int = 3, **more: Any) -> dict[str, Record]:
    """Records by module, of one measure on padded batches."""
    ids = texts() if ids is None else ids
    rows = batches(ids, None, batch_size=size) if rows is None else rows
    causal = type(model).__name__.endswith("LMHeadModel") or type(model).__name__.endswith("ForCausalLM")
    return {r.module: r for r in observe(model, rows, view_of(model, len(ids), causal, **more), [measure])}


def model_view(model: Any, ids: list[list[int]], causal: bool = True, size: int = 3, **more: Any) -> ModelView:
    view = view_of(model, len(ids), causal)
    return ModelView(model, view.catalogue, view.sites, more.pop("rows", batches(ids, None, batch_size=size)), view.config, causal, **more)


def states(model: Any, ids: list[list[int]], path: str, side: str = "out") -> list[torch.Tensor]:
    """What a module gets or gives, text by text, each run alone without padding: the calls one after another."""
    out: list[torch.Tensor] = []
    module = model.get_submodule(path)

    def first(x: Any) -> torch.Tensor:
        return x[0] if isinstance(x, tuple) else x

    def before(_m: Any, args: Any, kwargs: Any) -> None:
        out.append(first(args) if args else kwargs["hidden_states"])

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if side == "in"
        else module.register_forward_hook(lambda _m, _a, y: out.append(first(y)))
    )
    training = model.training
    model.eval()
    with torch.no_grad():
        for row in ids:
            model(input_ids=torch.tensor([row]))
    model.train(training)
    handle.remove()
    return [x[0].clone() for x in out]


def last(model: Any, ids: list[list[int]]) -> list[torch.Tensor]:
    """Last hidden states, text by text."""
    base = getattr(model, "base_model", model)
    training = model.training
    model.eval()
    with torch.no_grad():
        out = [base(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ids]
    model.train(training)
    return out


__all__ = ["CAUSAL", "KINDS", "last", "make", "model_view", "run", "states", "texts", "view_of"]
