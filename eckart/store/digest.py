"""One pass over a weight file: its sha256 and that of every tensor in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..errors import Refused
from . import files
from .header import TensorInfo


def shard_digests(path: Path, tensors: Sequence[TensorInfo]) -> tuple[str, dict[str, str]]:
    """(sha256 of the file, {tensor: sha256}).

    Args:
        path: the file.
        tensors: in the order of their bytes, without gaps, up to the end of the file, as a checked header gives them.
    """
    whole = hashlib.sha256()
    each: dict[str, str] = {}
    with files.open_regular(path) as (fd, info):
        start = tensors[0].start if tensors else info.st_size
        end = tensors[-1].start + tensors[-1].nbytes if tensors else start
        if end != info.st_size:
            raise Refused(f"{path}: {info.st_size} bytes, expected {end}.")
        for piece in files.chunks(fd, 0, start, path.name):
            whole.update(piece)
        for tensor in tensors:
            digest = hashlib.sha256()
            for piece in files.chunks(fd, tensor.start, tensor.nbytes, path.name):
                whole.update(piece)
                digest.update(piece)
            each[tensor.name] = digest.hexdigest()
    return whole.hexdigest(), each
