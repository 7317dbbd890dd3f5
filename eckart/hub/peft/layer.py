"""A layer of the model with its adapters beside it: what PEFT puts in the layer's place."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...errors import Refused, UsageError
from ...nn.action import Action
from ...nn.branch import Branch
from .quantised import read

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend


class EckartLayer(nn.Module, BaseTunerLayer):
    """One layer: `base_layer` untouched, and a branch per adapter.

    An adapter's contribution to the output is its branch when active, nothing when not. One that mutated the base (`base="mutate"`)
    instead puts back what it took whenever it is not active, so that other adapters and the disabled model see the original base.

    Args:
        base_layer: the layer; never changed, except by `merge` and by adapters that mutate.
        action: how matrices act on its input.
        backend: how a quantised weight is read and written, None for a plain one.
    """

    adapter_layer_names: tuple[str, ...] = ("eckart_branch",)
    other_param_names: tuple[str, ...] = ("needs_glue", "taken")
    action: Action
    base_layer: nn.Module
    quantization_backend: QuantizationBackend | None

    def __init__(self, base_layer: nn.Module, action: Action, backend: QuantizationBackend | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.action = action
        self.quantization_backend = backend
        self.eckart_branch = nn.ModuleDict()
        self.needs_glue: dict[str, bool] = {}  # adapter -> whether training it without the callback would train something else
        self.taken: dict[str, bool] = {}  # adapters that mutate -> whether the base was mutated already
        self.glued: set[str] = set()
        self.unread: set[str] = set()  # adapters whose tensors must still come from a checkpoint
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    # ---- adapters

    def update_layer(self, adapter_name: str, branch: Branch, *, needs_glue: bool, loaded: bool) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            branch: with its values, or empty when they are about to be loaded.
            needs_glue: whether training needs the callback.
            loaded: False when the values are still to come.
        """
        base = self.get_base_layer()
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        if device is not None and not any(p.device.type == "meta" for p in branch.parameters()):
            branch.to(device)
        self.eckart_branch[adapter_name] = branch
        self.needs_glue[adapter_name] = needs_glue
        if not loaded:
            self.unread.add(adapter_name)
        if branch.policy == "mutate":
            self.taken[adapter_name] = False
            if loaded:
                self._mutate(adapter_name)
        self.set_adapter(self.active_adapters)

    def branch(self, adapter_name: str) -> Branch:
        """The branch of an adapter, with its values read.

        Raises:
            Refused: they were never loaded.
        """
        found = self.eckart_branch[adapter_name]
        assert isinstance(found, Branch)
        if adapter_name in self.unread:
            missing = found.poisoned()
            if missing:
                raise Refused(
                    f"adapter {adapter_name!r}: {', '.join(missing)} came neither from a checkpoint nor from an initialisation. A config that "
                    "was loaded from a file describes an existing adapter: load it with PeftModel.from_pretrained, or make a new EckartConfig."
                )
            self.unread.discard(adapter_name)
        if self.taken.get(adapter_name) is False:
            self._mutate(adapter_name)
        return found

    def delete_adapter(self, adapter_name: str) -> None:
        self._restore(adapter_name)
        for names in (self.glued, self.unread):
            names.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """The device only: branches stay in float32 whatever the base is stored in."""
        if adapter_name in self.eckart_branch and not any(p.device.type == "meta" for p in self.eckart_branch[adapter_name].parameters()):
            base = self.get_base_layer()
            where = device or next((t.device for t in (*base.parameters(), *base.buffers())), None)
            if where is not None:
                self.eckart_branch[adapter_name].to(where)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What merging adds to the weight, in the weight's own storage and float32."""
        return self.action.to_weight(self.branch(adapter_name).delta_matrix())

    # ---- the base weight as a matrix

    def matrix(self) -> Tensor | None:
        """The base weight (out, in) as it was before any adapter mutated or was merged into it; None where it cannot be read."""
        weight = self._weight()
        if weight is None:
            return None
        matrix = self.action.to_matrix(weight)
        for name, done in self.taken.items():
            if done:
                loss = self.branch(name).loss_matrix()
                if loss is not None:
                    matrix = (matrix.float() + loss).to(matrix.dtype)
        for name in self.merged_adapters:
            change = self.branch(name).gain_matrix() if name in self.taken else self.branch(name).delta_matrix()
            matrix = (matrix.float() - change).to(matrix.dtype)
        return matrix

    def _weight(self) -> Tensor | None:
        return read(self.get_base_layer(), self.quantization_backend)

    @torch.no_grad()
    def _add(self, change: Tensor, safe: bool = False, names: str = "") -> None:
        """Add a matrix (out, in) to the base weight."""
        weight = self._weight()
        backend = self.quantization_backend
        if weight is None or (backend is not None and not backend.supports_merge):
            raise Refused(
                f"{type(self.get_base_layer()).__name__}: its weight is quantised in a way that cannot be written; unload the adapter instead of merging it."
            )
        new = (weight.float() + self.action.to_weight(change)).to(weight.dtype)
        if safe and not bool(torch.isfinite(new).all()):
            raise ValueError(f"NaN or Inf in the merged weight; adapter {names} is broken.")
        if backend is not None:
            self.set_base_weight(new)
        else:
            own: Any = self.get_base_layer().weight
            own.data.copy_(new)  # in place: tied and optimised tensors stay the same object

    def _mutate(self, adapter_name: str) -> None:
        self.taken[adapter_name] = True
        loss = self.branch(adapter_name).loss_matrix()
        if loss is not None:
            self._add(-loss)

    def _restore(self, adapter_name: str) -> None:
        if self.taken.pop(adapter_name, False):
            loss = self.branch(adapter_name).loss_matrix()
            if loss is not None:
                self._add(loss)

    # ---- merging

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add the active adapters to the base weight and bias.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: others than the active ones.
        """
        names = check_adapters_to_merge(self, list(adapter_names) if adapter_names is not None else None)
        for name in names:
            if name not in self.eckart_branch:
                continue
            self._merge_one(name, 1.0, safe_merge)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def _merge_one(self, name: str, sign: float, safe: bool = False) -> None:
        branch = self.branch(name)
        if branch.not_mergeable:
            raise Refused(f"{branch.recipe_name}: {branch.not_mergeable}, so it cannot be merged into the weight. Keep the adapter apart.")
        change = branch.gain_matrix() if branch.policy == "mutate" else branch.delta_matrix()
        self._add(change * sign, safe, name)
        bias = branch.bias_delta()
        if bias is not None:
            own: Any = self.get_base_layer().bias
            own.data.copy_((own.float() + sign * bias).to(own.dtype))

    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again; right to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        while self.merged_adapters:
            self._merge_one(self.merged_adapters.pop(), -1.0)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """The base layer alone, with or without the active adapters in it."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        for name in list(self.taken):
            if name not in self.merged_adapters:
                self._restore(name)
        return self.get_base_layer()

    # ---- forward

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise UsageError(
                "adapter_names in forward: one batch with several adapters is not supported for ECKART. Run a batch per adapter."
            )
        if self._disable_adapters and self.merged:
            self.unmerge()
        active = self.merged_adapters if self.merged else [] if self._disable_adapters else self._present(self.active_adapters)
        branches = (
            [] if self.merged else [(name, self.branch(name)) for name in active]
        )  # before the base: an adapter may have to mutate it
        y: Any = self.base_layer(x, *args, **kwargs)
        for name, branch in branches:
            if self.training and torch.is_grad_enabled() and self.needs_glue[name] and name not in self.glued:
                self._refuse_unglued(name)
            y = y + branch(x).to(y.dtype)
        for name, mutated in self.taken.items():
            if mutated and name not in active:
                loss = self.branch(name).loss(self.action.prepare(x, torch.float32))
                y = y if loss is None else y + loss.to(y.dtype)
        return y

    def _present(self, names: Sequence[str]) -> list[str]:
        return [n for n in names if n in self.eckart_branch]

    def _refuse_unglued(self, name: str) -> None:
        found = self.eckart_branch[name]
        assert isinstance(found, Branch)
        recipe = found.recipe_name or next((b.recipe_name for b in found.layers().values()), "")
        raise UsageError(
            f"{recipe} does something at every step of the optimiser, and nothing is attached that would do it. With Trainer: "
            "Trainer(..., callbacks=[ek.glue(model)]). In a loop of your own: glue = ek.glue(model); glue.begin(optimizer); and glue.before_step(), "
            "glue.after_step() around optimizer.step(). For inference: model.eval()."
        )

    def extra_repr(self) -> str:
        return f"adapters={list(self.eckart_branch)}"
