"""What a run takes of memory and disk, from shapes and headers alone: printed with the plan, held against a limit before any work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..plan import Plan

PROGRAM = 512 << 20  # bytes of Python, torch and transformers; 434 MiB were measured on a CPU
FILES = 64 << 20  # bytes of buffers for reading, hashing and writing
CACHE_BYTES = 2 << 30  # bases of wave one kept for the cut; beyond it a bundle is factorised again
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str | int) -> int:
    """A number of bytes from "2.5GiB", "800MB" or a plain number.

    Raises:
        UsageError: anything else, or nothing above 0.

    Example:
        >>> parse_bytes("2.5GiB"), parse_bytes("10 MB")
        (2684354560, 10000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found[2].lower() not in UNITS or float(found[1]) <= 0:
        raise UsageError(f"expected a size such as 2.5GiB, 800MB or a number of bytes, found {text!r}.")
    return int(float(found[1]) * UNITS[found[2].lower()])


def words(size: float) -> str:
    """Bytes for people: 2.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def bases(plan: Plan) -> int:
    """Bytes of the bases of wave one, if all were kept for the cut."""
    return 0 if plan.decides == "shape" else sum(8 * j.cap * sum(j.shape) for j in plan.stages[0].jobs)


def with_memory(plan: Plan, *, workers: int, cache: int, parts: Mapping[str, int], disk: int) -> Plan:
    """The plan with what it takes.

    Args:
        plan: as `make_plan` gives it.
        workers: jobs at once in this process, 0 where they run in others.
        cache: bytes of bases kept between the waves at most.
        parts: what else lies in memory ("statistics", "model", ...), in bytes.
        disk: bytes that will be written.
    """
    largest = max((j.peak for s in plan.stages for j in s.jobs), default=0)
    found = {"program": PROGRAM, "files": FILES, "jobs": workers * largest, "bases": min(cache, bases(plan)), **parts}
    return replace(plan, memory={k: v for k, v in found.items() if v} | {"disk": disk})


def fitted(plan: Plan, *, workers: int, cache: int, parts: Mapping[str, int], disk: int, limit: int | None) -> Plan:
    """`with_memory`, with bases only as far as a limit leaves room for them, the program counted.

    Args:
        plan, workers, cache, parts, disk: as for `with_memory`.
        limit: bytes of memory, None for no limit.
    """
    full = with_memory(plan, workers=workers, cache=cache, parts=parts, disk=disk)
    if limit is None or full.peak <= limit:
        return full
    room = max(0, limit - (full.peak - full.memory.get("bases", 0)))
    return with_memory(plan, workers=workers, cache=min(cache, room), parts=parts, disk=disk)


def beside_program(plan: Plan) -> int:
    """Bytes of memory that a run takes beside Python and its libraries: what a limit is held against."""
    return plan.peak - plan.memory.get("program", 0)


def calibration_bytes(config: Mapping[str, Any], model: int, tokens: int, backward: bool) -> int:
    """An estimate of what the whole model takes while calibration text runs through it: weights, logits and activations.

    Args:
        config: the model's `config.json`.
        model: bytes of its weights.
        tokens: in one batch.
        backward: whether activations of all layers are kept for gradients.
    """
    text = config.get("text_config") or config
    hidden = int(text.get("hidden_size") or text.get("n_embd") or 0)
    layers = int(text.get("num_hidden_layers") or text.get("n_layer") or 1)
    logits = 4 * tokens * int(text.get("vocab_size") or 0) * (3 if backward else 1)
    per_layer = 4 * 34 * tokens * hidden  # Korthikanti et al. 2022, table 2, for 4-byte numbers and without the quadratic part
    return model + logits + per_layer * (layers if backward else 1)


def refuse_beyond(plan: Plan, limit: int | None, out: Path | None, why: str = "") -> None:
    """Refuse a plan that takes more memory than it may beside the program, or more disk than there is.

    Args:
        plan: with its memory.
        limit: bytes of memory.
        out: what will be written.
        why: a sentence on what keeps it from taking less.

    Raises:
        UsageError: naming what takes most, and what to change.
    """
    if limit is not None and beside_program(plan) > limit:
        parts = sorted(((v, k) for k, v in plan.memory.items() if k not in ("disk", "program")), reverse=True)
        shown = ", ".join(f"{k} {words(v)}" for v, k in parts)
        remedy = {
            "jobs": "fewer --workers, or leave the largest layers out (target.skip)",
            "calibration": "shorter or fewer texts at once (--max-length, --batch-size)",
        }.get(parts[0][1], "a larger limit")
        raise UsageError(
            f"--max-memory: {words(limit)} is less than this run takes beside the program, {words(beside_program(plan))} ({shown}).{why and ' '}{why} Try {remedy}."
        )
    if out is not None:
        parent = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if plan.memory.get("disk", 0) > free:
            raise UsageError(
                f"{out}: this run writes {words(plan.memory['disk'])}, and {parent} has {words(free)} free. Name a folder on another disk."
            )
