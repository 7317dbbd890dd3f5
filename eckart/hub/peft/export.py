"""Plain LoRA out of any adapter whose update is a thin product: it loads in PEFT, and in whatever reads PEFT's LoRA, without eckart."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import Refused, UsageError
from ...nn.action import Action, ConvAction, EmbeddingAction
from ...verbs.adapter_folder import CONFIG, WEIGHTS, check_folder, write_folder
from .register import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .layer import EckartLayer

TOLERANCE = 1e-4  # of the logits, relative to their largest: float32 products in another order


@dataclass(frozen=True)
class Exported:
    """What `export_lora` did.

    Args:
        path: the folder.
        ranks: layer -> rank of the plain LoRA.
        logits: largest difference of the outputs of both adapters, relative to the largest output; None where no output could be compared.
        weights: largest difference of the updates, relative to the largest of their layer.
    """

    path: Path
    ranks: dict[str, int]
    logits: float | None
    weights: float


def export_lora(source: Any, out: str | Path, *, base: Any = None, adapter_name: str = "default", overwrite: bool = False) -> Exported:
    """Write an adapter as plain LoRA on the original base model.

    The update of a layer is s (L C R - L0 C0 R0), so its rank is r where one of the outer factors is shared, else 2r. Nothing is
    approximated; the result is compared with the adapter before the folder is moved to its place.

    Args:
        source: an adapter folder of ours, or a `PeftModel` in memory.
        out: folder to write.
        base: the base model (a module or folder), for a folder that does not say where its base is.
        adapter_name: which, for a model in memory.
        overwrite: replace an earlier adapter folder.

    Returns:
        `Exported`.

    Raises:
        UsageError: not an adapter of ours.
        Refused: an update that is no thin product, or an output that would destroy something.
    """
    register()
    from peft import PeftModel

    folder = Path(source) if isinstance(source, str | Path) else None
    out = check_folder(out, [folder] if folder else [], overwrite)
    model = _open(folder, base) if folder else source
    name = "default" if folder else adapter_name
    if not isinstance(model, PeftModel):
        raise UsageError(f"export-lora: expected an adapter folder or a PeftModel, found {type(source).__name__}.")
    from .glue import adapter_layers

    training = model.training
    model.eval()
    layers: dict[str, EckartLayer] = {n: m for n, m in model.base_model.model.named_modules() if m in set(adapter_layers(model))}  # type: ignore[misc]
    layers = {n: m for n, m in layers.items() if name in m.eckart_branch}
    if not layers:
        raise UsageError(f"export-lora: the model holds no adapter {name!r} of ours. It has: {', '.join(model.peft_config)}.")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    worst = 0.0
    with torch.no_grad():
        biased = any(_has_bias(m, name) for m in layers.values())
        for module, layer in layers.items():
            a, b = thin(layer, name, module)
            branch = layer.branch(name)
            size = max(float(branch.gain_matrix().abs().max()), 1e-30)  # of the parts: the update itself may be zero
            worst = max(worst, float((b @ a - branch.delta_matrix()).abs().max()) / size)
            ranks[module] = a.shape[0]
            tensors |= _tensors(module, layer, name, a, b, biased)
    if worst > TOLERANCE:
        raise Refused(
            f"export-lora: the plain LoRA differs from the adapter by {worst:.1e} of its largest entry; this is a bug, please report it."
        )
    config = _config(model, name, ranks, biased)
    wanted = _outputs(model, name)
    card = {"README.md": _card(model, name, ranks)}
    logits = None
    if wanted is not None:
        with tempfile.TemporaryDirectory() as trial:
            write_folder(Path(trial, "lora"), tensors, config, card)
            # a model of our own is used up, the user's is copied
            plain = (model if folder else copy.deepcopy(model)).unload()
            logits = _compare(plain, Path(trial, "lora"), wanted)
    write_folder(out, tensors, config, card)
    model.train(training)
    return Exported(out, ranks, logits, worst)


def thin(layer: EckartLayer, adapter_name: str, module: str) -> tuple[Tensor, Tensor]:
    """(A, B) with B A the layer's update, at its exact rank or below.

    Raises:
        Refused: the branch is not a matrix, or is one of full rank.
    """
    branch = layer.branch(adapter_name)
    if branch.not_mergeable:
        raise Refused(f"{module}: {branch.not_mergeable}, so there is no LoRA that does the same. Keep using it through eckart.")
    found = branch.lora()
    if found is None:
        raise Refused(
            f"{module}: the update of {branch.recipe_name} is no product of two thin factors. Merge it into the weights instead: model.merge_and_unload()."
        )
    a, b = found
    full = min(layer.action.out, layer.action.into)
    if a.shape[0] > full:  # more factors than the matrix has rank: its own decomposition is shorter
        from ...linalg import svd

        change = svd((b.double() @ a.double()), full, name=module)
        left, right = change.balance("even")
        return right.float(), left.float()
    return a, b


def _has_bias(layer: EckartLayer, name: str) -> bool:
    bias = layer.branch(name).bias_delta()
    return bias is not None and bool(bias.any())


def _tensors(module: str, layer: EckartLayer, name: str, a: Tensor, b: Tensor, biased: bool) -> dict[str, Tensor]:
    stem = f"base_model.model.{module}"
    action = layer.action
    if isinstance(action, EmbeddingAction):
        return {f"{stem}.lora_embedding_A": a, f"{stem}.lora_embedding_B": b}
    if isinstance(action, ConvAction):
        if action.layer.groups > 1:
            raise Refused(
                f"{module}: PEFT's LoRA has no exact form of this branch for a convolution with groups. Merge it instead: model.merge_and_unload()."
            )
        a = a.reshape(len(a), *action.layer.weight.shape[1:])
        b = b.reshape(*b.shape, *([1] * (a.ndim - 2)))
    out = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    if biased:
        bias = layer.branch(name).bias_delta()
        out[f"{stem}.lora_B.bias"] = torch.zeros(action.out) if bias is None else bias
    return out


def _config(model: Any, name: str, ranks: dict[str, int], biased: bool) -> dict[str, Any]:
    from peft import LoraConfig

    own = model.peft_config[name]
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {n: r for n, r in ranks.items() if r != usual}
    # alpha equals the rank everywhere: the scale is in the factors
    config = LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=others, alpha_pattern=dict(others), target_modules=sorted(ranks), lora_bias=biased,
        base_model_name_or_path=own.base_model_name_or_path, task_type=own.task_type, inference_mode=True,
        fan_in_fan_out=any(type(m.action) is Action and m.action.transposed for m in _layers(model).values()),
    ).to_dict()  # fmt: skip
    return {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items() if k != "runtime_config"}


def _layers(model: Any) -> dict[str, Any]:
    from .layer import EckartLayer

    return {n: m for n, m in model.named_modules() if isinstance(m, EckartLayer)}


def _open(folder: Path, base: Any) -> Any:
    from peft import PeftConfig, PeftModel

    from ..load import load
    from .config import EckartConfig

    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder}: holds no {CONFIG}; expected the folder of an adapter.")
    if not (folder / WEIGHTS).is_file():  # PEFT would go on to open adapter_model.bin, a pickle, or ask the Hub
        raise Refused(f"{folder}: holds no {WEIGHTS}; expected an adapter in safetensors, the only weights that eckart opens.")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, EckartConfig):
        raise UsageError(f"{folder}: is an adapter of type {config.peft_type}, not one of ours; nothing has to be exported.")
    where = base if base is not None else config.base_model_name_or_path
    if where is None:
        raise UsageError(f"{folder}: does not say what its base model is. Give it: --base MODEL.")
    # in float32 whatever the file holds: a check through rounded outputs would check little
    inner: nn.Module = load(str(where), dtype=torch.float32) if isinstance(where, str | Path) else where
    return PeftModel.from_pretrained(inner, str(folder))


def _probe(model: Any) -> dict[str, Any] | None:
    """A few token ids, for models that read them."""
    inner = model.base_model.model
    size = getattr(getattr(inner, "config", None), "vocab_size", None)
    if not size or not hasattr(inner, "dummy_inputs"):
        return None
    device = next(inner.parameters()).device
    ids = (torch.arange(24, device=device).reshape(2, 12) * 7919 + 3) % size
    both = getattr(inner.config, "is_encoder_decoder", False)
    return {"input_ids": ids, "decoder_input_ids": ids} if both else {"input_ids": ids}


def _run(model: Any, probe: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**probe)[0].float()


def _outputs(model: Any, name: str) -> Tensor | None:
    probe = _probe(model)
    if probe is None:
        return None
    model.set_adapter(name)
    return _run(model, probe)


def _compare(plain: Any, folder: Path, wanted: Tensor) -> float:
    """Load what was written on the base model, and compare outputs."""
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(plain, str(folder)).eval()
    probe = _probe(loaded)
    assert probe is not None
    difference = float((_run(loaded, probe) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    if difference > TOLERANCE and next(plain.parameters()).dtype == torch.float32:
        raise Refused(
            f"export-lora: loaded as plain LoRA, the outputs differ by {difference:.1e} of the largest; nothing was written. "
            "This is a bug, please report it."
        )
    return difference


def _card(model: Any, name: str, ranks: dict[str, int]) -> str:
    recipe = model.peft_config[name].value
    base = model.peft_config[name].base_model_name_or_path
    lines = ["---", "library_name: peft", *([f"base_model: {base}"] if base else []), "tags:", "- lora", "- eckart", "---", ""]
    lines += [f"# {recipe.title or recipe.name}, as plain LoRA", ""]
    lines += [
        f"Trained as `{recipe.name}` ({recipe.paper}) with eckart and exported exactly; ranks {min(ranks.values())} to {max(ranks.values())}.",
        "",
    ]
    return "\n".join(lines)
