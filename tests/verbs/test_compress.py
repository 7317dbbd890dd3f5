"""`compress` end to end: folders and modules, every recipe, what is written, and what is refused before it is."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import eckart as ek
from eckart.axes import Budget, form
from eckart.axes.border import from_yaml
from eckart.errors import Refused, UsageError
from eckart.nn import LowRankLinear

NAMES = [n for n in ek.list_recipes("compress") if "pair" in ek.get_recipe(n).form.gives]
IDS = torch.arange(3, 35)[None]


def digests(folder, skip=("run.json", "report.html")):
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name not in skip
    }


def stored(folder) -> int:
    """Parameters of the pairs, counted from the file by somebody else's reader."""
    return sum(t.numel() for k, t in load_file(folder / "model.safetensors").items() if ".down.weight" in k or ".up.weight" in k)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_writes_a_folder_that_transformers_loads(name, tiny_llama, token_ids, tmp_path) -> None:
    before = digests(tiny_llama)
    made = ek.compress(tiny_llama, name, 0.6, calib=token_ids, out=tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(made.path).eval()
    pairs = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert pairs
    assert made.plan.after <= 0.6 * made.plan.before
    extra = sum(m.up.bias.numel() for m in pairs) if name in ("afm", "lord") else 0
    dense = sum(j.before for j in made.plan.jobs if j.state == "dense")
    assert stored(made.path) + dense <= made.plan.after <= stored(made.path) + dense + extra
    with torch.no_grad():
        again = ek.load(made.path)(IDS).logits
        assert torch.equal(model(IDS).logits, again)
        assert torch.isfinite(again).all()
    assert ek.verify(made.path, tiny_llama).ok
    assert digests(tiny_llama) == before


def test_in_memory_equals_on_disk_and_the_source_is_untouched(tiny_llama, token_ids, tmp_path) -> None:
    source = ek.load(tiny_llama)
    kept = {k: v.clone() for k, v in source.state_dict().items()}
    memory = ek.compress(source, "svd_llm", 0.5, calib=token_ids).model
    folder = ek.compress(tiny_llama, "svd_llm", 0.5, calib=token_ids, out=tmp_path / "a").path
    with torch.no_grad():
        assert torch.allclose(memory(IDS).logits, ek.load(folder)(IDS).logits, atol=1e-5)
    assert all(torch.equal(v, kept[k]) for k, v in source.state_dict().items())
    memory.save_pretrained(tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(memory(IDS).logits, ek.load(tmp_path / "b")(IDS).logits)


def test_module_written_as_folder_loads(tiny_llama, token_ids, tmp_path) -> None:
    made = ek.compress(ek.load(tiny_llama), "svd_llm", 0.5, calib=token_ids, out=tmp_path / "a")
    with torch.no_grad():
        other = ek.compress(tiny_llama, "svd_llm", 0.5, calib=token_ids).model(IDS).logits
        assert torch.allclose(ek.load(made.path)(IDS).logits, other, atol=1e-5)


def test_dense_form_loads_without_us_and_equals_the_pairs(tiny_llama, token_ids, tmp_path) -> None:
    pairs = ek.compress(tiny_llama, "svd_llm", 0.5, calib=token_ids).model
    dense = ek.compress(tiny_llama, "svd_llm", 0.5, calib=token_ids, form="dense", out=tmp_path / "dense").path
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    code = f"import torch; from transformers import AutoModelForCausalLM as A; torch.save; m = A.from_pretrained({str(dense)!r}).eval(); print(float(m(torch.arange(3, 35)[None]).logits.double().sum()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        assert float(out) == pytest.approx(float(pairs(IDS).logits.double().sum()), rel=1e-3)


def test_a_factored_folder_fails_loudly_without_eckart(tiny_llama, tmp_path) -> None:
    folder = ek.compress(tiny_llama, "svd", 0.5, out=tmp_path / "a").path
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "size mismatch" in found.stderr or "mismatch" in found.stderr.lower()


def test_same_bytes_with_one_and_two_workers_and_again(tiny_llama, token_ids, tmp_path) -> None:
    folders = [tmp_path / f"r{i}" for i in range(3)]
    for folder, workers in zip(folders, (1, 2, 1), strict=True):
        ek.compress(tiny_llama, "two_sided", 0.5, calib=token_ids, out=folder, workers=workers)
    assert digests(folders[0]) == digests(folders[1]) == digests(folders[2])


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("two_sided", {"settings": ["metric.into.ridge=0.01", "allocate.multiple=8"], "quantise": "int8"}),
        ("basis_sharing", {"settings": ["refine.inputs=propagated", "group.count=1"]}),
        ("svd_llm", {"settings": ["group.kind=same_input", "form.kind=shared_basis"]}),
        ("svd_llm", {"settings": ["recover.kind=factors", "recover.steps=2", "roles.up=train"]}),
        ("svd", {"form": "dense"}),
    ],
)
def test_the_yaml_in_the_output_reproduces_it(recipe, options, tiny_llama, token_ids, tmp_path) -> None:
    """Every file but clocks: from the recipe file alone, on the same text."""
    one = ek.compress(tiny_llama, recipe, 0.6, calib=token_ids, out=tmp_path / "a", **options)
    again = from_yaml((one.path / "eckart.yaml").read_text())
    two = ek.compress(tiny_llama, again, calib=token_ids, out=tmp_path / "b")
    assert digests(one.path) == digests(two.path)


def test_statistics_are_kept_in_a_file_and_refused_for_other_data(tiny_llama, token_ids, tmp_path) -> None:
    file = tmp_path / "stats.safetensors"
    one = ek.compress(tiny_llama, "svd_llm", 0.5, calib=token_ids, stats=file, out=tmp_path / "a")
    two = ek.compress(tiny_llama, "svd_llm", 0.5, calib=token_ids, stats=file, out=tmp_path / "b")
    assert digests(one.path) == digests(two.path)
    with pytest.raises(Refused, match="other calibration data"):
        ek.compress(tiny_llama, "svd_llm", 0.5, calib=token_ids[:-1], stats=file)


def test_full_size_copies_every_byte(tiny_llama, tmp_path) -> None:
    folder = ek.compress(tiny_llama, "svd", 1.0, out=tmp_path / "a").path
    assert (folder / "model.safetensors").read_bytes()[8:] != b""
    ours, theirs = load_file(folder / "model.safetensors"), load_file(tiny_llama / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_rank_above_break_even_stays_dense_and_the_report_says_so(tiny_llama, tmp_path) -> None:
    made = ek.compress(tiny_llama, "svd", settings=["budget.rank=20"], out=tmp_path / "a")
    states = {j.name: j.state for j in made.plan.jobs}
    assert states["model.layers.0.self_attn.k_proj"] == "dense"  # 24 x 48: a pair of rank 20 would be larger
    assert states["model.layers.0.mlp.up_proj"] == "factored"
    assert any("stay dense" in w for w in made.report["warnings"])


def test_ranks_that_are_too_small_for_a_multiple_are_named(tiny_llama) -> None:
    made = ek.compress(tiny_llama, "svd", 0.5, settings=["allocate.multiple=12"], dry_run=True)
    odd = {j.name for j in made.plan.jobs if j.rank is not None and j.rank % 12}
    said = next(w for w in made.report["warnings"] if "no multiple of 12" in w)
    assert said.startswith(f"{len(odd)} matrices")
    assert 0 < len(odd) < len(made.plan.jobs)
    fits = ek.compress(tiny_llama, "svd", 0.5, settings=["allocate.multiple=4"], dry_run=True)
    assert not any("multiple" in w for w in fits.report["warnings"])


def test_dry_run_reads_no_tensor_and_writes_nothing(tiny_llama, token_ids, tmp_path, monkeypatch) -> None:
    from eckart.store import Reader

    monkeypatch.setattr(Reader, "read", lambda *a, **k: pytest.fail("a tensor was read"))
    made = ek.compress(tiny_llama, "two_sided", 0.5, calib=token_ids, out=tmp_path / "a", dry_run=True)
    assert made.plan.decides == "spectra"
    assert all(j.rank is None and j.state == "undecided" for j in made.plan.jobs)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_with_spectra_decides_ranks(tiny_llama, token_ids) -> None:
    made = ek.compress(tiny_llama, "two_sided", 0.5, calib=token_ids, dry_run="spectra")
    assert all(j.state in ("factored", "dense") for j in made.plan.jobs)
    assert made.plan.after <= 0.5 * made.plan.before


def test_plain_module_with_tensors() -> None:
    g = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16, bias=False))
    rows = [torch.randn(20, 32, generator=g) for _ in range(4)]
    made = ek.compress(net, "afm", 0.5, calib=rows)
    assert isinstance(made.model[2], LowRankLinear)
    assert made.model[2].up.bias is not None
    x = torch.cat(rows)
    with torch.no_grad():
        assert torch.allclose(made.model[0](x).mean(0), net[0](x).mean(0), atol=1e-5)


def test_a_mix_that_no_paper_has(tiny_llama, token_ids) -> None:
    mixed = ek.get_recipe("svd_llm").with_(allocate=ek.allocate.WaterFill(), form=form.Pair(balance="left"), budget=Budget(keep=0.5))
    made = ek.compress(tiny_llama, mixed, calib=token_ids)
    assert made.plan.after <= 0.5 * made.plan.before


def test_killed_and_resumed_gives_the_same_bytes(tiny_llama, token_ids, tmp_path, monkeypatch) -> None:
    whole = ek.compress(tiny_llama, "svd_llm", 0.5, calib=token_ids, out=tmp_path / "whole").path
    from eckart.store import Writer

    put, calls = Writer.put, []

    def dying(self, *args, **kwargs):
        calls.append(args[0])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return put(self, *args, **kwargs)

    monkeypatch.setattr(Writer, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        ek.compress(tiny_llama, "svd_llm", 0.5, calib=token_ids, out=tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    calls.clear()
    monkeypatch.setattr(Writer, "put", lambda self, *a, **k: (calls.append(a[0]), put(self, *a, **k))[1])
    again = ek.compress(tiny_llama, "svd_llm", 0.5, calib=token_ids, out=tmp_path / "resumed").path
    assert len(calls) == 14 - 4  # what was finished is not done again
    assert digests(again) == digests(whole)


def damaged(source, target, key, value):
    target.mkdir()
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    if value is None:
        del tensors[key]
    else:
        tensors[key][0, 0] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named_before_anything_is_measured(value, tiny_llama, token_ids, tmp_path, monkeypatch) -> None:
    bad = damaged(tiny_llama, tmp_path / "bad", KEY, value)
    monkeypatch.setattr("eckart.verbs.calibrate.collect", lambda *a, **k: pytest.fail("statistics were collected"))
    with pytest.raises(Refused, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of 3840 values are NaN or Inf"):
        ek.compress(bad, "svd_llm", 0.5, calib=token_ids, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_weight_is_named(tiny_llama, tmp_path) -> None:
    bad = damaged(tiny_llama, tmp_path / "bad", KEY, None)
    with pytest.raises(Refused, match=r"model\.layers\.1\.mlp\.up_proj.*not in the checkpoint"):
        ek.compress(bad, "svd", 0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"recipe": "svdllm"}, UsageError, "Did you mean 'svd_llm'"),
        ({"recipe": "effective_rank"}, UsageError, "is a measure, not a recipe"),
        ({"keep": 0.0}, UsageError, r"expected a share in \(0, 1\]"),
        ({"keep": 1.2}, UsageError, r"expected a share in \(0, 1\]"),
        ({"keep": 0.001}, UsageError, "out of reach; rank 1 everywhere already stores"),
        ({"keep": 0.5, "settings": ["budget.rank=3"]}, UsageError, "two budgets"),
        ({"settings": ["budget.rank=0"]}, UsageError, "at least 1"),
        ({"settings": ["budget.rank=49"]}, UsageError, "49 is above every target"),
        ({"settings": ["metric.powr=1"]}, UsageError, "Did you mean 'power'"),
        ({"settings": ['target.skip=["layers"]']}, UsageError, "no matrix is targeted"),
        ({"recipe": "svd_llm", "calib": None}, UsageError, "Give --calib FILE"),
        ({"calib": []}, Refused, "empty"),
        ({"calib": "nowhere.txt"}, Refused, "nowhere.txt"),
        ({"form": "sparse"}, UsageError, "expected 'factored' or 'dense'"),
        ({"form": "dense", "settings": ["form.layout=factored"]}, UsageError, "contradict each other"),
        ({"seed": -1}, UsageError, "seed"),
    ],
)
def test_bad_calls_are_refused_before_work_starts(arguments, error, message, tiny_llama, token_ids, tmp_path) -> None:
    call = {"recipe": "svd_llm", "calib": token_ids, "out": tmp_path / "out", **arguments}
    with pytest.raises(error, match=message):
        ek.compress(tiny_llama, **call)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_would_destroy_something_are_refused(tiny_llama, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    for out in (tiny_llama, tiny_llama.parent, tiny_llama / "inside", tmp_path / "full"):
        with pytest.raises(Refused):
            ek.compress(tiny_llama, "svd", 0.5, out=out)
    assert (tmp_path / "full" / "precious.txt").read_text() == "mine"


def test_pickled_checkpoints_are_refused_with_a_way_out(tiny_llama, tmp_path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(Refused, match="eckart convert"):
        ek.compress(tmp_path / "pickled", "svd", 0.5)


def test_a_compressed_folder_is_not_compressed_again(tiny_llama, tmp_path) -> None:
    folder = ek.compress(tiny_llama, "svd", 0.5, out=tmp_path / "a").path
    with pytest.raises(Refused, match="already quantised or factored"):
        ek.compress(folder, "svd", 0.5)
