"""A corpus of hostile files, made when they are needed. Each has a name, its bytes, and a piece of the refusal that it must meet."""

from __future__ import annotations

import json
import struct
from typing import Any

GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}


def pack(header: Any, data: int = 22, length: int | None = None) -> bytes:
    """A safetensors file; `header` is a value or the raw bytes of the JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": GOOD["a"] | changes}


def text(**fields: str) -> bytes:
    """{"a": {...}} with raw JSON in the fields."""
    fields = {"dtype": '"F32"', "shape": "[2,2]", "data_offsets": "[0,16]"} | fields
    return ('{"a":{' + ",".join(f'"{k}":{v}' for k, v in fields.items()) + "}}").encode()


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too few"),
    "seven bytes": (b"\x10" * 7, "too few"),
    "length only": (struct.pack("<Q", 16), "in a file of 8"),
    "length zero": (pack(b"", 0), "expected 2 to"),
    "length one": (pack(b"{", 10, 1), "expected 2 to"),
    "length of 2**64 - 1": (pack(GOOD, length=2**64 - 1), "expected 2 to 100000000"),
    "length of 2**63": (pack(GOOD, length=2**63), "expected 2 to 100000000"),
    "length over the limit": (pack(GOOD, length=100_000_001), "expected 2 to 100000000"),
    "length beyond the file": (pack(GOOD, length=5000), "damaged or incomplete"),
    "a zip file": (b"PK\x03\x04" + bytes(100), "damaged or incomplete"),
    "a pickle": (b"\x80\x04\x95\x1a\x00\x00\x00\x00" + bytes(100), "not a safetensors file"),
    "does not start with a brace": (pack(b' {"a":1}'), "does not start with"),
    "byte order mark": (pack(b"\xef\xbb\xbf{}", 0), "does not start with"),
    "a list": (pack(b"[1,2]", 0), "does not start with"),
    "cut off": (pack(json.dumps(GOOD).encode()[:-5]), "not valid JSON"),
    "text after it": (pack(json.dumps(GOOD).encode() + b"x"), "not valid JSON"),
    "not UTF-8": (pack(b'{"\xff":1}', 0), "not valid JSON"),
    "single quotes": (pack(b"{'a':1}", 0), "not valid JSON"),
    "a name twice": (
        pack(b'{"a":' + json.dumps(GOOD["a"]).encode() + b',"a":' + json.dumps(GOOD["a"]).encode() + b"}", 16),
        "'a' is given twice",
    ),
    "a key twice": (pack(text(dtype='"F32","dtype":"F32"'), 16), "'dtype' is given twice"),
    "metadata twice": (pack(b'{"__metadata__":{},"__metadata__":{}}', 0), "'__metadata__' is given twice"),
    "metadata is a list": (pack({"__metadata__": []}, 0), "expected an object"),
    "metadata with a number": (pack({"__metadata__": {"a": 1}}, 0), "expected a string"),
    "metadata nested": (pack({"__metadata__": {"a": {"b": "c"}}}, 0), "expected a string"),
    "entry is a number": (pack({"a": 1}, 0), "tensor 'a': expected an object"),
    "entry is null": (pack({"a": None}, 0), "tensor 'a': expected an object"),
    "no dtype": (pack({"a": {"shape": [2, 2], "data_offsets": [0, 16]}}, 16), "expected the keys"),
    "another key": (pack(entry(more=1), 16), "expected the keys"),
    "unknown dtype": (pack(entry(dtype="F7"), 16), "dtype 'F7' is not known"),
    "dtype in lower case": (pack(entry(dtype="f32"), 16), "is not known"),
    "dtype of half a byte": (pack(entry(dtype="F4"), 16), "is not known"),
    "dtype is a list": (pack(entry(dtype=["F32"]), 16), "expected a string"),
    "dtype of a megabyte": (pack(entry(dtype="F" * 10**6), 16), "expected a string"),
    "negative size": (pack(entry(shape=[-2, -2]), 16), "expected an integer in"),
    "size is a float": (pack(entry(shape=[2.0, 2]), 16), "expected an integer in"),
    "size is true": (pack(entry(shape=[True, 4]), 16), "expected an integer in"),
    "size is text": (pack(entry(shape=["4"]), 16), "expected an integer in"),
    "size is NaN": (pack(text(shape="[NaN]"), 16), "NaN is not JSON"),
    "size is infinite": (pack(text(shape="[1e999]"), 16), "expected an integer in"),
    "size of 2**64": (pack(entry(shape=[2**64]), 16), "expected an integer in"),
    "size of 5000 digits": (pack(text(shape="[" + "9" * 5000 + "]"), 16), "not valid JSON"),
    "product overflows to 4": (pack(entry(shape=[2**62, 4, 4]), 16), "2**63 or more"),
    "product overflows around a zero": (pack(entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), 0), "2**63 or more"),
    "a thousand dimensions": (pack(entry(shape=[1] * 1000, data_offsets=[0, 4]), 4), "1000 dimensions"),
    "shape is an object": (pack(entry(shape={"0": 2}), 16), "expected a list"),
    "shape asks for an exabyte": (pack(entry(shape=[2**58]), 16), "data_offsets give 16"),
    "offsets for an exabyte": (pack(entry(shape=[2**58], data_offsets=[0, 2**60]), 16), "the file has"),
    "one offset": (pack(entry(data_offsets=[16]), 16), "1 numbers, expected 2"),
    "three offsets": (pack(entry(data_offsets=[0, 8, 16]), 16), "3 numbers, expected 2"),
    "offsets backwards": (pack(entry(data_offsets=[16, 0]), 16), "data_offsets give -16"),
    "negative offset": (pack(entry(data_offsets=[-16, 0]), 16), "expected an integer in"),
    "offset is a float": (pack(text(data_offsets="[0, 16.0]"), 16), "expected an integer in"),
    "too few bytes": (pack(GOOD, 21), "damaged or incomplete"),
    "bytes after the last tensor": (pack(GOOD, 23), "damaged or incomplete"),
    "a hole at the start": (pack(entry(data_offsets=[4, 20]), 20), "leaves a hole"),
    "a hole": (pack(GOOD | {"b": GOOD["b"] | {"data_offsets": [18, 24]}}, 24), "'b' leaves a hole"),
    "an overlap": (pack(GOOD | {"b": GOOD["b"] | {"data_offsets": [10, 16]}}, 16), "overlaps"),
    "the same bytes twice": (pack(GOOD | {"c": GOOD["a"]}), "overlaps"),
    "an empty name": (pack({"": GOOD["a"]}, 16), "cannot be the name"),
    "a name with a newline": (pack({"a\nb": GOOD["a"]}, 16), "cannot be the name"),
    "a name with NUL": (pack({"a\0b": GOOD["a"]}, 16), "cannot be the name"),
    "a name with an escape sequence": (pack({"\x1b[2J": GOOD["a"]}, 16), "cannot be the name"),
    "a name of 2000 characters": (pack({"a" * 2000: GOOD["a"]}, 16), "at most 1024"),
    "a name with half a character": (pack(b'{"\\ud800":' + json.dumps(GOOD["a"]).encode() + b"}", 16), "name of a tensor"),
    "nested 10**5 deep": (pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0), "nested too deeply"),
    "a million lists": (pack(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}", 0), "objects and lists"),
    "a million objects": (pack(b'{"a":[' + b"{}," * 1_000_000 + b"{}]}", 0), "objects and lists"),
    "ten million numbers": (pack(b'{"a":[' + b"1," * 10_000_000 + b"1]}", 0), "values"),
    "a million keys": (pack(b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}", 0), "300000 tensors"),
}

PATHS = (
    "../model.safetensors", "..\\model.safetensors", "/etc/model.safetensors", "\\\\host\\share\\model.safetensors", "C:\\model.safetensors",
    "C:model.safetensors", "sub/model.safetensors", "sub\\model.safetensors", "./model.safetensors", "model.safetensors/", "..", ".", "", ".safetensors/..",
    "model.bin", "model.safetensors.bin", "model.SAFETENSORS", "model.safetensors\0", "a\0b.safetensors", "a\nb.safetensors", "con.safetensors", "NUL.safetensors",
    "a:stream.safetensors", "file:///etc/model.safetensors", "x" * 300 + ".safetensors", "model.safetensors ", "model.safetensors.", "a*.safetensors",
    5, None, True, ["model.safetensors"], {"a": "b"}, "\ud800.safetensors",
)  # fmt: skip


def index(weights: Any) -> bytes:
    return json.dumps({"metadata": {"total_size": 22}, "weight_map": weights}).encode()


INDEXES: dict[str, tuple[bytes, str]] = {
    **{f"file {path!r}"[:60]: (index({"a": path, "b": "model-1.safetensors"}), "file name|plain name") for path in PATHS},
    "not JSON": (b"{", "not valid JSON"),
    "a list": (b"[]", "expected an object"),
    "no map": (b"{}", "no weight_map"),
    "map is a list": (index([]), "expected an object"),
    "map is empty": (index({}), "0 tensors"),
    "a name twice": (b'{"weight_map":{"a":"model-1.safetensors","a":"model-2.safetensors"}}', "'a' is given twice"),
    "two maps": (b'{"weight_map":{"a":"x.safetensors"},"weight_map":{"a":"y.safetensors"}}', "'weight_map' is given twice"),
    "a bad name": (index({"a\nb": "model-1.safetensors"}), "cannot be the name"),
    "deep": (b'{"weight_map":' + b"[" * 999 + b"]" * 999 + b"}", "expected an object|nested too deeply"),
    "very deep": (b"[" * 10**6, "objects and lists"),
    "two million values": (b'{"weight_map":{"a":[' + b"1," * 2_000_000 + b"1]}}", "values"),
    "a missing file": (index({"a": "model-1.safetensors", "b": "model-9.safetensors"}), "cannot be read"),
    "a tensor that is elsewhere": (index({"a": "model-2.safetensors", "b": "model-1.safetensors"}), "should be in model-2"),
    "a tensor that is nowhere": (
        index({"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}),
        "found in no file",
    ),
    "a tensor it does not know": (index({"a": "model-1.safetensors"}), "'extra' of model-1"),
}
