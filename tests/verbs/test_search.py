"""`search` against what its candidates lose when they are made one by one and judged by a loop of our own; its promises of bytes, budget and safety."""

import hashlib
import json
import random
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

import eckart as ek
from eckart.axes import target
from eckart.axes.border import from_yaml, to_yaml
from eckart.cli import main
from eckart.errors import Refused, UsageError
from eckart.report.check import check
from eckart.runners import trial
from eckart.runners.judge import Judge
from eckart.verbs import calibrate, search_folder
from eckart.verbs import search as verb
from eckart.verbs.candidates import affordable, grid, ladder, spent

FEW = ["svd", "two_sided", "svd_llm", "asvd"]


def tree(folder, skip=("run.json", "report.html", "search.html")):
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in folder.rglob("*")
        if f.is_file() and f.name not in skip
    }


def cross_entropy(model, texts) -> float:
    with torch.no_grad():
        found = [functional.cross_entropy(model(torch.tensor([t])).logits[0, :-1], torch.tensor(t[1:]), reduction="sum") for t in texts]
    return float(sum(found)) / sum(len(t) - 1 for t in texts)


@pytest.fixture(scope="module")
def taught(tiny_llama, token_ids):
    """A Llama that has learnt its text, so that a metric matters."""
    model = ek.load(tiny_llama)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.tensor(token_ids)
        for _ in range(60):
            optimiser.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimiser.step()
    return model.eval()


def test_losses_are_those_of_candidates_made_one_by_one(taught, token_ids) -> None:
    fit, held = [t for i, t in enumerate(token_ids) if i % 4 != 3], token_ids[3::4]
    found = ek.search(taught, [0.7, 0.3], calib=token_ids, recipes=FEW, batch_size=2)
    assert found.dense == pytest.approx(cross_entropy(taught, held), rel=1e-5)
    assert [r.candidates for r in ladder(4, 5)] == [4, 2, 2]
    for size in (0.7, 0.3):
        rows = {r.recipe: r for r in found.rows if r.keep == size}
        for name, row in rows.items():
            alone = ek.compress(taught, name, size, calib=fit, batch_size=2)
            assert row.loss == pytest.approx(cross_entropy(alone.model, held[: 2 * row.batches]), rel=1e-4)
            assert row.stored == pytest.approx(alone.plan.after / alone.plan.before)
        last = [r for r in rows.values() if r.rung == 3]
        assert len(last) == 2
        assert all(r.batches == 5 for r in last)
        best = min(last, key=lambda r: r.loss)
        assert (found.winners[size].name, found.winners[size].budget.keep) == (best.recipe, size)
        first = sorted(FEW, key=lambda n: cross_entropy(ek.compress(taught, n, size, calib=fit, batch_size=2).model, held[:4]))
        assert {r.recipe for r in last} == set(first[:2])


def test_measured_mixes_are_cut_as_compress_cuts_them(taught, token_ids) -> None:
    fit, held = [t for i, t in enumerate(token_ids) if i % 4 != 3], token_ids[3::4]
    mixes = [r for r in grid() if r.score.kind == "measured_loss"]
    assert {r.refine is None for r in mixes} == {r.group is None for r in mixes} == {True, False}
    assert len({r.metric for r in mixes}) == 3
    found = ek.search(taught, [0.7, 0.3], calib=token_ids, recipes=mixes, batch_size=8)
    assert len(found.rows) == 2 * len(mixes)
    for row in found.rows:
        recipe = next(r for r in mixes if r.name == row.recipe)
        alone = ek.compress(taught, recipe, row.keep, calib=fit, batch_size=8)
        assert row.stored == pytest.approx(alone.plan.after / alone.plan.before)
        assert row.loss == pytest.approx(cross_entropy(alone.model, held[: 8 * row.batches]), rel=1e-4)


def test_the_distance_from_the_original_is_a_goal(taught, token_ids) -> None:
    fit, held = [t for i, t in enumerate(token_ids) if i % 4 != 3], token_ids[3::4]
    found = ek.search(taught, 0.5, calib=token_ids, recipes=["svd_llm"], goal="original")
    small = ek.compress(taught, "svd_llm", 0.5, calib=fit).model
    with torch.no_grad():
        p, q = (m(torch.tensor(held)).logits.log_softmax(-1).double() for m in (taught, small))
    assert found.dense == pytest.approx(0, abs=1e-6)
    assert found.rows[0].loss == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_the_frontier_is_what_nothing_beats() -> None:
    draw = random.Random(0)
    for _ in range(50):
        rows = [verb.Row(0.5, str(i), draw.randrange(6) / 6, draw.randrange(6) / 6, 1, 1) for i in range(12)]
        run = verb.Searching(
            None, [ek.get_recipe("svd").with_(name=str(i)) for i in range(12)], [0.5], [], 1, None, "task", 0, 1, "cpu", climbed=1
        )
        run.table = {(r.keep, r.recipe): r for r in rows}
        beaten = {
            b.recipe for a in rows for b in rows if (a.stored <= b.stored and a.loss < b.loss) or (a.stored < b.stored and a.loss <= b.loss)
        }
        assert {r.recipe for r in run.frontier()} == {r.recipe for r in rows} - beaten


@pytest.mark.parametrize("batches", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("candidates", [1, 2, 3, 5, 24])
def test_ladders_end_on_all_of_the_text_within_the_budget(candidates, batches) -> None:
    rungs = ladder(candidates, batches)
    assert rungs[0].candidates == candidates
    assert rungs[-1].batches == batches
    assert all(a.batches < b.batches and a.candidates >= b.candidates for a, b in pairwise(rungs))
    for budget in range(1, spent(rungs) + 3):
        n = affordable(candidates, batches, budget)
        assert n == 1 or spent(ladder(n, batches)) <= budget
        assert n == candidates or spent(ladder(n + 1, batches)) > budget


def test_the_grid_is_made_of_recipes_with_names_of_their_own() -> None:
    names = [r.name for r in grid()]
    assert len(set(names)) == len(names)
    assert all(from_yaml(to_yaml(r)) == r for r in grid())


def test_the_whole_grid_runs_and_shares_what_it_measures(tiny_llama, token_ids, monkeypatch) -> None:
    made: list[tuple] = []
    before = trial.spectrum
    monkeypatch.setattr(trial, "spectrum", lambda r, b, *a, **k: (made.append((r.metric, r.group, b.name)), before(r, b, *a, **k))[1])
    found = ek.search(tiny_llama, [0.6, 0.3], calib=token_ids, batch_size=4)
    assert not [r for r in found.rows if r.why]
    assert len(found.rows) == 2 * len(grid())
    assert len(made) == len(set(made))
    check(found.report | {"timings": {}})


def test_equal_commands_give_equal_bytes_and_the_yaml_gives_them_again(tiny_llama, token_ids, tmp_path) -> None:
    a, b = (ek.search(tiny_llama, 0.5, calib=token_ids, recipes=FEW, out=tmp_path / n, command="eckart search") for n in "ab")
    assert tree(a.path) == tree(b.path)
    assert (a.path / "search.html").is_file()
    assert ek.verify(a.path, tiny_llama).ok
    recipe = from_yaml((a.path / "eckart.yaml").read_text())
    again = ek.compress(tiny_llama, recipe, calib=token_ids, out=tmp_path / "c", command="eckart search").path
    assert tree(again) == {k: v for k, v in tree(a.path).items() if not k.startswith("search.")}


def test_a_time_limit_ends_after_a_rung_and_its_number_repeats_the_result(tiny_llama, token_ids, tmp_path) -> None:
    short = ek.search(tiny_llama, 0.5, calib=token_ids, recipes=FEW, batch_size=2, time_limit=0, out=tmp_path / "a")
    assert short.rungs == 1
    assert "--rungs 1" in " ".join(short.report["warnings"])
    again = ek.search(tiny_llama, 0.5, calib=token_ids, recipes=FEW, batch_size=2, rungs=1, out=tmp_path / "b")
    assert tree(short.path) == tree(again.path)


def test_an_interrupted_search_goes_on(tiny_llama, token_ids, tmp_path, monkeypatch) -> None:
    calls = {"judged": 0, "collected": 0}
    judged, collected = Judge.__call__, calibrate.collect
    monkeypatch.setattr(calibrate, "collect", lambda *a, **k: (calls.update(collected=calls["collected"] + 1), collected(*a, **k))[1])
    whole = ek.search(tiny_llama, [0.5, 0.3], calib=token_ids, recipes=FEW, out=tmp_path / "whole")
    once = calls["collected"]

    def counting(self, *args, **kwargs):
        calls["judged"] += 1
        if calls["judged"] == 4:
            raise KeyboardInterrupt
        return judged(self, *args, **kwargs)

    monkeypatch.setattr(Judge, "__call__", counting)
    with pytest.raises(KeyboardInterrupt):
        ek.search(tiny_llama, [0.5, 0.3], calib=token_ids, recipes=FEW, out=tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / ".cut.search").is_dir()
    with open(tmp_path / ".cut.search" / "evaluations.jsonl", "a") as file:
        file.write('["half a li')  # killed while it wrote
    calls |= {"judged": 5, "collected": 0}
    again = ek.search(tiny_llama, [0.5, 0.3], calib=token_ids, recipes=FEW, out=tmp_path / "cut")
    assert calls["judged"] - 5 == sum(1 for r in whole.rows for _ in range(r.rung)) - 3 + 1  # and the original
    assert calls["collected"] == once - 1  # what the candidates share was read from the file
    assert tree(again.path) == tree(whole.path)
    assert not (tmp_path / ".cut.search").exists()


@pytest.mark.parametrize("same", [True, False], ids=["the same", "another seed"])
def test_only_the_work_of_the_same_search_is_taken_up(same, tiny_llama, token_ids, tmp_path, monkeypatch) -> None:
    def go(seed: int, **more):
        return ek.search(tiny_llama, 0.5, calib=token_ids, recipes=FEW, seed=seed, **more)

    monkeypatch.setattr(Judge, "__call__", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        go(0, out=tmp_path / "a")
    monkeypatch.undo()
    asvd = ek.get_recipe("asvd").with_(budget=ek.Budget(keep=0.5))
    lines = [json.dumps([search_folder.key_of(asvd), batches, -1.0, 0.5]) for batches in range(1, 5)]  # a loss that would win
    (tmp_path / ".a.search" / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    found = go(0 if same else 1, out=tmp_path / "a")
    assert (found.winners[0.5].name == "asvd") == same
    assert found.rows[0].loss == (-1.0 if same else go(1).rows[0].loss)


def test_a_folder_that_is_only_named_like_our_work_is_left_alone(tiny_llama, token_ids, tmp_path) -> None:
    (tmp_path / ".a.search").mkdir()
    (tmp_path / ".a.search" / "thesis.txt").write_text("mine")
    with pytest.raises(Refused, match=r"thesis\.txt.*Move it away"):
        ek.search(tiny_llama, 0.5, calib=token_ids, recipes=FEW, out=tmp_path / "a")
    assert (tmp_path / ".a.search" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("same", [True, False], ids=["taken up", "dropped"])
def test_a_kill_between_the_two_renames_loses_no_output(same, tiny_llama, token_ids, tmp_path, monkeypatch) -> None:
    def go(**more):
        return ek.search(tiny_llama, 0.5, calib=token_ids, recipes=["svd"], out=tmp_path / "a", **more)

    before, rename = tree(go().path), search_folder.os.rename

    def once(a, b):
        rename(a, b)
        if a == tmp_path / "a":
            raise KeyboardInterrupt

    monkeypatch.setattr(search_folder.os, "rename", once)
    with pytest.raises(KeyboardInterrupt):
        go(overwrite=True)
    monkeypatch.setattr(search_folder.os, "rename", rename)
    assert not (tmp_path / "a").exists()
    folder = search_folder.Folder(tmp_path / "a", tiny_llama, True)
    if same:
        assert tree(go(overwrite=True).path) == before
    else:
        folder.open(["another"])
        assert tree(tmp_path / "a") == before


def test_what_is_there_is_replaced_only_when_it_is_ours(tiny_llama, token_ids, tmp_path) -> None:
    def go(**more):
        return ek.search(tiny_llama, [0.5, 0.3], calib=token_ids, recipes=["svd", "svd_llm"], out=tmp_path / "a", **more)

    before = tree(go().path)
    with pytest.raises(Refused, match="exists"):
        go()
    assert tree(go(overwrite=True).path) == before
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(Refused):
        go(overwrite=True)
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    with pytest.raises(Refused):
        ek.search(tiny_llama, 0.5, calib=token_ids, recipes=["svd"], out=tiny_llama, overwrite=True)


def test_a_candidate_that_cannot_be_made_is_a_row_with_its_reason(tiny_llama, token_ids) -> None:
    odd = ek.get_recipe("svd_llm").with_(name="odd", target=target.Linears(only=("nowhere",)))
    found = ek.search(tiny_llama, 0.5, calib=token_ids, recipes=["svd", odd])
    assert found.winners[0.5].name == "svd"
    assert "no matrix is targeted" in next(r.why for r in found.rows if r.recipe == "odd")
    assert any("odd was refused" in w for w in found.report["warnings"])
    with pytest.raises(Refused, match=r"every candidate was refused.*no matrix is targeted"):
        ek.search(tiny_llama, 0.5, calib=token_ids, recipes=[odd])


def test_a_plain_module_is_judged_by_its_outputs_or_a_loss_of_its_own() -> None:
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))
    data = [torch.randn(16, 24, generator=g) * torch.linspace(3, 0.01, 24) for _ in range(8)]
    found = ek.search(net, 0.5, calib=data, recipes=["svd", "svd_llm"])
    assert found.winners[0.5].name == "svd_llm"
    assert "distance" in found.report["verdict"][-1]
    fit, held = [*data[:3], *data[4:7]], data[3::4]
    own = ek.search(net, 0.5, calib=data, recipes=["svd", "svd_llm"], loss=lambda output, batch: output.square().sum(1))
    with torch.no_grad():
        for row in found.rows:
            small = ek.compress(net, row.recipe, 0.5, calib=fit).model
            far = [float((small(x) - net(x)).square().sum() / net(x).square().sum()) for x in held[: row.batches]]
            assert row.loss == pytest.approx(sum(far) / len(far), rel=1e-4)
            mine = next(r for r in own.rows if r.recipe == row.recipe)
            assert mine.loss == pytest.approx(float(torch.cat([small(x) for x in held[: mine.batches]]).square().sum(1).mean()), rel=1e-4)
    assert own.path is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"calib": [[3, 4, 5]] * 3}, "every 4th text"),
        ({"calib": None}, "--calib"),
        ({"keep": [0.5, 0.5]}, "names a size twice"),
        ({"keep": []}, "at least one size"),
        ({"keep": 1.5}, "budget.keep"),
        ({"recipes": ["svd_lm"]}, "Did you mean 'svd_llm'"),
        ({"recipes": ["maestro"]}, "maestro trains"),
        ({"recipes": ["afm"], "evaluations": 0}, "evaluations"),
        ({"recipes": ["svd", "svd"]}, "two candidates are called 'svd'"),
        ({"recipes": []}, "at least one candidate"),
        ({"rungs": 0}, "rungs"),
        ({"goal": "best"}, "goal"),
        ({"seed": -1}, "seed"),
        ({"keep": 1e-5, "recipes": ["svd"]}, "every candidate was refused"),
    ],
)
def test_what_cannot_be_is_refused_before_work(more, message, tiny_llama, token_ids, monkeypatch) -> None:
    monkeypatch.setattr(verb, "measure", lambda *a, **k: pytest.fail("it had begun"))
    with pytest.raises((UsageError, Refused), match=message):
        ek.search(tiny_llama, **{"keep": 0.5, "calib": token_ids} | more)


def test_the_command_line(tiny_llama, lm_folder, calib, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": t[:300]}) + "\n" for t in calib))
    line = [
        "search",
        str(lm_folder),
        "--keep",
        "0.6,0.4",
        "--calib",
        str(file),
        "--recipe",
        "svd",
        "--recipe",
        "svd_llm",
        "--max-length",
        "64",
    ]
    main([*line, "--dry-run"])
    planned = capsys.readouterr().out
    assert "2 of 2 candidates would be judged on 3 texts" in planned.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    main([*line, "-o", str(tmp_path / "out"), "--quiet"])
    shown = capsys.readouterr().out
    assert max(len(x) for x in shown.splitlines() if str(tmp_path) not in x) <= 80
    assert "svd_llm loses least" in shown.replace("\n", " ")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"keep-0.6", "keep-0.4", "search.json", "search.html"}
    assert ek.load(tmp_path / "out" / "keep-0.4") is not None
    main([*line, "-o", str(tmp_path / "out"), "--overwrite", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(tmp_path / "out")
    for bad, why in ((["--keep", "much"], "expected a share"), (["--recipe", "none.yaml"], "no such file")):
        with pytest.raises(SystemExit):
            main(["search", str(lm_folder), "--calib", str(file), "-o", str(tmp_path / "x"), *bad])
        assert why in capsys.readouterr().err
