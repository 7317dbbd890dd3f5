"""Adapters that are initialised from the checkpoint alone: the same bytes as from the model in memory, and the command that makes them."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

import eckart as ek
from eckart.cli import main
from eckart.errors import Refused, UsageError
from eckart.hub.peft.offline import initialise


@pytest.fixture
def folder(tiny, tmp_path):
    """A checkpoint of each kind, by name."""

    def make(kind: str):
        where = tmp_path / kind
        if not where.exists():
            tiny(kind).save_pretrained(where, max_shard_size="20KB")
        return where

    return make


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "recipe",
    ["pissa", "soma", "osf", "kasa", "lora", "svfit", "clip_svd", "salt", "soka", "loldu", "nlora", "flora", "kind", "householder"],
)
def test_same_bytes_as_in_memory(kind, recipe, folder, tmp_path) -> None:
    rank = None if recipe in ("osf", "svfit", "clip_svd", "soka") else 3
    initialise(folder(kind), recipe, rank, out=tmp_path / "a", seed=5)
    ek.adapt(ek.load(folder(kind)), recipe, rank=rank, seed=5).save_pretrained(tmp_path / "b")
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab"]
    from safetensors.torch import load

    one, two = map(load, files)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in "ab"]
    for key in ("recipe", "ranks", "splits", "probe", "alpha", "asked", "seed"):
        assert configs[0][key] == configs[1][key], key


def test_it_loads_trains_and_merges(folder, logits, tiny, tmp_path) -> None:
    made = initialise(folder("llama"), "pissa", 3, out=tmp_path / "a")
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path / "a", is_trainable=True)
    assert torch.equal(logits(model), logits(tiny("llama")))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == made.trained
    assert made.total == sum(p.numel() for p in tiny("llama").parameters())


def test_no_model_is_built_for_recipes_without_data(folder, tmp_path, monkeypatch) -> None:
    from eckart.verbs.host import FolderHost

    def refuse(self):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(FolderHost, "live", refuse)
    initialise(folder("llama"), "pissa", 3, out=tmp_path / "a")


def test_statistics_of_a_folder(folder, tmp_path) -> None:
    texts = [list(range(3, 40))] * 3
    initialise(folder("llama"), "corda", 3, out=tmp_path / "a", calib=texts, variant="kpm")
    ek.adapt(ek.load(folder("llama")), "corda", rank=3, calib=texts, variant="kpm").save_pretrained(tmp_path / "b")
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in two)


class TestCache:
    def test_a_hit_gives_the_bytes_of_a_miss_and_smaller_ranks_are_cut(self, folder, tmp_path) -> None:
        def run(name: str, rank: int, cache: str | None) -> bytes:
            initialise(folder("llama"), "pissa", rank, out=tmp_path / name, cache=cache and tmp_path / cache)
            return (tmp_path / name / "adapter_model.safetensors").read_bytes()

        miss, hit = run("a", 3, "c"), run("b", 3, "c")
        assert miss == hit
        assert run("d", 3, "another") == miss
        big = run("e", 6, "c")
        from safetensors.torch import load

        one, two = load(hit), load(big)
        assert all(torch.equal(one[k], two[k][:, :3] if "left" in k else two[k][:3]) for k in one)
        exact = load(run("f", 3, None))
        assert all(torch.allclose(exact[k], one[k], atol=1e-4) for k in one)
        assert len(list((tmp_path / "c").rglob("*.safetensors"))) == 14

    def test_other_bases_do_not_meet_and_damage_is_named(self, folder, tmp_path, tiny) -> None:
        initialise(folder("llama"), "pissa", 3, out=tmp_path / "a", cache=tmp_path / "c")
        other = tiny("llama")
        with torch.no_grad():
            other.model.layers[0].self_attn.q_proj.weight.mul_(2)
        other.save_pretrained(tmp_path / "other")
        initialise(tmp_path / "other", "pissa", 3, out=tmp_path / "b", cache=tmp_path / "c")
        assert len(list((tmp_path / "c").iterdir())) == 2
        for file in (tmp_path / "c").rglob("*.safetensors"):
            file.write_bytes(b"no safetensors")
        with pytest.raises(Refused, match="cannot be read .* Delete it, and it is made again"):
            initialise(tmp_path / "other", "pissa", 3, out=tmp_path / "d", cache=tmp_path / "c")

    def test_recipes_that_need_other_triples_do_not_use_it(self, folder, tmp_path) -> None:
        for recipe in ("soma", "osf", "lora"):
            initialise(folder("llama"), recipe, None if recipe == "osf" else 3, out=tmp_path / recipe, cache=tmp_path / "c")
        assert not (tmp_path / "c").exists()


class TestOutput:
    def test_nothing_is_left_of_a_refused_run(self, folder, tmp_path) -> None:
        source = folder("llama")
        before = sorted(p.name for p in tmp_path.iterdir())
        with pytest.raises(UsageError, match="rank 40 is above the layer"):
            initialise(source, "pissa", 40, out=tmp_path / "a")
        assert sorted(p.name for p in tmp_path.iterdir()) == before

    def test_existing_folders(self, folder, tmp_path) -> None:
        source = folder("llama")
        initialise(source, "pissa", 2, out=tmp_path / "a")
        with pytest.raises(Refused, match="exists and is not empty"):
            initialise(source, "pissa", 2, out=tmp_path / "a")
        initialise(source, "pissa", 3, out=tmp_path / "a", overwrite=True)
        assert set(json.loads((tmp_path / "a" / "adapter_config.json").read_text())["ranks"].values()) == {3}
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("x")
        with pytest.raises(Refused, match="exists and is not empty"):
            initialise(source, "pissa", 2, out=tmp_path / "mine", overwrite=True)
        with pytest.raises(Refused, match="is the source|lies in the source"):
            initialise(source, "pissa", 2, out=source, overwrite=True)


class TestCommand:
    def run(self, *argv: object) -> int:
        try:
            main([str(a) for a in argv])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    def test_initialise_and_export(self, folder, tmp_path, capsys) -> None:
        assert self.run("adapt", folder("llama"), "--recipe", "pissa", "--rank", 3, "--init-only", "-o", tmp_path / "a", "--quiet") == 0
        assert capsys.readouterr().out.strip() == f"adapter: {tmp_path / 'a'}"
        assert self.run("export-lora", tmp_path / "a", "-o", tmp_path / "lora", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert set(found["ranks"].values()) == {6}
        assert found["logits"] < 1e-5

    def test_json(self, folder, tmp_path, capsys) -> None:
        assert self.run("adapt", folder("llama"), "--recipe", "svfit", "--rank", 2, "--init-only", "-o", tmp_path / "a", "--json") == 0
        assert json.loads(capsys.readouterr().out)["trained"] == 14 * 2

    @pytest.mark.parametrize(
        ("argv", "code", "message"),
        [
            (["--init-only"], 2, "adapt writes a folder: give -o OUT"),
            (["-o", "x"], 2, r"adapt either trains (--data FILE) or initialises (--init-only)"),
            (["--init-only", "--data", "t.txt", "-o", "x"], 2, "give one of them"),
            (["--init-only", "--compare", "a,b", "-o", "x"], 2, "--compare trains every recipe"),
            (["--data", "none.txt", "--cache", "c", "-o", "x"], 2, "--cache serves --init-only"),
            (["--data", "none.txt", "-o", "x"], 3, "none.txt"),
            (["--data", "none.txt", "--steps", "0", "-o", "x"], 2, "steps: expected at least 1, found 0"),
            (["--data", "none.txt", "--lr", "-1", "-o", "x"], 2, "lr: expected a positive number"),
            (["--recipe", "nothing", "--init-only", "-o", "x"], 2, "there is no system 'nothing'"),
            (["--recipe", "corda", "--init-only", "-o", "x"], 2, "corda measures moments"),
        ],
    )
    def test_refusals(self, folder, tmp_path, capsys, monkeypatch, argv, code, message) -> None:
        source = folder("llama")
        monkeypatch.chdir(tmp_path)
        assert self.run("adapt", source, *argv) == code
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
