"""`convert`: a checkpoint of pickles becomes safetensors, once, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import Incomplete, Refused
from ..progress import track
from ..store import Reader, TensorSpec, Writer, account, check_output, copied, files, work
from ..store import _json as json
from ..store.index import MAX_INDEX, PICKLED, hub_id, inside, parse_index
from ..store.locate import FETCHED, HUB_ID, NOT_FETCHED, fetch
from ..store.reader import read_config
from ..store.resume import on_disk
from ..store.side import find_side_files
from .output import versions

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"  # the two that transformers opens
STEPS = 4  # lines that the process prints
MAX_ANSWER = 64 << 20  # bytes


@dataclass(frozen=True)
class Converted:
    """What `convert` did.

    Args:
        path: the folder that was written.
        model_class: the transformers class through which the pickles were opened.
        dtype: the type in which floating-point tensors are stored: that of the pickles, or the smallest that holds all of them exactly.
        tensors, bytes: in the result.
        kept_as: {tensor of the pickles: the tensor that holds its values}, where the two have different names, as tied weights do.
        dropped: {tensor of the pickles: reason}.
        left_behind: {file of the source: reason} that is not in the result.
    """

    path: Path
    model_class: str
    dtype: str
    tensors: int
    bytes: int
    kept_as: dict[str, str] = field(default_factory=dict[str, str])
    dropped: dict[str, str] = field(default_factory=dict[str, str])
    left_behind: dict[str, str] = field(default_factory=dict[str, str])


def convert(model: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> Converted:
    """Rewrite a model of `pytorch_model.bin` files as safetensors, without running code that they may hold.

    This is the one place where eckart has pickles opened: by transformers with `weights_only`, in a process of its own that can neither
    start programs nor connect to anything, and that reads nothing but the weights and `config.json`. What it leaves is checked like any
    file of a stranger. The whole model must fit into memory, and twice its size on the disk of `out`. It does not convert training states,
    adapters, diffusion pipelines or models that need code of their own.

    Args:
        model: a folder with `config.json` and `pytorch_model.bin` (or its index and shards), or a Hub id.
        out: the folder to be made. Tokenizer, licence and other side files travel with the weights.
        overwrite: replace an earlier eckart output, at the end.

    Returns:
        `Converted`. Every tensor was compared with the model that the pickles gave.

    Raises:
        Refused: the folder holds safetensors already, or no pickles that transformers opens; a pickle needs code; the model is unknown,
            incomplete or quantised; the output would destroy something.
        Incomplete: the process was killed (usually for want of memory), or the disk failed.

    Example:
        >>> convert("no/such/folder", "new")
        Traceback (most recent call last):
        ...
        eckart.errors.Refused: no/such/folder: no such folder, and not the id of a model on the Hugging Face Hub.
    """
    folder = _find(model)
    pickles = _pickles(folder)
    size = sum(real.stat().st_size for real in pickles.values())
    path = check_output(out, [folder], overwrite, nbytes=2 * size)
    resume = shlex.join(["eckart", "convert", str(model), "-o", str(out), *(["--overwrite"] if overwrite else [])])
    side = find_side_files(folder, {*pickles, INDEX})
    inputs = {file: files.file_digest(real)[0] for file, real in track(tuple(pickles.items()), "hashing")}
    with on_disk(path, None, resume), _scratch(path) as scratch:
        report = _apart(folder, pickles, scratch, resume)
        reader = Reader(scratch / "made")
        identity = {"convert": "1", "source": reader.fingerprint, "pickles": json.line(inputs).decode()}
        specs = [TensorSpec(key, reader.info(key).dtype, reader.info(key).shape) for key in reader]
        manifest = account(reader, map(copied, reader), versions=versions(), inputs=inputs, records={"convert": report})
        source = {**manifest.source, "id": hub_id(folder) or folder.name}
        with Writer(path, specs, fingerprint=identity, overwrite=overwrite, resume=resume) as writer:
            for key in track(tuple(reader), "writing"):
                if key not in writer.done:
                    writer.copy(key, reader, key)
            sealed = replace(manifest, source=source, left_behind=dict(side.left))
            writer.commit(reader.config, sealed, {**side.carried, **reader.carry()})
    return Converted(path, tensors=len(reader), bytes=reader.nbytes, left_behind=dict(side.left), **report)


def _find(model: str | os.PathLike[str]) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise Refused(f"{folder}: expected a folder with config.json, or a Hub id, found a file. Give the folder that it is in.")
    if not isinstance(model, str) or not HUB_ID.fullmatch(model) or ".." in model:
        raise Refused(f"{model}: no such folder, and not the id of a model on the Hugging Face Hub.")
    name, _, revision = model.partition("@")
    wanted = [*(pattern for pattern in FETCHED if "safetensors" not in pattern), "pytorch_model*.bin"]
    return fetch(name, revision or None, wanted, [pattern for pattern in NOT_FETCHED if ".bin" not in pattern])


def _pickles(folder: Path) -> dict[str, Path]:
    """{name: real path} of the weight files, which are not opened here."""
    names = sorted(entry.name for entry in folder.iterdir())
    safe = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    if safe:
        raise Refused(f"{folder}: has {safe[0]}. eckart reads safetensors as they are: there is nothing to convert.")
    if SINGLE in names:
        used = [SINGLE]
    elif INDEX in names:
        used = sorted(set(parse_index(files.read_small(inside(folder, INDEX), MAX_INDEX), str(folder / INDEX), ".bin").values()))
    else:
        other = [name for name in names if name.endswith(PICKLED)]
        hint = f" {other[0]} is not a file that transformers opens, and eckart opens no pickle by itself." if other else ""
        raise Refused(f"{folder}: has no {SINGLE} and no {INDEX}.{hint}")
    if not read_config(folder):
        raise Refused(f"{folder}: has no config.json that says which model this is. Only models that transformers knows are converted.")
    return {name: inside(folder, name) for name in used}


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside the output for what is only needed on the way, under a lock of its own."""
    folder = out.with_name(f"{out.name}.converting")
    lock = work.acquire(folder)
    try:
        if folder.exists():  # of a run that was killed
            strange = [entry.name for entry in folder.iterdir() if entry.name not in ("staged", "made", "answer.json", "log.txt")]
            if strange or folder.is_symlink():
                raise Refused(f"{folder}: is not a folder of eckart (it has {strange[0] if strange else 'a link'}). Move it away.")
            shutil.rmtree(folder)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
    finally:
        work.release(folder, lock)


def _apart(folder: Path, pickles: dict[str, Path], scratch: Path, resume: str) -> dict[str, Any]:
    """Have the pickles opened and saved as `scratch/made` by a process of its own; its report."""
    staged, answer = scratch / "staged", scratch / "answer.json"
    staged.mkdir()
    for name in ("config.json", *([] if SINGLE in pickles else [INDEX])):
        (staged / name).write_bytes(files.read_small(inside(folder, name), MAX_INDEX))
    for name, real in pickles.items():
        _link(real, staged / name)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = _command(staged, scratch / "made", answer)
    with (
        (scratch / "log.txt").open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=env) as process,
    ):
        try:
            for _ in track(process.stdout or (), "converting", STEPS):
                pass
        except BaseException:
            process.kill()
            raise
    code = process.returncode
    found = _answer(answer)
    if code == 0 and "report" in found:
        return _report(found["report"])
    if code == 3 and "refused" in found:
        message = json.as_str(found["refused"], "answer", 1 << 20).replace(str(staged), str(folder))
        raise Refused(message if message.startswith(str(folder)) else f"{folder}: {message}")
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    size = sum(real.stat().st_size for real in pickles.values())
    raise Incomplete(
        f"{folder}: the process that opens the pickles ended {how} and without an answer{_last_line(scratch / 'log.txt')}. "
        f"The whole model must fit into memory, {size / 1e9:.1f} GB and the libraries.",
        resume,
    )


def _command(staged: Path, made: Path, answer: Path) -> list[str]:
    # -P: the current folder may be the model's, and what lies there is not imported
    return [sys.executable, "-P", "-m", "eckart.hub.unpickle", str(staged), str(made), str(answer)]


def _link(real: Path, name: Path) -> None:
    for make in (os.symlink, os.link, shutil.copyfile):
        with contextlib.suppress(OSError):  # Windows allows links to some users only, and hard links end at the disk
            make(real, name)
            return
    raise Refused(f"{real}: cannot be linked or copied to {name}.")


def _answer(path: Path) -> dict[str, json.Json]:
    if not path.exists():
        return {}
    return json.as_dict(json.parse(files.read_small(path, MAX_ANSWER), "answer", nodes=1000, items=10**7), "answer")


def _report(value: json.Json) -> dict[str, Any]:
    top = json.as_dict(value, "answer")
    texts = {key: json.as_str(top.get(key), f"answer: {key}", 200) for key in ("model_class", "dtype")}
    tables = {
        key: {json.as_str(k, "answer"): json.as_str(v, "answer") for k, v in json.as_dict(top.get(key), f"answer: {key}").items()}
        for key in ("kept_as", "dropped")
    }
    return {**texts, **tables}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f" ({json.short(lines[-1], 200)})" if lines else ""
