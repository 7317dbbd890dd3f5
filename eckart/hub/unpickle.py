"""The one place where pickles are opened, in a process of its own: `python -P -m eckart.hub.unpickle STAGED MADE ANSWER`.

transformers opens them with `weights_only`, which builds tensors and plain containers and refuses everything else. On top of that, whatever
would unpickle in full, start a program or open a connection ends the process. Nothing else of eckart imports this file; `verbs/convert.py`
starts it, and reads what it leaves as the work of a stranger.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from ..errors import EckartError, Refused
from ..store import Reader
from ..store.dtypes import name_of, to_bytes
from . import identify

FORBIDDEN = frozenset({"pickle.find_class", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"}) | {
    "os.startfile", "subprocess.Popen", "socket.connect", "socket.bind", "socket.sendto"
}  # fmt: skip
SHARD = "2GB"  # a shard is serialised in memory
_SHOWN = 5
_GLOBAL = re.compile(r"GLOBAL (\S{1,100})")

Print = tuple[str, tuple[int, ...], str]  # type, shape, sha256


def convert(staged: Path, made: Path) -> dict[str, Any]:
    """Open a model of pickles, save it as safetensors, and compare what was saved with what was opened.

    Args:
        staged: a folder with `config.json` and the pickles, and nothing else.
        made: where `save_pretrained` writes.

    Returns:
        Plain values: `model_class`, `dtype`, `kept_as` {tensor of the pickles: the tensor that has its values},
        `dropped` {tensor of the pickles: reason}.

    Raises:
        Refused: a pickle needs code, the model is none that transformers knows, a weight is missing, or the result is not the same model.
    """
    config = identify.read_config(str(staged), {"local_files_only": True})
    if getattr(config, "quantization_config", None) is not None:
        raise Refused("the weights are quantised. Convert the original checkpoint.")
    files = sorted(path.name for path in staged.glob("*.bin"))
    dtype = _storage_type({name: t for file in files for name, t in _raw(staged / file, "meta").items()})
    cls, model, info = _open(staged, config, dtype)
    before, ties = prints(model), tied(model)
    _say("saving")
    model.save_pretrained(made, max_shard_size=SHARD)
    del model
    _say("opening the result")
    again, after_info = _load(type_of(cls, made), made, use_safetensors=True, dtype=dtype)
    if after_info["missing_keys"] or after_info["unexpected_keys"] or prints(again) != before or tied(again) != ties:
        raise Refused(f"{cls.__name__}: what was saved does not load as the model that was opened; this model cannot be converted.")
    del again
    _say("comparing")
    kept, dropped = _account(staged, files, Reader(made), cls.__name__, dtype, set(info["unexpected_keys"]))
    return {"model_class": cls.__name__, "dtype": str(dtype).removeprefix("torch."), "kept_as": kept, "dropped": dropped}


def forbid() -> None:
    """From here on this process cannot unpickle in full, start a program or connect to anything."""

    def hook(event: str, _args: object) -> None:
        if event in FORBIDDEN:
            raise PermissionError(f"{event} is not allowed while pickles are opened")

    sys.addaudithook(hook)


def prints(model: Any) -> dict[str, Print]:
    """{name: type, shape and sha256} of everything in a state dict."""
    return {name: _print(tensor) for name, tensor in model.state_dict().items()}


def tied(model: Any) -> set[frozenset[str]]:
    """Names that share their memory, in groups."""
    groups: dict[tuple[int, int], set[str]] = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.numel()), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def type_of(cls: Any, made: Path) -> Any:
    """The class that the saved config names; it must be the one that was saved."""
    found = identify.model_class(str(made), identify.read_config(str(made), {"local_files_only": True}))
    if found is not cls:
        raise Refused(f"{cls.__name__}: its saved config.json names {found.__name__}; this model cannot be converted.")
    return found


def _open(staged: Path, config: Any, dtype: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(class, model, what was missing): the class that config.json names, else the one without its head."""
    cls, base = identify.model_class(str(staged), config), identify.base_class(config)
    _say("opening")
    for kind in dict.fromkeys(filter(None, (cls, base))):
        model, info = _load(kind, staged, use_safetensors=False, dtype=dtype)
        if not info["missing_keys"] and not info["mismatched_keys"]:
            return kind, model, info
    model, info = _load(cls, staged, use_safetensors=False, dtype=dtype)
    wrong = sorted(info["missing_keys"]) or sorted(str(key) for key, *_ in info["mismatched_keys"])
    what = "are not in the file and would be random" if info["missing_keys"] else "have another shape in the file"
    raise Refused(
        f"{len(wrong)} weights of {cls.__name__} {what}: {_some(wrong)}. The checkpoint is incomplete or belongs to another model."
    )


def _load(cls: Any, folder: Path, *, use_safetensors: bool, dtype: Any) -> tuple[Any, dict[str, Any]]:
    try:
        return cls.from_pretrained(
            str(folder), use_safetensors=use_safetensors, dtype=dtype, weights_only=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # whatever a stranger's file makes a loader raise
        raise Refused(f"{cls.__name__}: the weights could not be read: {_reason(error)}") from error


def _raw(file: Path, where: str) -> dict[str, Any]:
    """The tensors of one pickle."""
    from transformers.modeling_utils import load_state_dict

    try:
        found: Any = load_state_dict(file, map_location=where, weights_only=True)
    except Exception as error:  # pickle, zip and torch errors have no common base
        asked = _GLOBAL.search(str(error))
        if asked or isinstance(error, PermissionError):
            what = asked[1] if asked else str(error)
            raise Refused(
                f"{file.name}: opening it would run code ({what}), so it is not opened. Get the weights as safetensors."
            ) from None
        raise Refused(f"{file.name}: cannot be opened as a checkpoint: {_reason(error)}") from error
    import torch

    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items()):
        raise Refused(f"{file.name}: expected named tensors and nothing else. It may hold a whole training state: save its model first.")
    return found


def _storage_type(raw: dict[str, Any]) -> Any:
    """The smallest type that holds every floating-point tensor exactly."""
    import torch

    kinds = {tensor.dtype for tensor in raw.values() if tensor.dtype.is_floating_point}
    plain = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    if not kinds or kinds - plain:
        found = ", ".join(sorted(str(kind) for kind in kinds - plain)) or "no floating-point tensor"
        raise Refused(f"expected weights in float16, bfloat16, float32 or float64, found {found}.")
    result = kinds.pop()
    for kind in kinds:
        result = torch.promote_types(result, kind)
    return result


def _account(
    staged: Path, files: list[str], made: Reader, kind: str, dtype: Any, unread: set[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Every tensor of the pickles is in the result under its name, or its values are under another, or it was dropped and is named."""
    kept: dict[str, str] = {}
    dropped: dict[str, str] = {}
    stored = {(info.dtype, info.shape, made.digest(info.name)): info.name for info in map(made.info, made)}
    for file in files:
        for name, tensor in _raw(staged / file, "cpu").items():
            if name in made:
                saved = made.read(name)
                if tensor.shape != saved.shape or _print(tensor.to(saved.dtype)) != _print(saved):
                    raise Refused(f"{file}: tensor {name!r} is not in the result as it was read; this model cannot be converted.")
            elif (other := stored.get(_print(tensor.to(dtype) if tensor.dtype.is_floating_point else tensor))) is not None:
                kept[name] = other
            else:
                dropped[name] = f"{kind} has no such tensor" if name in unread else f"{kind} does not store it"
    return kept, dropped


def _print(tensor: Any) -> Print:
    return name_of(tensor.dtype), tuple(tensor.shape), hashlib.sha256(to_bytes(tensor)).hexdigest()


def _reason(error: BaseException) -> str:
    # torch's own advice is to switch the safety off
    return f"{type(error).__name__}: {identify.first_line(error)[:300]}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _say(step: str) -> None:
    print(step, flush=True)


def main(argv: list[str]) -> int:
    """Convert, and leave the answer as JSON; exit 0 done, 3 refused."""
    staged, made, answer = map(Path, argv)
    transformers = identify.need_transformers()
    transformers.utils.logging.disable_progress_bar()
    forbid()
    try:
        found: dict[str, Any] = {"report": convert(staged, made)}
    except EckartError as error:
        found = {"refused": str(error)}
    answer.write_text(json.dumps(found), encoding="utf-8")
    return 0 if "report" in found else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
