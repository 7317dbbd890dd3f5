"""Short trainings with the whole model at hand: ordered factors, trained cuts, and recovery after the cut.

Deterministic on the CPU: batches come in an order drawn from the seed, dropout is off, and nothing touches the global generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..axes.protocols import Bundle, Cost, Parts
from ..errors import Refused, UsageError
from ..modes import evaluating, frozen
from ..nn import LowRankLinear
from ..nn.ordered import OrderedLinear, SoftCutLinear
from ..nn.surgery import low_rank_layers, put, shared_groups
from ..progress import track
from ..seeds import generator
from .jobs import Context
from .judge import Judge

if TYPE_CHECKING:
    from ..axes.recipe import Recipe

CLIP = 1.0  # of the norm of a step's gradient


@dataclass(frozen=True)
class Trained:
    """What a training reports.

    Args:
        steps: optimiser steps.
        before, after: loss on the calibration batches.
        parameters: numbers that were trained.
    """

    steps: int
    before: float
    after: float
    parameters: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"steps": self.steps, "loss_before": self.before, "loss": self.after, "trained": self.parameters}


def order_of(count: int, steps: int, seed: int) -> Iterator[int]:
    """Which batch each step sees: every batch once before any is seen again, each round in an order of its own.

    Example:
        >>> sorted(list(order_of(3, 6, 0))[:3]), len(list(order_of(3, 7, 0)))
        ([0, 1, 2], 7)
    """
    g = generator(seed, "batches")
    left: list[int] = []
    for _ in range(steps):
        if not left:
            left = torch.randperm(count, generator=g).tolist()
        yield left.pop()


def train(
    model: nn.Module, parameters: Sequence[nn.Parameter], loss: Callable[[int, int], Tensor], *, batches: int, steps: int, lr: float, seed: int, label: str,
    clip: float | None = CLIP,
) -> None:  # fmt: skip
    """Adam with a linear warm-up over a tenth of the steps, then linearly to zero. Only the parameters given change.

    Args:
        model: all of it in evaluation mode for the while.
        parameters: what is trained.
        loss: (step, batch) -> scalar.
        batches, steps, lr, seed: see `axes.recover`.
        label: of the progress bar.
        clip: largest norm of a gradient, None for any.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr)
    warm = max(1, steps // 10)
    with frozen(model), evaluating(model), torch.inference_mode(False), torch.enable_grad():
        for p in parameters:
            p.requires_grad_(True)
        for step, index in track(enumerate(order_of(batches, steps, seed)), label, steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
            optimizer.zero_grad(set_to_none=True)
            loss(step, index).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()


def learn_ordered(recipe: Recipe, bundles: Sequence[Bundle], context: Context, judge: Judge, seed: int) -> dict[str, Parts]:
    """Maestro: factors of every matrix, trained so that their first triples do best alone; `spectrum` is the norm of what a cut would drop.

    Raises:
        Refused: a bundle of several sites.
    """
    how = recipe.factor
    model = judge.copy()
    layers: dict[str, OrderedLinear] = {}
    for bundle in bundles:
        if len(bundle.sites) > 1:
            raise Refused(f"{bundle.name}: ordered training takes matrices one by one. Take recipe.with_(group=None).")
        op = recipe.source.operator(bundle, context.read, context.stats)
        found = recipe.factor.factorise(op, recipe.metric.sides(bundle, context.stats), min(bundle.shape), "full", seed)
        from ..axes.pairs import balance

        up, down = balance(found.left, found.right, "even")
        old: Any = model.get_submodule(bundle.site.name)
        to = {"device": old.weight.device, "dtype": old.weight.dtype}
        layers[bundle.name] = OrderedLinear(up.to(**to), down.to(**to), old.bias)
        put(model, bundle.site.name, layers[bundle.name])
    names = list(layers)
    g = generator(seed, "ordered")

    def loss(step: int, index: int) -> Tensor:
        chosen = layers[names[int(torch.randint(len(names), (1,), generator=g))]]
        chosen.width = int(torch.randint(1, chosen.up.shape[1] + 1, (1,), generator=g))
        total, weight = judge.of_batch(model, index)
        chosen.width = chosen.up.shape[1]
        lasso = sum((x.lasso() for x in layers.values()), torch.zeros(()))
        return total / max(weight, 1.0) + how.lasso * lasso

    parameters = [p for x in layers.values() for p in (x.up, x.down)]
    train(model, parameters, loss, batches=len(judge.batches), steps=how.steps, lr=how.lr, seed=seed, label="ordered training")
    return {n: _parts(x) for n, x in layers.items()}


def _parts(layer: OrderedLinear) -> Parts:
    up, down = layer.up.detach().double().cpu(), layer.down.detach().double().cpu()
    norms = layer.importance().detach().double().cpu()
    tails = norms.flip(0).cummax(0).values.flip(0)  # a prefix is kept: a triple counts as much as the best one behind it
    return Parts(up, down, tails, {"total": float(tails.square().sum()), "method": "ordered training"})


def learn_cut(
    recipe: Recipe, bundles: Sequence[Bundle], costs: Mapping[str, Cost], parts: Mapping[str, Parts | None], judge: Judge, seed: int
) -> dict[str, float]:  # fmt: skip
    """Dobi-SVD: a position for every matrix, trained on the model's loss at the size that is wanted.

    Raises:
        Refused: a bundle of several sites.
    """
    how, budget = recipe.allocate, recipe.budget
    start = how.start(costs, budget)
    model = judge.copy()
    layers: dict[str, SoftCutLinear] = {}
    for bundle in bundles:
        if len(bundle.sites) > 1:
            raise Refused(f"{bundle.name}: a trained cut takes matrices one by one. Take recipe.with_(group=None).")
        old: Any = model.get_submodule(bundle.site.name)
        found = parts[bundle.name]
        assert found is not None
        to = {"device": old.weight.device, "dtype": old.weight.dtype}
        first = min(start[bundle.name], found.left.shape[1]) - 0.5  # half-way: triples up to the rank are on
        layers[bundle.name] = SoftCutLinear(found.left.to(**to), found.right.to(**to), old.bias, first)
        put(model, bundle.site.name, layers[bundle.name])
    dense = sum(c.dense for c in costs.values())
    wanted = sum(costs[n].fixed + costs[n].per_rank * start[n] for n in layers) / dense

    def loss(step: int, index: int) -> Tensor:
        total, weight = judge.of_batch(model, index)
        stored = sum((costs[n].per_rank * (x.position + 0.5).clamp(min=1) + costs[n].fixed for n, x in layers.items()), torch.zeros(()))
        return total / max(weight, 1.0) + how.weight * (stored / dense - wanted).abs()

    parameters = [x.position for x in layers.values()]
    train(model, parameters, loss, batches=len(judge.batches), steps=how.steps, lr=how.lr, seed=seed, label="training the cut", clip=None)
    return {n: max(1.0, min(float(x.position.detach()) + 0.5, float(x.up.shape[1]))) for n, x in layers.items()}


def recover(recipe: Recipe, model: nn.Module, judge: Judge, seed: int) -> Trained:
    """Train what the recipe's recovery trains, in place.

    Raises:
        UsageError: nothing to train, or peft is not installed.
    """
    how = recipe.recover
    layers = low_rank_layers(model)
    before = judge(model, how.goal)
    if not layers:
        return Trained(0, before, before, 0)
    if how.kind == "factors":
        parameters = _factors(recipe, layers)
        train(
            model,
            parameters,
            _objective(judge, model, how.goal),
            batches=len(judge.batches),
            steps=how.steps,
            lr=how.lr,
            seed=seed,
            label="recovery",
        )
        return Trained(how.steps, before, judge(model, how.goal), sum(p.numel() for p in parameters))
    if shared_groups(model):
        raise UsageError(f"{recipe.name}: recover=lora cannot train a factor that several matrices share; use recover=factors.")
    trained = 0
    turns = (("up",), ("down",)) if how.in_turn else (("up", "down"),)
    for turn in turns:
        trained += _lora(model, list(layers), turn, how, judge, -(-how.steps // len(turns)), seed)
    return Trained(how.steps, before, judge(model, how.goal), trained)


def _objective(judge: Judge, model: nn.Module, goal: str) -> Callable[[int, int], Tensor]:
    def loss(step: int, index: int) -> Tensor:
        total, weight = judge.of_batch(model, index, goal)
        return total / max(weight, 1.0)

    return loss


def _factors(recipe: Recipe, layers: Mapping[str, LowRankLinear]) -> list[nn.Parameter]:
    """Factors whose role is to train, a common one once."""
    roles = {p: r.kind for p, r in recipe.roles.items()}
    wanted = {"up", "down"} if not roles or "basis" in roles else {p for p, kind in roles.items() if kind == "train"}
    if ("basis" in roles and "train" not in roles.values()) or not wanted:
        raise UsageError(f"{recipe.name}: recover=factors has nothing to train; give a part the role train (--set roles.up=train).")
    found: dict[int, nn.Parameter] = {}
    for layer in layers.values():
        for part in sorted(wanted):
            weight = getattr(layer, part).weight
            found[id(weight)] = weight
    return list(found.values())


def _lora(model: nn.Module, names: Sequence[str], parts: Sequence[str], how: Any, judge: Judge, steps: int, seed: int) -> int:
    """One stage: branches on these factors, trained and merged; returns how many numbers were trained."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise UsageError('recover=lora needs peft. Next: pip install "eckart[hf]"') from error
    targets = [f"{n}.{p}" for n in names for p in parts]
    config = LoraConfig(r=how.rank, lora_alpha=how.alpha, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    own = vars(model).pop("peft_config", None)  # peft warns of a second one, and would leave it on the model
    with torch.random.fork_rng(devices=[]):  # peft draws its initial values from the global generator, which is the user's
        inject_adapter_in_model(config, model)
    del model.peft_config
    if own is not None:
        model.peft_config = own
    g = generator(seed, "lora", *parts)
    parameters: list[nn.Parameter] = []
    found: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and n in targets}
    for name in sorted(found):
        a, b = found[name].lora_A["default"].weight, found[name].lora_B["default"].weight
        with torch.no_grad():  # as LoRA: B zero, A spread so that its products keep the size of the input
            a.copy_(torch.randn(a.shape, generator=g).to(a) / a.shape[1] ** 0.5)
            b.zero_()
        parameters += [a, b]
    train(
        model,
        parameters,
        _objective(judge, model, how.goal),
        batches=len(judge.batches),
        steps=steps,
        lr=how.lr,
        seed=seed,
        label="recovery",
    )
    count = sum(p.numel() for p in parameters)
    for name, layer in found.items():
        layer.merge(safe_merge=True)
        put(model, name, layer.get_base_layer())
    return count
