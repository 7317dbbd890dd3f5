"""`convert`: pickles become safetensors with the same values, and what a pickle might do never happens."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eckart.cli import main
from eckart.errors import EckartError, Incomplete, Refused
from eckart.hub import unpickle
from eckart.store import Reader, read_manifest, verify
from eckart.verbs import convert as verb
from eckart.verbs.convert import convert


def llama(tied: bool = True) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=16, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def bert(**options: Any) -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertModel(BertConfig(**sizes, max_position_embeddings=8, **options))


def folder_of(folder: Path, model: Any, state: dict[str, torch.Tensor] | None = None, arch: str = "", **options: Any) -> Path:
    """A folder as transformers wrote it years ago."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [arch or type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict() if state is None else state, folder / "pytorch_model.bin", **options)
    return folder


def apart(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the process of its own does, in this one: (report, tensors)."""
    made = folder.with_name("made")
    report = unpickle.convert(folder, made)
    return report, {name: tensor for file in made.glob("*.safetensors") for name, tensor in load_file(file).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


class Evil:
    """Runs code when it is unpickled in full."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class TestValues:
    def test_tied_weights_are_stored_once_and_tied_again(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        state = {name: tensor.half() for name, tensor in llama().state_dict().items()}
        report, found = apart(folder_of(tmp_path / "old", llama(), state))
        assert report == {
            "model_class": "LlamaForCausalLM", "dtype": "float16", "kept_as": {"lm_head.weight": "model.embed_tokens.weight"}, "dropped": {},
        }  # fmt: skip
        assert equal(found, {name: tensor for name, tensor in state.items() if name != "lm_head.weight"})
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()

    def test_untied_weights_stay_two(self, tmp_path: Path) -> None:
        model = llama(tied=False)
        report, found = apart(folder_of(tmp_path / "old", model))
        assert (report["kept_as"], report["dropped"]) == ({}, {})
        assert equal(found, model.state_dict())

    def test_mixed_types_are_stored_exactly(self, tmp_path: Path) -> None:
        state = {n: t.bfloat16() if "norm" in n else t.half() for n, t in llama(tied=False).state_dict().items()}
        report, found = apart(folder_of(tmp_path / "old", llama(tied=False), state))
        assert report["dtype"] == "float32"
        assert equal(found, {name: tensor.float() for name, tensor in state.items()})

    def test_the_type_of_the_file_counts_and_not_that_of_the_config(self, tmp_path: Path) -> None:
        model = llama(tied=False)
        state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        model.config.dtype = torch.float32
        assert equal(apart(folder_of(tmp_path / "old", model, state))[1], state)

    def test_old_names_and_tensors_without_a_place(self, tmp_path: Path) -> None:
        model = bert()
        state = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in model.state_dict().items()
        }
        extra = {"embeddings.position_ids": torch.arange(8)[None], "cls.predictions.bias": torch.ones(20)}
        report, found = apart(folder_of(tmp_path / "old", model, state | extra))
        assert report["dropped"].keys() == extra.keys()
        assert "BertModel" in report["dropped"]["cls.predictions.bias"]
        assert {tuple(t.flatten().tolist()) for t in found.values()} == {tuple(t.flatten().tolist()) for t in state.values()}
        from transformers import BertModel

        again = BertModel.from_pretrained(tmp_path / "made")
        assert equal(dict(again.state_dict()), dict(model.state_dict()))

    def test_a_head_that_is_not_in_the_file(self, tmp_path: Path) -> None:
        report, found = apart(folder_of(tmp_path / "old", bert(), arch="BertForMaskedLM"))
        assert report["model_class"] == "BertModel"
        assert equal(found, bert().state_dict())
        assert json.loads((tmp_path / "made" / "config.json").read_text())["architectures"] == ["BertModel"]

    def test_shards_and_the_format_before_zip(self, tmp_path: Path) -> None:
        model = bert()
        folder = folder_of(tmp_path / "old", model)
        (folder / "pytorch_model.bin").unlink()
        names = sorted(model.state_dict())
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, part in parts.items():
            torch.save({n: model.state_dict()[n] for n in part}, folder / file, _use_new_zipfile_serialization=False)
        index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert equal(apart(folder)[1], model.state_dict())

    def test_a_result_that_differs_is_never_taken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import BertModel

        real = BertModel.save_pretrained

        def save(self: Any, made: Path, **options: Any) -> None:
            real(self, made, **options)
            tensors = load_file(made / "model.safetensors")
            tensors["pooler.dense.bias"][3] += 1
            save_file(tensors, made / "model.safetensors", {"format": "pt"})

        monkeypatch.setattr(BertModel, "save_pretrained", save)
        with pytest.raises(Refused, match="what was saved does not load as the model that was opened"):
            apart(folder_of(tmp_path / "old", bert()))


class TestRefused:
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("nested", [True, False])
    def test_pickles_that_need_code(self, tmp_path: Path, zipped: bool, nested: bool) -> None:
        proof = tmp_path / "it_ran"
        state: Any = {**bert().state_dict(), "evil": [Evil(proof)]} if nested else Evil(proof)
        folder = folder_of(tmp_path / "old", bert(), state, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            Refused, match=r"pytorch_model\.bin: opening it would run code \(posix\.system\), so it is not opened"
        ) as caught:
            unpickle.convert(folder, tmp_path / "made")
        assert "weights_only" not in str(caught.value), "torch's own advice is to switch the safety off"
        assert not proof.exists()
        torch.load(folder / "pytorch_model.bin", weights_only=False)
        assert proof.exists(), "without the safe loader it would have run"

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"model": {"w": torch.ones(2)}, "epoch": 3}, "expected named tensors and nothing else"),
            ([torch.ones(2)], "expected named tensors"),
            (torch.ones(2), "expected named tensors"),
            ({"w": torch.ones(2).to(torch.float8_e4m3fn)}, "found torch.float8_e4m3fn"),
            ({"w": torch.ones(2, dtype=torch.int8)}, "no floating-point tensor"),
            ({}, "no floating-point tensor"),
            ({"pooler.dense.bias": torch.ones(8)}, r"22 weights of BertModel are not in the file"),
        ],
    )
    def test_what_is_no_checkpoint(self, tmp_path: Path, state: Any, message: str) -> None:
        with pytest.raises(Refused, match=message):
            apart(folder_of(tmp_path / "old", bert(), state))

    def test_another_shape(self, tmp_path: Path) -> None:
        state = bert().state_dict() | {"pooler.dense.bias": torch.ones(9)}
        with pytest.raises(Refused, match=r"1 weights of BertModel have another shape.*pooler\.dense\.bias"):
            apart(folder_of(tmp_path / "old", bert(), state))

    @pytest.mark.parametrize("raw", [b"", b"x", b"PK\x03\x04", b"\x80\x02.", pickle.dumps({"a": 1}), b"PK\x05\x06" + bytes(18)])
    def test_damage(self, tmp_path: Path, raw: bytes) -> None:
        folder = folder_of(tmp_path / "old", bert())
        (folder / "pytorch_model.bin").write_bytes(raw)
        with pytest.raises(Refused, match=r"pytorch_model\.bin: (cannot be opened|expected named tensors)"):
            apart(folder)

    def test_half_a_file(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "old", bert())
        whole = (folder / "pytorch_model.bin").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(Refused, match=r"pytorch_model\.bin: cannot be opened"):
            apart(folder)

    def test_quantised_and_foreign_models(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "old", bert())
        config = json.loads((folder / "config.json").read_text())
        for change, message in (
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
            ({"model_type": "no_such_model"}, "does not know model_type 'no_such_model'"),
            ({"architectures": ["Own"], "auto_map": {"AutoModel": "code.Own"}}, "never runs code"),
        ):
            (folder / "code.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')")
            (folder / "config.json").write_text(json.dumps(config | change))
            with pytest.raises(Refused, match=message):
                apart(folder)
        assert not (tmp_path / "it_ran").exists()

    def test_nothing_is_started_and_nothing_is_opened_to_the_world(self) -> None:
        code = """
import os, pickle, socket, subprocess, sys
from eckart.hub.unpickle import forbid
forbid()
tries = (
    lambda: os.system("true"), lambda: subprocess.run([sys.executable, "-c", ""]), lambda: os.fork(), lambda: os.execv("/bin/true", ["true"]),
    lambda: os.posix_spawn("/bin/true", ["true"], {}), lambda: pickle.loads(b"cos\\nsystem\\n(S'true'\\ntR."),
    lambda: pickle._loads(b"cos\\nsystem\\n(S'true'\\ntR."), lambda: socket.create_connection(("127.0.0.1", 1)),
)
for act in tries:
    try:
        act()
    except PermissionError as error:
        assert "not allowed while pickles are opened" in str(error)
    else:
        sys.exit("it went through")
print(len(tries))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.stdout, done.returncode) == ("8\n", 0), done.stderr


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = folder_of(tmp_path / "old", bert())
    (folder / "tokenizer.json").write_text('{"a": "b"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit('this must never run')")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_command(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From a folder in which hostile modules lie: none of them is imported."""
    for name in ("json", "torch", "transformers", "sitecustomize", "eckart"):
        (old / f"{name}.py").write_text("raise SystemExit('this must never run')")
    before, times = tree(old), {p: p.stat().st_mtime_ns for p in old.rglob("*")}
    monkeypatch.chdir(old)
    main(["convert", ".", "-o", str(tmp_path / "new"), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["model_class"], shown["dtype"], shown["tensors"]) == ("BertModel", "float32", 23)
    assert set(shown["left_behind"]) == {"modeling.py", "json.py", "torch.py", "transformers.py", "sitecustomize.py", "eckart.py"}
    new = tmp_path / "new"
    assert equal(load_file(new / "model.safetensors"), bert().state_dict())
    assert verify(new).ok
    assert set(tree(new)) == {"config.json", "model.safetensors", "eckart.json", "tokenizer.json", "1_Pooling/config.json"}
    manifest = read_manifest(new)
    assert manifest.source["id"] == "old"
    assert manifest.count("copied") == len(manifest.rows) == 23
    assert set(manifest.inputs) == {"pytorch_model.bin"}
    assert manifest.records["convert"]["model_class"] == "BertModel"
    assert (tree(old), {p: p.stat().st_mtime_ns for p in old.rglob("*")}) == (before, times)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


def test_a_hostile_model_is_refused_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "old", bert(), {"evil": Evil(tmp_path / "it_ran")})
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(folder), "-o", str(tmp_path / "new"), "--quiet"])
    assert stop.value.code == 3
    assert "opening it would run code (posix.system)" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]


def standing_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Another program in the place of the process that opens pickles; it is given `staged`, `made` and `answer`."""
    head = "import json, os, pathlib, signal, sys\nstaged, made, answer = map(pathlib.Path, sys.argv[1:])\nmade.mkdir()\n"
    monkeypatch.setattr(verb, "_command", lambda *paths: [sys.executable, "-S", "-c", head + code, *map(str, paths)])


REPORT = {"model_class": "M", "dtype": "float32", "kept_as": {}, "dropped": {}}
WRITES = "(made / 'model.safetensors').write_bytes(bytes.fromhex(%r))\n(made / 'config.json').write_text('{}')\n"
ANSWERS = f"answer.write_text(json.dumps({{'report': {REPORT!r}}}))\n"


def tensors(tmp_path: Path, **values: torch.Tensor) -> str:
    save_file(values, tmp_path / "x", {"format": "pt"})
    raw = (tmp_path / "x").read_bytes()
    (tmp_path / "x").unlink()
    return raw.hex()


def test_what_the_process_sees(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and the config, and none of what else lies in the folder."""
    code = "assert sorted(os.listdir(staged)) == ['config.json', 'pytorch_model.bin'], os.listdir(staged)\nassert os.environ['HF_HUB_OFFLINE'] == '1'\n"
    standing_in(monkeypatch, code + WRITES % tensors(tmp_path, w=torch.ones(2)) + ANSWERS)
    found = convert(old, tmp_path / "new")
    assert (found.tensors, found.bytes, found.path) == (1, 8, tmp_path / "new")
    assert Reader(found.path).read("w").tolist() == [1, 1]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"ended by signal 9 and without an answer\. The whole model must fit into memory"),
        ("sys.exit('OSError: No space left on device')", r"exit code 1 and without an answer \('OSError: No space left on device'\)"),
        ("", "exit code 0 and without an answer"),
    ],
)
def test_a_process_that_ends_early(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    standing_in(monkeypatch, code)
    with pytest.raises(Incomplete, match=rf"{message}[\s\S]*Go on with: eckart convert .*old -o .*new") as caught:
        convert(old, tmp_path / "new")
    assert caught.value.exit_code == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize(
    "code",
    [
        ANSWERS,
        "(made / 'model.safetensors').write_bytes(b'\\xff' * 100)\n" + ANSWERS,
        "os.symlink('/etc/hostname', made / 'model.safetensors')\n" + ANSWERS,
        "(made / 'pytorch_model.bin').write_bytes(b'x')\n" + ANSWERS,
        "answer.write_text('{')", "answer.write_text('[' * 10**6)", "answer.write_text('[]')",
        "answer.write_text(json.dumps({'report': {}}))", "answer.write_text(json.dumps({'report': {'model_class': 1}}))",
        "answer.write_text(json.dumps({'report': {'model_class': 'a', 'dtype': 'b', 'kept_as': [], 'dropped': {}}}))",
    ],
)  # fmt: skip
def test_what_the_process_leaves_is_read_as_a_strangers(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    standing_in(monkeypatch, code)
    with pytest.raises(Refused):
        convert(old, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]


def test_an_existing_output_is_only_replaced_on_demand(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standing_in(monkeypatch, WRITES % tensors(tmp_path, w=torch.ones(2)) + ANSWERS)
    convert(old, tmp_path / "new")
    first = tree(tmp_path / "new")
    standing_in(monkeypatch, WRITES % tensors(tmp_path, w=torch.zeros(2)) + ANSWERS)
    with pytest.raises(Refused, match="exists and is not empty"):
        convert(old, tmp_path / "new")
    assert tree(tmp_path / "new") == first
    standing_in(monkeypatch, "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(Incomplete, match="--overwrite"):
        convert(old, tmp_path / "new", overwrite=True)
    assert tree(tmp_path / "new") == first
    standing_in(monkeypatch, WRITES % tensors(tmp_path, w=torch.zeros(2)) + ANSWERS)
    convert(old, tmp_path / "new", overwrite=True)
    assert Reader(tmp_path / "new").read("w").tolist() == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(Refused, match="not an output of eckart"):
        convert(old, tmp_path / "mine", overwrite=True)


def test_what_a_killed_run_left_is_cleared(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standing_in(monkeypatch, WRITES % tensors(tmp_path, w=torch.ones(2)) + ANSWERS)
    (tmp_path / "new.converting" / "made").mkdir(parents=True)
    (tmp_path / "new.converting" / "made" / "half.safetensors").write_bytes(b"x")
    convert(old, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]
    (tmp_path / "newer.converting").mkdir()
    (tmp_path / "newer.converting" / "thesis.txt").write_text("x")
    with pytest.raises(Refused, match=r"is not a folder of eckart \(it has thesis\.txt\)"):
        convert(old, tmp_path / "newer")
    assert (tmp_path / "newer.converting" / "thesis.txt").exists()


@pytest.mark.parametrize("at", [0, 3, 5, 40])
def test_a_disk_that_fails(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    from eckart.store import _os

    standing_in(monkeypatch, WRITES % tensors(tmp_path, w=torch.ones(2)) + ANSWERS)
    real, left = _os.pwrite, [at]

    def pwrite(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(_os, "pwrite", pwrite)
    if at < 40:
        with pytest.raises(Incomplete, match="No space left"):
            convert(old, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        monkeypatch.setattr(_os, "pwrite", real)
    convert(old, tmp_path / "new")
    assert verify(tmp_path / "new").ok
    assert not (tmp_path / "new.converting").exists()


def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", start)


def test_refusals_come_before_anything_is_opened(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_process(monkeypatch)
    out = tmp_path / "new"

    def refused(message: str, model: Any = old, target: Path = out) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(EckartError, match=message) as caught:
            convert(model, target)
        assert caught.value.exit_code == 3
        assert sorted(tmp_path.rglob("*")) == before

    refused("no such folder, and not the id", str(tmp_path / "nowhere"))
    refused("no such folder, and not the id", "../a/b")
    refused("found a file. Give the folder", old / "pytorch_model.bin")
    refused("lies in the source", target=old / "new")
    refused("is the source", target=old)
    refused("no such folder. Make it first", target=tmp_path / "a" / "b")
    (old / "pytorch_model.bin").rename(old / "model.pt")
    refused(r"has no pytorch_model\.bin.*model\.pt is not a file that transformers opens")
    (old / "model.pt").unlink()
    refused(r"has no pytorch_model\.bin and no pytorch_model\.bin\.index\.json\.$")
    os.mkfifo(old / "pytorch_model.bin")
    refused("expected a regular file")
    (old / "pytorch_model.bin").unlink()
    (tmp_path / "outside.bin").write_bytes(b"x")
    (old / "pytorch_model.bin").symlink_to(tmp_path / "outside.bin")
    refused("outside the folder")
    (old / "pytorch_model.bin").unlink()
    for path in ("../outside.bin", "/etc/hostname", "a.safetensors", "C:\\x.bin", "sub/x.bin", 5):
        (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": path}}))
        refused("plain name of a file that ends in .bin|file name")
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "missing.bin"}}))
    refused("cannot be read")
    (old / "pytorch_model.bin").write_bytes(b"x")
    (old / "config.json").write_text('{"a": 1, "a": 2}')
    refused("'a' is given twice")
    (old / "config.json").unlink()
    refused("has no config.json")
    save_file({"w": torch.ones(1)}, old / "model.safetensors")
    refused(r"has model\.safetensors\. eckart reads safetensors as they are: there is nothing to convert")


def test_hub_ids(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    (repository / "snapshots").mkdir()
    old.rename(repository / "snapshots" / ("c" * 40))
    standing_in(monkeypatch, WRITES % tensors(tmp_path, w=torch.ones(2)) + ANSWERS)
    found = convert("org/name", tmp_path / "new")
    assert read_manifest(found.path).source["id"] == "org/name@" + "c" * 40
    assert (found.path / "tokenizer.json").exists()
    with pytest.raises(Refused, match="not in the cache of the Hugging Face Hub"):
        convert("org/other", tmp_path / "newer")
