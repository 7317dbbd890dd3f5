"""A process in which any unpickling raises, and every parser and every verb at work in it: `python unpickling.py FOLDER`, an empty one.

Forbidden before anything of eckart is imported: `pickle.Unpickler`, `load` and `loads` (in C and in Python), `torch.load`, the unpickler that torch
has for `weights_only`, `numpy.load` with pickles, `marshal` but for Python's own import of compiled modules, and, through an audit hook that
nothing can take off again, the step of any unpickler that looks a class up. Prints a JSON object: what was tried, by the module that tried it, and
{step: "" or what went wrong}. Jobs run in threads; `convert` alone starts a process, where transformers opens the pickles.
"""

from __future__ import annotations

import contextlib
import io
import json
import marshal
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

TRIED: list[str] = []


class Unpickled(BaseException):
    """No library that catches Exception can hide it."""


def tried(what: str) -> NoReturn:
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    TRIED.append(f"{what} from {frames[-1].filename}:{frames[-1].lineno}" if frames else what)
    raise Unpickled(TRIED[-1])


def raising(what: str) -> Callable[..., NoReturn]:
    return lambda *_args, **_options: tried(what)


class Forbidden:
    """Stands for an unpickler: it may be inherited from, not made."""

    def __init__(self, *_: object, **__: object) -> None:
        tried("an Unpickler")


def forbid() -> None:
    import _pickle

    for module in (pickle, _pickle):
        for name in ("Unpickler", "_Unpickler"):
            if hasattr(module, name):
                setattr(module, name, Forbidden)
        for name in ("load", "loads", "_load", "_loads"):
            if hasattr(module, name):
                setattr(module, name, raising(f"{module.__name__}.{name}"))
    loads = marshal.loads

    def compiled(data: Any, /) -> Any:
        if sys._getframe(1).f_globals.get("__name__") not in ("_frozen_importlib_external", "importlib._bootstrap_external"):
            tried("marshal.loads")
        return loads(data)

    marshal.loads, marshal.load = compiled, raising("marshal.load")

    def hook(event: str, _args: object) -> None:
        if event == "pickle.find_class":
            tried(event)

    sys.addaudithook(hook)


def forbid_in_libraries() -> None:
    import numpy
    import torch
    from torch import _weights_only_unpickler as safe

    torch.load = torch.serialization.load = raising("torch.load")
    torch.serialization._legacy_load = torch.serialization._load = raising("torch.serialization")
    safe.load, safe.Unpickler = raising("torch's weights_only"), Forbidden
    numpy.lib.format.read_array = raising("numpy.load")


def cli(*argv: object, code: int = 0) -> str:
    """Run the command line here; what it printed."""
    from eckart.cli import main

    said, wrong = io.StringIO(), io.StringIO()
    found = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        try:
            main([str(a) for a in argv])
        except SystemExit as stop:
            found = int(stop.code or 0)
    assert found == code, f"exit {found}, expected {code}: {wrong.getvalue()[-800:]}"
    return said.getvalue() + wrong.getvalue()


def parsers(_: Path) -> None:
    import hostile
    from parsers import PARSERS

    from eckart.axes.border import to_yaml
    from eckart.registry import get_recipe
    from eckart.store import journal

    good = {
        "header": [b"\0" + hostile.pack(hostile.GOOD), *(b"\0" + raw for raw, _ in hostile.HEADERS.values() if len(raw) < 1 << 20)],
        "index": [b"\0" + raw for raw, _ in hostile.INDEXES.values() if len(raw) < 1 << 20],
        "manifest": [b"\0" + raw for raw in hostile.manifests()],
        "journal": [b"\0" + journal.encode(journal.Entry("a", {"t": "0" * 64}, {"rank": 1}))],
        "recipe": [to_yaml(get_recipe("svd_llm")).encode(), *(raw for raw, _ in hostile.RECIPES.values() if isinstance(raw, bytes))],
    }
    assert good.keys() == PARSERS.keys()
    for name, inputs in good.items():
        for raw in inputs:
            PARSERS[name](raw)


def compress_data_free(place: Path) -> None:
    cli("compress", DEMO, "-o", place / "svd", "--recipe", "svd", "--keep", "0.8", "--workers", 2, "--threads", 1, "--quiet")


def compress_calibrated(place: Path) -> None:
    given = ("--calib", place / "texts.jsonl", "--stats", place / "stats.safetensors", "--workers", 2, "--threads", 1, "--quiet")
    cli("compress", DEMO, "-o", place / "llm", "--recipe", "svd_llm", "--keep", "0.8", *given)
    # statistics and recipe are files of a stranger now
    cli("compress", DEMO, "-o", place / "again", "--recipe", place / "llm" / "eckart.yaml", *given)
    assert (place / "llm" / "eckart.json").read_bytes() == (place / "again" / "eckart.json").read_bytes()


def search(place: Path) -> None:
    lines = (place / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    pieces = [json.loads(line)["text"][at : at + 300] for line in lines for at in (0, 300)]
    (place / "pieces.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in pieces))
    tried = ("--recipe", "svd", "--recipe", place / "llm" / "eckart.yaml")
    cli("search", DEMO, "-o", place / "found", "--keep", "0.8", "--calib", place / "pieces.jsonl", *tried, "--threads", 1, "--quiet")


def adapt(place: Path) -> None:
    cli("adapt", DEMO, "-o", place / "adapter", "--recipe", "pissa", "--rank", 2, "--target", "q_proj", "--init-only", "--quiet")


def pickles_are_refused(place: Path) -> None:
    """A checkpoint of pickles, and an adapter of pickles, which PEFT would open."""
    import torch

    said = cli("compress", pickled(place / "old"), "-o", place / "no", "--recipe", "svd", code=3)
    assert "eckart convert" in said
    folder = place / "pickled-adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((place / "adapter" / "adapter_config.json").read_bytes())
    torch.save({}, folder / "adapter_model.bin")
    assert "safetensors" in cli("export-lora", folder, "-o", place / "no", code=3)


def pickled(folder: Path) -> Path:
    """A checkpoint as transformers wrote it years ago."""
    import torch
    from transformers import BertConfig, BertModel

    if not folder.exists():
        folder.mkdir()
        model = BertModel(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
        model.config.architectures = ["BertModel"]
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


STEPS: dict[str, Callable[[Path], object]] = {
    "parsers": parsers,
    "ls": lambda _: cli("ls"),
    "show": lambda _: cli("show", "svd_llm"),
    "inspect": lambda place: cli("inspect", DEMO, "--measures", "stable_rank", "--only", "layers.0", "-o", place / "inspected", "--quiet"),
    "compress, data-free": compress_data_free,
    "compress, calibrated": compress_calibrated,
    "search": search,
    "verify": lambda place: cli("verify", place / "llm", "--against", DEMO),
    "eval": lambda place: cli("eval", place / "llm", "--text", place / "texts.jsonl", "--against", DEMO),
    "adapt": adapt,
    "export-lora": lambda place: cli("export-lora", place / "adapter", "-o", place / "lora"),
    "pickles are refused": pickles_are_refused,
    "convert, in its own process": lambda place: cli("convert", pickled(place / "old"), "-o", place / "new", "--quiet"),
}

if __name__ == "__main__":
    forbid()
    forbid_in_libraries()
    import eckart as ek

    place, DEMO = Path(sys.argv[1]), ek.demo_model()
    lines = (DEMO / "calibration.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": json.loads(line)["text"][:600]}) + "\n" for line in lines))
    found: dict[str, str] = {}
    for name, step in STEPS.items():
        try:
            step(place)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()[-1500:]
    print(json.dumps({"tried": TRIED, "steps": found}))
