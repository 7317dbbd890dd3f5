"""What a model folder is, read from its `config.json` alone: which config, which class, what kind of model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import Refused, UsageError, did_you_mean

# what says where a model comes from; every other option is for the model class itself
WHENCE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?)(@(?P<revision>[\w./-]{1,200}))?")
_NO_CODE = "eckart never runs code from a model folder"


def need_transformers() -> Any:
    """The transformers package, or a UsageError that says how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError('This needs transformers, which is not installed. Next: pip install "eckart[hf]"') from error
    return transformers


def locate(path: str | os.PathLike[str], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where transformers should look, and the options it needs for that.

    Args:
        path: a folder, or an id of the Hugging Face Hub: `name`, `org/name`, `org/name@revision`.
        options: those of the call.

    Raises:
        Refused: neither.
    """
    where = os.path.expanduser(os.fspath(path))
    if os.path.isdir(where):
        return where, {**options, "local_files_only": True}
    if os.path.exists(where):
        raise Refused(f"{path}: this is a file; expected a model folder (with config.json), or the id of a model on the Hugging Face Hub.")
    hub = _HUB_ID.fullmatch(where)
    if hub is None or ".." in where:
        raise Refused(f"{path}: no such folder, and this cannot be the id of a model on the Hugging Face Hub (name, or org/name).")
    return hub["name"], options if hub["revision"] is None else {"revision": hub["revision"], **options}


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def folder_of(where: str, options: dict[str, Any]) -> Path | None:
    """The local folder with the files, None for a Hub id."""
    return Path(where, options.get("subfolder") or "") if os.path.isdir(where) else None


def read_config(where: str, options: dict[str, Any]) -> Any:
    """The transformers config of a folder or Hub id, or a refusal that says what is wrong with it."""
    transformers = need_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whence = {k: v for k, v in options.items() if k in WHENCE}
    folder = folder_of(where, options)
    if folder is not None:
        adapter = (folder / "adapter_config.json").is_file()
        if not (folder / "config.json").is_file():
            hint = " It holds a PEFT adapter: merge that into its base model first." if adapter else ""
            raise Refused(f"{where}: no config.json in this folder, so it is not a transformers model.{hint}")
        if adapter:
            raise Refused(f"{where}: the folder holds a model and a PEFT adapter. Merge the adapter into the model, save that, and use it.")
    try:
        raw, _ = transformers.PreTrainedConfig.get_config_dict(where, **whence)
    except Exception as error:  # OSError mostly; a JSON that is no table trips transformers itself
        hint = "" if folder is not None else " (and there is no local folder of that name)"
        raise Refused(f"{where}: no readable config.json{hint}: {first_line(error)}") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str):
        raise Refused(f"{where}: config.json: expected model_type to be a text, found {kind!r}.")
    if kind not in CONFIG_MAPPING:
        code = f" It ships its own Python code, and {_NO_CODE}." if raw.get("auto_map") else ""
        near = did_you_mean(kind, list(CONFIG_MAPPING.keys()))
        raise Refused(
            f"{where}: transformers {transformers.__version__} does not know model_type {kind!r}.{near}{code} "
            "A newer release may know it: pip install -U transformers"
        )
    table = raw.get("quantization_config")
    if table is not None and not isinstance(table, dict):
        raise Refused(f"{where}: config.json: expected quantization_config to be a table, found {type(table).__name__}.")
    try:
        return transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **whence)
    except Exception as error:  # whatever a stranger's config.json makes a config class raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise Refused(f"{where}: config.json is not acceptable for model_type {kind!r}: {reason}") from error


def is_factored(config: Any) -> bool:
    """True when the config says that eckart wrote the model."""
    table = getattr(config, "quantization_config", None)
    return isinstance(table, dict) and table.get("quant_method") == "eckart"


def base_class(config: Any) -> Any:
    """The class without a head for a config (what `AutoModel` takes), or None."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return _mapped(MODEL_MAPPING, config)


def model_class(where: str, config: Any) -> Any:
    """The transformers class that `architectures` names, so that the keys of the file fit; else the class without a head."""
    transformers = need_transformers()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    names = getattr(config, "architectures", None)
    if names is not None and (not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names)):
        raise Refused(f"{where}: config.json: expected architectures to be a list of class names, found {names!r}.")
    for name in names or ():
        found = getattr(transformers, name, None) if name.isidentifier() and not name.startswith("_") else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            if found.config_class is type(config):
                return found
            # some model_types are read as a sibling's (mistral with layer_types): keep at least the head
            if name in _causal_names() and (sibling := _mapped(MODEL_FOR_CAUSAL_LM_MAPPING, config)) is not None:
                return sibling
    if names and getattr(config, "auto_map", None):
        raise Refused(
            f"{where}: {names[0]} comes with its own Python code, and {_NO_CODE}; transformers has no class of that name "
            f"for model_type {config.model_type!r}."
        )
    base = base_class(config)
    if base is None:
        raise Refused(f"{where}: transformers has no model class for model_type {config.model_type!r} (architectures: {names}).")
    return base


def is_causal(model_or_config: Any) -> bool:
    """True for language models with a next-token head, whose perplexity can be measured; by class, not by looking at weights.

    Args:
        model_or_config: a transformers model, a `PeftModel` around one, or a config (its `architectures` then decide).
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if hasattr(model_or_config, "get_base_model"):
        model_or_config = model_or_config.get_base_model()
    config = getattr(model_or_config, "config", model_or_config)
    if hasattr(model_or_config, "config"):
        name = type(model_or_config).__name__
    else:
        name = str((getattr(config, "architectures", None) or [""])[0])
    if getattr(config, "is_encoder_decoder", False) or name not in _causal_names():
        return False
    # encoders have a class for use as a decoder (BertLMHeadModel); unless is_decoder is set it sees the tokens it should predict
    return getattr(config, "model_type", None) not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or bool(getattr(config, "is_decoder", False))


def is_encoder(model_or_config: Any) -> bool:
    """True for text models whose hidden states are pooled into embeddings: no next-token head, no decoder beside it.

    The body of a language model alone (`LlamaModel`) counts, since that is how it is used.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if getattr(config, "is_encoder_decoder", False) or is_causal(model_or_config):
        return False
    return getattr(config, "vocab_size", None) is not None


def _mapped(mapping: Any, config: Any) -> Any:
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, list | tuple) else found


def _causal_names() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {n for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for n in ((value,) if isinstance(value, str) else value)}
