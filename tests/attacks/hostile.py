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


def manifests() -> list[bytes]:
    """Good manifests: of copies, and with every kind of row and field."""
    from eckart.store.manifest import FileRow, Manifest, Row
    from eckart.store.manifest_file import encode

    sha, source = "0" * 64, {"id": "org/name@1", "fingerprint": "f" * 64, "tensors": 2, "bytes": 22}
    row = Row("a", "copied", ("a",), "", "F32", (2, 2), 16, sha)
    gone = Row("b", "dropped", ("b",), "not needed", "BF16", (3,), 6)
    pair = Row("b.up", "transformed", ("b", "a"), "", "BF16", (3, 1), 6, sha)
    full = Manifest(
        source, (row, pair), {"name": "svd", "axes": [1, 2.5, None, True, {"x": "y"}]}, 7, {"torch": "2"}, {"other": "x"}, {"job": {"error": 0.5}},
        {"plan": "p", "store.format": "1"}, {"config.json": FileRow(3, sha), "1_Pooling/config.json": FileRow(0, sha)}, {"a.py": "holds code"},
    )  # fmt: skip
    return [encode(Manifest(source, (row, gone))), encode(full)]


_BASE = "name: x\nverb: compress\n"
_LAUGHS = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10) if i else 'ha'}]\n" for i in range(12))
RECIPES: dict[str, tuple[str | bytes, str]] = {
    "a python object": (_BASE + "title: !!python/object/apply:os.system [echo]", r"line 3: cannot be read: the tag '.*os\.system'"),
    "a python name": (_BASE + "title: !!python/name:os.system", "the tag"),
    "a python module": (_BASE + "title: !!python/module:os", "the tag"),
    "a tag of its own": (_BASE + "title: !evil x", "the tag '!evil'"),
    "binary": (_BASE + "title: !!binary aGk=", "the tag"),
    "a set": (_BASE + "train: !!set {a}", "the tag"),
    "a bool that is none": (_BASE + "title: !!bool maybe", "the tag"),
    "an int that is none": (_BASE + "title: !!int ''", "the tag"),
    "a billion laughs": (_BASE + _LAUGHS + "metric: *l11", r"an alias \(\*name\)"),
    "a circle": (_BASE + "train: &t {a: *t}", "an alias"),
    "a merge key": (_BASE + "train: &t {a: 1}\n<<: {metric: identity}", "<<: a recipe has no such key"),
    "nested a thousand deep": (_BASE + "train: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
    "nested a thousand deep in blocks": (_BASE + "train:\n" + "".join(" " * i + "a:\n" for i in range(1, 300)), "nested too deeply"),
    "thirty thousand values": (_BASE + "train: [" + "1," * 30_000 + "]", "more than 20000 values"),
    "a megabyte": (_BASE + "title: " + "x" * 2**20, "expected at most 65536"),
    "a number of 5000 digits": (_BASE + "seed: " + "9" * 5000, "a number of 5000 characters"),
    "a number in base 60": (_BASE + "seed: " + "1" + ":59" * 2000, "a number of 6001 characters"),
    "a key twice": (_BASE + "name: y", "the key 'name' is given twice"),
    "a key twice, deep inside": (_BASE + "metric: {kind: identity, kind: both}", "the key 'kind' is given twice"),
    "a list as a key": (_BASE + "[1]: 2", "cannot be read"),
    "a mapping as a key": (_BASE + "{a: 1}: 2", "cannot be read"),
    "two documents": (_BASE + "---\n" + _BASE, "cannot be read"),
    "a date that is none": ("name: 2024-99-99\nverb: 3\n", "verb: a recipe needs it"),
    "control characters": (_BASE + "title: \x00", "cannot be read"),
    "not UTF-8": (_BASE.encode() + b"title: \xff", "cannot be read"),
    "half a character": (_BASE + "title: \ud800", "cannot be read"),
    "half a character, escaped": (_BASE + 'title: "\\ud800"', "characters that cannot be shown"),
    "an escape sequence": (_BASE + 'title: "\\e[2J"', "characters that cannot be shown"),
    "a quote that never ends": (_BASE + "title: 'x", "cannot be read"),
    "a later version": ("%YAML 9.9\n---\n" + _BASE, "cannot be read"),
    "empty": ("", "expected a mapping"),
    "a list": ("- name: x", "expected a mapping"),
    "text": ("compress", "expected a mapping"),
    "an unknown key": (_BASE + "metrics: identity", "Did you mean 'metric'"),
    "a number as a key": (_BASE + "5: 6", "expected a name of at most 100 characters, found 5"),
    "null as a key": (_BASE + "~: 6", "expected a name of at most 100 characters, found None"),
    "roles as a list": (_BASE + "roles: [train]", "roles"),
    "roles as text": (_BASE + "roles: train", "roles"),
    "train as text": (_BASE + "train: fast", "train"),
    "budget as text": (_BASE + "budget: much", "budget"),
    "budget with a list": (_BASE + "budget: {rank: [1]}", r"budget\.rank: expected a number"),
    "budget of NaN": (_BASE + "budget: {rank: .nan}", "NaN is no value"),
    "budget of infinity": (_BASE + "budget: {rank: .inf}", r"budget\.rank"),
    "budget with a number as a key": (_BASE + "budget: {5: 6}", "expected a name"),
    "a choice that is a number": (_BASE + "metric: 5", "metric: expected a mapping with `kind:`"),
    "a kind that is a list": (_BASE + "metric: {kind: [identity]}", "metric"),
    "a choice on another axis": (_BASE + "metric: {kind: pair}", r"metric\.kind: no metric is called 'pair'"),
    "a field that is a mapping": (_BASE + "metric: {kind: input_gram, power: {a: b}}", r"metric\.power"),
    "a field that is unknown": (_BASE + "metric: {kind: input_gram, powers: 1}", "Did you mean 'power'"),
    "a field with a number as a key": (_BASE + "metric: {kind: input_gram, 5: 1}", "expected a name"),
    "a long value in a wrong place": (_BASE + "metric: [" + "x, " * 9000 + "]", "metric: expected a mapping"),
    "a long kind": (_BASE + "metric: {kind: " + "x" * 9000 + "}", r"metric\.kind: no metric"),
    "a longer text": (_BASE + "metric: {kind: " + "x" * 40_000 + "}", "a text of 40000 characters"),
    "a long key": (_BASE + "x" * 900 + ": 1", "expected a name of at most 100 characters"),
    "a longer key": (_BASE + "x" * 40_000 + ": 1", "cannot be read"),
    "a title that is a list": (_BASE + "title: [a]", "title"),
    "a verb that is a number": ("name: x\nverb: 5\n", "verb: a recipe needs it"),
    "a name with a newline": ('name: "a\\nb"\nverb: compress\n', "name"),
    "fidelity that is none": (_BASE + "fidelity: perfect", "fidelity"),
}
