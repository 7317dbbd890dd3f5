from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.data import fingerprint, load_texts
from eckart.errors import Refused

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t.strip())


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lists_go_through():
    assert load_texts(["a", "b"]) == ["a", "b"]
    assert load_texts(("a", "  ", "b")) == ["a", "b"]
    assert load_texts([[1, 2], np.array([3, 4]), (5,)]) == [[1, 2], [3, 4], [5]]


def test_text_file(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffone\r\n\n  \ntwo \u2028 still two\nthrée")
    assert load_texts(path) == load_texts(str(path)) == ["one", "two \u2028 still two", "thrée"]


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=6), st.booleans(), st.booleans())
def test_jsonl_round_trip(tmp_path_factory, texts, wrapped, ascii_only):
    lines = [json.dumps({"text": t, "id": 1} if wrapped else t, ensure_ascii=ascii_only) for t in texts]
    path = write(tmp_path_factory.mktemp("j"), "a.jsonl", "\n".join(lines) + "\n\n")
    assert load_texts(path) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', r"a\.jsonl:2: expected"),
        ("a.jsonl", '"x"\n\n{"body": "x"}\n', r"a\.jsonl:3: expected"),
        ("a.jsonl", '"x"\nplain words\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", "[1, 2]\n", r"a\.jsonl:1: expected"),
        ("a.txt", b"fine\nbad \xff byte\n", r"a\.txt:2: not UTF-8 \(byte 0xff\)"),
        ("a.txt", "\n  \n", "empty"),
        ("a.jsonl", '""\n{"text": " "}\n', "empty"),
        ("a.csv", "x\n", r"expected a \.txt"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, message):
    with pytest.raises(Refused, match=message):
        load_texts(write(tmp_path, name, content))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(Refused, match="does not exist"):
        load_texts("some inline text")
    with pytest.raises(Refused, match="is a folder"):
        load_texts(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "empty"),
        ([" ", ""], "blank"),
        ([[], []], "empty"),
        (["a", [1]], "mixed .*item 1"),
        ([[1], "a", "b"], "mixed .*item 1"),
        ([[1, -2]], "item 0.*-2"),
        ([[1], [1.5]], "item 1.*1.5"),
        ([[True]], "item 0.*True"),
        ([1, 2], "item 0.*int"),
        (7, "found int"),
        (b"text", "found bytes"),
    ],
)
def test_bad_lists_are_refused(source, message):
    with pytest.raises(Refused, match=message):
        load_texts(source)


def test_fingerprint_depends_on_everything():
    variants = [["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], [[1, 2], [3]], [[1], [2, 3]], [[12], [3]], ["1,2", "3"], ["\ud800"]]
    assert len({fingerprint(v) for v in variants}) == len(variants)
    assert fingerprint(["ab", "c"]) == fingerprint(["ab", "c"])
