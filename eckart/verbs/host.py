"""Where a model comes from: a folder (or Hub id) that is read tensor by tensor, or a module that is already in memory.

The one place below the top floor that imports `hub`, and only inside functions: loading a model is the hub's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site
from ..catalogue import Catalogue, from_headers, from_model
from ..errors import Refused, UsageError
from ..runners.jobs import reading
from ..store import Reader
from ..store.memory import Memory

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..runners.blocks import Chain
    from ..runners.materialise import Weights


class Host(ABC):
    """A model as verbs see it: a reader for its tensors, a catalogue of its matrices, and a live module where one is needed.

    Args:
        reader: where tensors come from; only ever read.
        name: what the model is called in reports.
        path: its folder, None in memory.
    """

    reader: Reader | Memory
    name: str
    path: Path | None = None

    @cached_property
    def catalogue(self) -> Catalogue:
        """The matrices of the model, with the ids of the inputs that they share."""
        return self._catalogue()

    @abstractmethod
    def _catalogue(self) -> Catalogue: ...

    @abstractmethod
    def live(self) -> nn.Module:
        """The model itself, in evaluation mode where it was loaded for us. Not to be changed."""

    def outline(self) -> nn.Module:
        """What tells of the model's class and config, with its weights or without."""
        return self.live()

    def chain(self, example: Any) -> Chain:
        """The model as a chain of blocks that can be loaded one by one.

        Args:
            example: a calibration batch.

        Raises:
            Unwalkable: it is none, or it is in memory already.
        """
        from ..runners.walk import Unwalkable

        raise Unwalkable(f"{self.name} is in memory already.")

    @abstractmethod
    def tokenizer(self) -> Any:
        """Its tokenizer."""

    @abstractmethod
    def side_files(self) -> dict[str, bytes | Path]:
        """What travels with the weights: tokenizer, generation settings."""

    def read(self, site: Site) -> Tensor:
        """W (out, in) of a site, whatever its storage."""
        return reading(self.reader)(site)

    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(self.reader.info(k).shape) for k in self.reader)


class FolderHost(Host):
    """A checkpoint on disk. The live model is loaded when statistics or an evaluation want it."""

    def __init__(self, path: str | Path, tokenizer: Any = None, device: str | None = None) -> None:
        self.reader = self._reader = Reader(path)
        self.path = Path(self._reader.path)
        self.name = self.path.name if Path(path).exists() else str(path)
        self._tokenizer = tokenizer
        self._device = device

    def _catalogue(self) -> Catalogue:
        from ..hub.load import meta_model
        from ..hub.names import file_names

        quantised = self.reader.config.get("quantization_config")
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise Refused(f"{self.path}: these weights are already quantised or factored ({method}). Start from the original checkpoint.")
        if not self.reader.config.get("architectures") and not self.reader.config.get("model_type"):
            return from_headers(self.reader)  # names and shapes alone
        model = meta_model(str(self.path))
        return from_headers(self.reader, model, example=_example(model), names=file_names(model, self.reader.keys()))

    def live(self) -> nn.Module:
        return self._live

    @cached_property
    def _live(self) -> nn.Module:
        from ..hub.load import load

        return load(str(self.path), device=self._device)

    def outline(self) -> nn.Module:
        from ..runners.walk import Unwalkable

        try:
            return self._weights.model
        except Unwalkable:
            return self.live()

    def chain(self, example: Any) -> Chain:
        from ..runners.blocks import chain

        return chain(self._weights, self.catalogue.blocks, example)

    @cached_property
    def _weights(self) -> Weights:
        """Where the tensors of the model are, which has none itself."""
        from ..hub.names import file_names
        from ..hub.skeleton import unloaded
        from ..runners.materialise import Weights
        from ..runners.walk import Unwalkable

        try:
            model = unloaded(str(self.path), self._reader)
        except Refused as error:
            raise Unwalkable(str(error)) from error
        return Weights(model, self._reader, self._device, file_names(model, self._reader.keys()))

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from ..hub.load import load_tokenizer

            self._tokenizer = load_tokenizer(str(self.path))
        return self._tokenizer

    def side_files(self) -> dict[str, bytes | Path]:
        return dict(self._reader.carry())


class ModuleHost(Host):
    """A module in memory. It is never changed: what a verb makes of it is a copy."""

    def __init__(self, model: nn.Module, tokenizer: Any = None, example: Any = None) -> None:
        config = getattr(model, "config", None)
        self.name = Path(getattr(config, "_name_or_path", "") or type(model).__name__).name
        self.reader = Memory(model.state_dict(), config.to_dict() if config is not None and hasattr(config, "to_dict") else {}, self.name)
        self._model = model
        self._tokenizer = tokenizer
        self._example = example

    def _catalogue(self) -> Catalogue:
        return from_model(self._model, self._example if self._example is not None else _example(self._model))

    def live(self) -> nn.Module:
        return self._model

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            name = getattr(getattr(self._model, "config", None), "_name_or_path", "")
            if not name:
                raise UsageError(
                    "the text needs a tokenizer, and the model in memory knows none. Pass tokenizer=..., or lists of token ids."
                )
            from ..hub.load import load_tokenizer

            self._tokenizer = load_tokenizer(name)
        return self._tokenizer

    def side_files(self) -> dict[str, bytes | Path]:
        """Tokenizer and generation settings, as their own `save_pretrained` writes them."""
        import tempfile

        out: dict[str, bytes | Path] = {}
        parts: tuple[Any, ...] = (self._tokenizer, getattr(self._model, "generation_config", None))
        for part in parts:
            if hasattr(part, "save_pretrained"):
                with tempfile.TemporaryDirectory() as folder:
                    part.save_pretrained(folder)
                    out |= {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}
        return out


def open_host(model: Any, tokenizer: Any = None, device: str | None = None, example: Any = None) -> FolderHost | ModuleHost:
    """A host for a folder, a Hub id, or a module.

    Raises:
        UsageError: none of these.
    """
    if isinstance(model, str | Path):
        return FolderHost(model, tokenizer, device)
    if hasattr(model, "state_dict") and hasattr(model, "named_modules"):
        return ModuleHost(model, tokenizer, example)
    raise UsageError(f"model: expected a folder, a Hub id, or a torch module, found {type(model).__name__}.")


def attach(model: Any, **info: Any) -> None:
    """Mark a model in memory as ours, so that its own `save_pretrained` works."""
    from ..hub.attach import attach as mark

    mark(model, **info)


def is_causal(model: Any) -> bool:
    """Whether the model predicts the next token."""
    from ..hub.load import is_causal as ask

    return ask(model)


def _example(model: Any) -> Any:
    """The smallest text input, on the model's device, for models that transformers knows; None for any other module."""
    import torch

    if not hasattr(model, "config") or not hasattr(model, "dummy_inputs"):
        return None
    device = next(model.parameters()).device
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        return _image(model.config, device)
    ids = torch.zeros((1, 4), dtype=torch.long, device=device)
    both = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": ids, "decoder_input_ids": ids} if both else {"input_ids": ids}


def _image(config: Any, device: Any) -> dict[str, Any] | None:
    """An empty image of the size that a vision model wants; None where its config does not say which."""
    import torch

    size = getattr(config, "image_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) and len(size) == 2 else None
    if sides is None:
        return None
    dtype = getattr(config, "dtype", None)
    return {
        "pixel_values": torch.zeros(
            (1, getattr(config, "num_channels", 3), *sides), device=device, dtype=dtype if isinstance(dtype, torch.dtype) else None
        )
    }
