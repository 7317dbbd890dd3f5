"""Checkpoints on disk: streamed in, streamed out, journalled, accounted for, verified. The only file-format code of the library.

Not promised: a source that is changed while it is read is noticed (by size, time or checksum), not prevented; checksums find damage, not a
forgery of files and manifest together; on Windows folders cannot be synced, so a power cut right after the commit may undo it.
"""

from .dtypes import name_of, torch_dtype
from .guard import check_output
from .header import Header, TensorInfo
from .layout import MAX_SHARD, Layout, TensorSpec, lay_out
from .manifest import Manifest, Row, account, copied, dropped, transformed
from .manifest_file import read_manifest
from .memory import Memory
from .reader import Reader
from .resume import finished
from .verify import VerifyReport, verify
from .writer import Writer

__all__ = [
    "MAX_SHARD",
    "Header",
    "Layout",
    "Manifest",
    "Memory",
    "Reader",
    "Row",
    "TensorInfo",
    "TensorSpec",
    "VerifyReport",
    "Writer",
    "account",
    "check_output",
    "copied",
    "dropped",
    "finished",
    "lay_out",
    "name_of",
    "read_manifest",
    "torch_dtype",
    "transformed",
    "verify",
]
