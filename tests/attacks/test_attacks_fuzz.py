"""Random damage and random structures: every parser answers with a result or with Refused, and with nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hostile import GOOD, PATHS, index, pack
from hypothesis import HealthCheck, example, given, settings

from eckart.errors import Refused
from eckart.store import Reader, TensorSpec, Writer, account, copied, journal, manifest_file
from eckart.store.header import Header, parse_header
from eckart.store.index import parse_index

quick = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "a", "", *map(str, PATHS)])
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=12
)
sizes = st.integers(-1, 8) | st.integers(2**31 - 1, 2**64)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "c", "__metadata__", "", "\n"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "F64", "BOOL", "X"]) | scalars,
            "shape": st.lists(sizes | scalars, max_size=4) | scalars,
            "data_offsets": st.lists(sizes, max_size=3) | scalars,
        },
        optional={"extra": scalars},
    )
    | anything,
    max_size=4,
)


def mutated(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for at, count, piece in edits:
        at %= len(data) + 1
        data = data[:at] + piece + data[at + count :]
    return data


edits = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.integers(0, 5),
        st.binary(max_size=5) | st.sampled_from([b'"', b"{", b"[", b"0", b",", b"\\u0000", b"-", b"e9"]),
    ),
    max_size=4,
)


def result(parse: Callable[..., Any], *args: Any) -> Any:
    """What a parser makes of it; None when it refuses in words that can be shown."""
    try:
        return parse(*args)
    except Refused as err:
        message = str(err)
    assert args[-1] in message or "manifest" in message
    assert len(message) < 2000
    return None


def check_header(data: bytes) -> None:
    found = result(parse_header, data, len(data), "f.safetensors")
    if found is None:
        return
    assert isinstance(found, Header)
    end = 8 + int.from_bytes(data[:8], "little")
    for tensor in found.tensors:
        assert tensor.start == end
        end += tensor.nbytes
    assert end == len(data)


@quick
@given(edits=edits)
@example(edits=[])
def test_damaged_headers(edits: list[tuple[int, int, bytes]]) -> None:
    check_header(mutated(pack(GOOD), edits))


@quick
@given(raw=st.binary(max_size=60), data=st.integers(0, 20), length=st.none() | st.integers(0, 2**64 - 1))
def test_random_headers(raw: bytes, data: int, length: int | None) -> None:
    check_header(pack(raw, data, length))
    check_header(raw)


@quick
@given(header=headers, data=st.integers(0, 64))
def test_headers_of_the_right_form(header: dict[str, Any], data: int) -> None:
    check_header(pack(json.dumps(header).encode(), data))


@quick
@given(header=headers, data=st.integers(0, 64))
def test_never_more_generous_than_the_package(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: int) -> None:
    """What we accept the reference accepts, with the same tensors."""
    from safetensors import deserialize

    raw = pack(json.dumps(header).encode(), data)
    found = result(parse_header, raw, len(raw), "f")
    assert found is None or {name: info["shape"] for name, info in deserialize(raw)} == {t.name: list(t.shape) for t in found.tensors}


@quick
@given(edits=edits)
def test_damaged_indexes(edits: list[tuple[int, int, bytes]]) -> None:
    check_index(mutated(index({"a": "model-1.safetensors", "b": "model-2.safetensors"}), edits))


@quick
@given(
    value=anything | st.dictionaries(st.text(max_size=5), st.sampled_from(PATHS) | anything, max_size=4).map(lambda m: {"weight_map": m})
)
def test_random_indexes(value: Any) -> None:
    check_index(json.dumps(value).encode())


def check_index(raw: bytes) -> None:
    for file in (result(parse_index, raw, "i.json") or {}).values():
        assert file.endswith(".safetensors")
        assert not set(file) & set("/\\:\0\n")
        assert Path("/x", file).resolve().parent == Path("/x")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "source").mkdir()
    (folder / "source" / "model.safetensors").write_bytes(pack(GOOD))
    reader = Reader(folder / "source")
    with Writer(folder / "out", [TensorSpec(n, reader.info(n).dtype, reader.info(n).shape) for n in "ab"], fingerprint={}) as writer:
        writer.copy("all", reader, ["a", "b"])
        return (writer.commit({}, account(reader, map(copied, "ab"))) / "eckart.json").read_bytes()


@quick
@given(edits=edits)
def test_damaged_manifests(manifest: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    raw = mutated(manifest, edits)
    assert (result(manifest_file.decode, raw, "eckart.json") is None) == (raw != manifest)


@quick
@given(data=st.data(), value=anything)
def test_manifests_that_are_signed_again(manifest: bytes, data: st.DataObject, value: Any) -> None:
    """Any value put anywhere into a manifest whose checksum is then made to hold."""
    import hashlib

    from eckart.store import _json

    top = json.loads(manifest)
    spot = top
    while True:
        key = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
        if not isinstance(spot[key], dict | list) or not spot[key] or data.draw(st.booleans()):
            spot[key] = value
            break
        spot = spot[key]
    try:
        top.pop("sha256", None)
        raw = _json.dump(top | {"sha256": hashlib.sha256(_json.dump(top)).hexdigest()})
    except ValueError:  # a value that JSON or UTF-8 cannot hold
        return
    result(manifest_file.decode, raw, "eckart.json")


@quick
@given(edits=edits)
def test_damaged_journals(tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, bytes]]) -> None:
    lines = [journal.encode(journal.Entry(job, {"t": "0" * 64}, {"rank": 1})) for job in "abc"]
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_bytes(mutated(b"".join(lines), edits))
    found, end = journal.replay(path)
    assert all(entry.job in "abc" for entry in found)
    assert b"".join(map(journal.encode, found)) == path.read_bytes()[:end]


@quick
@given(raw=st.binary(max_size=200))
def test_random_journals(raw: bytes) -> None:
    assert journal.decode(raw) is None
