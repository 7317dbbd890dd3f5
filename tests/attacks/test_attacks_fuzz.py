"""Random damage and random structures: every parser answers with a result or with Refused, and with nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hostile import GOOD, HEADERS, INDEXES, PATHS, RECIPES, index, manifests, pack
from hypothesis import HealthCheck, example, given, settings
from parsers import PARSERS, answer

from eckart.store import journal, manifest_file
from eckart.store.header import parse_header

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


@quick
@given(edits=edits)
@example(edits=[])
def test_damaged_headers(edits: list[tuple[int, int, bytes]]) -> None:
    PARSERS["header"](b"\0" + mutated(pack(GOOD), edits))


@quick
@given(raw=st.binary(max_size=60), data=st.integers(0, 20), length=st.none() | st.integers(0, 2**64 - 1))
def test_random_headers(raw: bytes, data: int, length: int | None) -> None:
    PARSERS["header"](b"\0" + pack(raw, data, length))
    PARSERS["header"](raw)


@quick
@given(header=headers, data=st.integers(0, 64))
def test_headers_of_the_right_form(header: dict[str, Any], data: int) -> None:
    PARSERS["header"](b"\0" + pack(json.dumps(header).encode(), data))


@quick
@given(header=headers, data=st.integers(0, 64))
def test_never_more_generous_than_the_package(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: int) -> None:
    """What we accept the reference accepts, with the same tensors."""
    from safetensors import deserialize

    raw = pack(json.dumps(header).encode(), data)
    found = answer(parse_header, raw, len(raw), "f")
    assert found is None or {name: info["shape"] for name, info in deserialize(raw)} == {t.name: list(t.shape) for t in found.tensors}


@quick
@given(edits=edits)
def test_damaged_indexes(edits: list[tuple[int, int, bytes]]) -> None:
    PARSERS["index"](b"\0" + mutated(index({"a": "model-1.safetensors", "b": "model-2.safetensors"}), edits))


@quick
@given(
    value=anything | st.dictionaries(st.text(max_size=5), st.sampled_from(PATHS) | anything, max_size=4).map(lambda m: {"weight_map": m})
)
def test_random_indexes(value: Any) -> None:
    PARSERS["index"](b"\0" + json.dumps(value).encode())


@pytest.fixture(scope="module")
def manifest() -> bytes:
    return manifests()[0]


@quick
@given(edits=edits)
def test_damaged_manifests(manifest: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    raw = mutated(manifest, edits)
    assert (answer(manifest_file.decode, raw, "eckart.json") is None) == (raw != manifest)


@quick
@given(data=st.data(), value=anything)
def test_manifests_that_are_signed_again(manifest: bytes, data: st.DataObject, value: Any) -> None:
    """Any value put anywhere into a manifest whose checksum is then made to hold."""
    top = json.loads(manifest)
    spot = top
    while True:
        key = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
        if not isinstance(spot[key], dict | list) or not spot[key] or data.draw(st.booleans()):
            spot[key] = value
            break
        spot = spot[key]
    PARSERS["manifest"](b"\1" + json.dumps(top).encode())


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


@quick
@given(value=st.lists(anything, max_size=3))
def test_journals_whose_checksums_hold(value: list[Any]) -> None:
    PARSERS["journal"](b"\1" + b"\n".join(json.dumps(line).encode() for line in value))


GOOD_RECIPE = (
    b"name: x\nverb: compress\nmetric: {kind: input_gram, power: 0.5}\nbudget: {keep: 0.8}\nroles: {left: train}\ntrain: {lr: 1.0e-3}\n"
)


@quick
@given(edits=edits)
def test_damaged_recipes(edits: list[tuple[int, int, bytes]]) -> None:
    PARSERS["recipe"](mutated(GOOD_RECIPE, edits))


@quick
@given(value=anything, key=st.sampled_from(["name", "title", "metric", "budget", "roles", "train", "form", "target", "penalty", "refresh"]))
@example(value={"\xa0": None}, key="budget")
@example(value={"\xa0": {"kind": "freeze"}}, key="roles")
@example(value={"kind": "linears", "\xa0": 1}, key="target")
def test_recipes_with_any_value_anywhere(value: Any, key: str) -> None:
    PARSERS["recipe"](json.dumps({"name": "x", "verb": "compress", key: value}).encode())


CORPUS = {
    "header": [raw for raw, _ in HEADERS.values()],
    "index": [raw for raw, _ in INDEXES.values()],
    "manifest": manifests(),
    "journal": [journal.encode(journal.Entry("a", {"t": "0" * 64}, {"rank": 1}))],
    "recipe": [raw if isinstance(raw, bytes) else raw.encode("utf-8", "replace") for raw, _ in RECIPES.values()],
}


@pytest.mark.parametrize("parser", PARSERS)
def test_the_corpus_and_everything_that_was_found(parser: str) -> None:
    for raw in CORPUS[parser]:
        if len(raw) < 1 << 20:
            for mode in (b"", b"\0", b"\1", b"\3"):
                PARSERS[parser](mode + raw)
    for file in sorted((Path(__file__).parent / "found").glob(f"{parser}-*")):
        PARSERS[parser](file.read_bytes())
