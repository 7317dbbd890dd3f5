"""`glue`: what a recipe does at every step of the optimiser, as one callback of Trainer, or as three calls in a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback

from ...axes import training as steps
from ...axes.training import Training, needs_glue
from ...errors import Refused, UsageError
from .config import EckartConfig
from .layer import EckartLayer
from .outputs import OutputTerms, Scale


class Glue(TrainerCallback):
    """Penalties, projections, refreshes and allocations of every adapter of a model, once per step of the optimiser.

    Not a loss and not a wrapper: forward passes, losses and what is logged stay what they are. Gradients arrive complete (accumulated,
    averaged over processes, unscaled, clipped), so nothing depends on the accumulation count, label smoothing or mixed precision.
    Sharded training (DeepSpeed, FSDP) is refused: a penalty of a shard is not a shard of the penalty.

    Args:
        model: with adapters of ours.

    Example:
        >>> import torch
        >>> from eckart.hub.peft.adapt import adapt
        >>> net = adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), "sorsa", rank=2)
        >>> optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        >>> with Glue(net).begin(optimizer) as glue:
        ...     net(torch.ones(1, 8)).sum().backward()
        ...     glue.before_step()
        ...     optimizer.step()
        ...     glue.after_step()
        ...     optimizer.zero_grad()
    """

    def __init__(self, model: nn.Module) -> None:
        if not any(isinstance(m, EckartLayer) for m in model.modules()):
            raise UsageError(f"glue: {type(model).__name__} holds no adapter of ours; call ek.adapt(model, ...) first.")
        self.model = model
        self.trainings: dict[str, Training] = {}
        self._optimizer: Any = None
        self._scaler: Any = None
        self._terms: OutputTerms | None = None

    # ---- a loop of one's own

    def begin(
        self, optimizer: Any, *, total_steps: int | None = None, peak_lr: float | None = None, scaler: Any = None, step: int = 0,
        accumulate: int = 1, processes: int = 1,
    ) -> Glue:  # fmt: skip
        """Attach to a run. As a context manager the result detaches at the end of the block.

        Args:
            optimizer: the one that steps.
            total_steps: of the run; schedules want it.
            peak_lr: highest learning rate; None reads the optimiser (a scheduler's base rate where there is one).
            scaler: a `GradScaler`, whose gradients are unscaled before they are touched.
            step: steps made already, in a run that goes on.
            accumulate: forward passes per step; only terms on outputs ask, where the loss is not the model's own and does not come averaged.
            processes: that losses are multiplied by before gradients are averaged over them; likewise.

        Raises:
            UsageError: a schedule that does not fit the run.
        """
        self.end()
        self._optimizer, self._scaler = optimizer, scaler
        peak = peak_lr if peak_lr is not None else max(float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups)
        self.trainings = {}
        for name, config in configs_of(self.model).items():
            layers = dict(branches(self.model, name))
            training = Training(config.value, layers, optimizer, total_steps, step, peak or 1.0, config.seed)
            steps.begin(training)
            self.trainings[name] = training
        for layer in adapter_layers(self.model):
            layer.glued |= self.trainings.keys()
        if any(t.recipe.loss for t in self.trainings.values()):
            scale = Scale(accumulate, processes, scaler or getattr(optimizer, "scaler", None))
            self._terms = OutputTerms(self.model, lambda: [term for t in self._active() for term in t.recipe.loss], scale)
        return self

    def before_step(self) -> None:
        """Call with all gradients of a step there, right before `optimizer.step()`."""
        self._running()
        self._unscale()
        for training in self._active():
            steps.before_step(training)

    def after_step(self) -> None:
        """Call right after `optimizer.step()`, before the gradients are dropped."""
        self._running()
        for training in self._active():
            if getattr(self._optimizer, "step_was_skipped", False):  # gradients had overflowed: nothing moved, and they say nothing
                training.step += 1
            else:
                steps.after_step(training)

    def end(self) -> None:
        """Detach: training on without the callback is refused again."""
        for training in self.trainings.values():
            steps.end(training)
        for layer in adapter_layers(self.model):
            layer.glued -= self.trainings.keys()
        if self._terms is not None:
            self._terms.remove()
            self._terms = None
        self.trainings = {}

    def __enter__(self) -> Glue:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _running(self) -> None:
        if not self.trainings:
            raise UsageError("glue: call glue.begin(optimizer) before the first step.")

    def _active(self) -> list[Training]:
        now = next((layer.active_adapters for layer in adapter_layers(self.model)), [])
        return [t for name, t in self.trainings.items() if name in now]

    def _unscale(self) -> None:
        optimizer = self._optimizer
        scaler = self._scaler or getattr(optimizer, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            return
        try:
            scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
        except RuntimeError as error:
            if "already been called" not in str(error):  # gradient clipping has done it
                raise

    # ---- Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to Trainer's run, also to one that goes on from a checkpoint."""
        sharded = next((n for n in ("deepspeed", "fsdp") if getattr(args, n, None)), None)
        if sharded and any(needs_glue(c.value) for c in configs_of(self.model).values()):
            raise Refused(
                f"glue: {sharded} shards parameters, and what this recipe does at every step needs them whole. Train without it (DDP works)."
            )
        pieces = [p for c in configs_of(self.model).values() for p in c.value.pieces()]
        processes = int(getattr(args, "world_size", 1))
        if processes > 1 and any(p.freezes for p in pieces) and not getattr(args, "ddp_find_unused_parameters", None):
            raise Refused(
                "glue: this recipe lets parameters rest, and DistributedDataParallel waits for the gradient of each. "
                "Set ddp_find_unused_parameters=True in TrainingArguments."
            )
        averaged = bool(getattr(args, "average_tokens_across_devices", False))
        self.begin(
            kwargs["optimizer"], total_steps=state.max_steps, step=state.global_step, accumulate=args.gradient_accumulation_steps,
            processes=processes if averaged else 1,
        )  # fmt: skip

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once per step, after clipping."""
        self.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once per step, gradients still there."""
        self.after_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach."""
        self.end()


def glue(model: nn.Module) -> Glue:
    """The callback that does what a recipe does besides the optimiser: `Trainer(..., callbacks=[ek.glue(model)])`.

    Args:
        model: with adapters of ours, however they were put there.

    Returns:
        A `Glue`; in a loop of one's own call its `begin`, `before_step` and `after_step`. Harmless where no recipe needs it.

    Raises:
        UsageError: a model without such an adapter.
    """
    return Glue(model)


def adapter_layers(model: nn.Module) -> Iterator[EckartLayer]:
    """Every adapted layer, in the model's order."""
    return (m for m in model.modules() if isinstance(m, EckartLayer))


def configs_of(model: nn.Module) -> dict[str, EckartConfig]:
    """Adapter -> config. Works on a `PeftModel` and on a model that adapters were injected into."""
    found: Any = getattr(model, "peft_config", None) or {}
    return {k: v for k, v in found.items() if isinstance(v, EckartConfig)}


def branches(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """(layer, branch) of one adapter; the matrices of a fused layer are named apart."""
    for name, module in model.named_modules():
        if isinstance(module, EckartLayer) and isinstance(module, BaseTunerLayer) and adapter_name in module.eckart_branch:
            for label, branch in module.branch(adapter_name).layers().items():
                yield f"{name}[{label}]" if label else name, branch
