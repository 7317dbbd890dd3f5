"""What adapters decide before a model is touched, and a whole fine-tune on the model that ships."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel

import eckart as ek
from eckart.axes import Budget, core, form, variance
from eckart.axes import filter as filters
from eckart.axes.draw import drawing
from eckart.axes.protocols import Cost, Site
from eckart.axes.triples import triples
from eckart.errors import Refused, UsageError
from eckart.linalg.psd import Weight
from eckart.registry import get_recipe
from eckart.verbs.adapt import lay
from eckart.verbs.adapt_request import resolve


class TestResolve:
    def test_rank_replaces_the_budget_in_its_own_kind(self) -> None:
        assert resolve("pissa", 8).budget == Budget(rank=8)
        assert resolve("osf", 0.25).budget == Budget(rank=0.25)
        assert resolve("eva", 8).budget == Budget(total_rank=8.0)
        assert resolve("svfit").budget == Budget(energy=0.99)

    def test_every_choice_can_be_another(self) -> None:
        mixed = resolve("corda", 4, variant="kpm", glue=["sorsa"], base="mutate", settings=["form.balance=left"])
        assert (mixed.filter, mixed.form.base, mixed.form.balance) == (filters.Bottom(), "mutate", "left")
        assert mixed.penalty == get_recipe("sorsa").penalty

    def test_forms_that_contradict_themselves(self) -> None:
        with pytest.raises(UsageError, match="a fresh branch is made of no triples"):
            form.Branch(of="fresh", left="zero")
        with pytest.raises(UsageError, match="gives the singular values to the core, and form.core is none"):
            form.Branch(balance="none")
        with pytest.raises(UsageError, match="form=branch has the parts left, right, kept, base"):
            get_recipe("pissa").with_(roles={"core": ek.roles.Train()})
        with pytest.raises(UsageError, match="form=branch needs 'kept'"):
            get_recipe("pissa").with_(filter=None)

    def test_fused_layers_are_laid_apart_only_where_the_recipe_says(self) -> None:
        site = Site("h.0.attn.c_attn", (12, 4), ("w",))
        assert [p.site.name for p in lay(get_recipe("soma"), [site])] == [f"h.0.attn.c_attn[{x}]" for x in "qkv"]
        assert [p.site.name for p in lay(get_recipe("pissa"), [site])] == ["h.0.attn.c_attn"]


class TestDraw:
    def test_values_follow_from_names_alone(self) -> None:
        one, two = drawing(0, "a"), drawing(0, "a")
        other = drawing(0, "b")
        two("right", "normal:1", (3, 3))
        assert torch.equal(one("left", "normal:1", (2, 3)), two("left", "normal:1", (2, 3)))
        assert not torch.equal(one("left", "normal:1", (2, 3)), other("left", "normal:1", (2, 3)))
        state = torch.get_rng_state()
        one("left", "kaiming", (4, 4))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("word", "std"),
        [("normal:0.3", 0.3), ("uniform:0.6", 0.6 / math.sqrt(3)), ("kaiming", 1 / math.sqrt(3 * 400)), ("kaiming:0", math.sqrt(2 / 400))],
    )
    def test_spread(self, word: str, std: float) -> None:
        values = drawing(0, "x")("p", word, (300, 400))
        assert float(values.std()) == pytest.approx(std, rel=0.02)
        assert abs(float(values.mean())) < 5 * std / math.sqrt(values.numel())

    def test_constants(self) -> None:
        draw = drawing(0, "x")
        assert not draw("p", "zero", (2,)).any()
        assert (draw("p", "one", (2,)) == 1).all()


class TestTriples:
    def matrix(self) -> torch.Tensor:
        return torch.randn(20, 30, generator=torch.Generator().manual_seed(0))

    def test_plain(self) -> None:
        w = self.matrix()
        found = triples(w, (None, None), 6, "auto", 0)
        u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
        assert torch.allclose(found.values.double(), s[:6], rtol=1e-5)
        assert torch.allclose((found.left * found.values) @ found.right, (u[:, :6] * s[:6] @ vh[:6]).float(), atol=1e-4)

    @pytest.mark.parametrize("power", [0.5, 1.0])
    def test_in_a_metric_values_are_those_of_the_weighted_matrix(self, power: float) -> None:
        w = self.matrix().double()
        x = torch.randn(50, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gram = x.T @ x / 50
        values, vectors = torch.linalg.eigh(gram)
        metric = (vectors * values.clamp_min(0) ** power) @ vectors.T
        u, s, _ = torch.linalg.svd(w @ metric, full_matrices=False)
        found = triples(w, (None, Weight(gram, power)), 6, "auto", 0)
        assert torch.allclose(found.values.double(), s[:6], rtol=1e-6)
        assert torch.allclose((found.left * found.values) @ found.right, u[:, :6] @ u[:, :6].T @ w, atol=1e-6)

    def test_tail_of_a_singular_matrix_still_has_directions(self) -> None:
        w = torch.outer(torch.ones(6), torch.arange(1.0, 9.0))
        found = triples(w, (None, None), 6, "auto", 0)
        assert torch.allclose(found.left.T @ found.left, torch.eye(6), atol=1e-5)
        assert torch.allclose(found.right @ found.right.T, torch.eye(6), atol=1e-5)
        assert found.values[1:].max() < 1e-4


class TestGlobalTop:
    def run(self, budget: Budget, cap: float = 2.0, **curves: list[float]) -> dict[str, int | None]:
        return variance.GlobalTop(cap=cap)(curves, dict.fromkeys(curves, Cost(dense=1000, per_rank=10, full=4)), budget)

    def test_best_values_first(self) -> None:
        assert self.run(Budget(total_rank=4), a=[0.9, 0.1], b=[0.5, 0.4, 0.3], cap=3) == {"a": 1, "b": 3}

    def test_cap_and_mean(self) -> None:
        assert self.run(Budget(total_rank=2.0), a=[0.9, 0.8, 0.7, 0.6], b=[0.1, 0.1], cap=1.5) == {"a": 3, "b": 1}

    def test_ties_go_by_place(self) -> None:
        assert self.run(Budget(total_rank=3), a=[0.5, 0.5], b=[0.5, 0.5]) == {"a": 2, "b": 1}

    def test_other_budgets(self) -> None:
        with pytest.raises(UsageError, match="allocate.global_top takes budget.total_rank"):
            self.run(Budget(keep=0.5), a=[1.0])


@pytest.mark.parametrize("balance", ["even", "values", "left", "right", "none"])
def test_every_balance_has_the_same_product(balance: str) -> None:
    recipe = get_recipe("pissa").with_(form=form.Branch(core=core.Diag() if balance == "none" else None, balance=balance))
    layer = torch.nn.Sequential(torch.nn.Linear(12, 10))
    u, s, vh = torch.linalg.svd(layer[0].weight.detach())
    model = ek.adapt(layer, recipe, rank=3, alpha=6)
    b = model.base_model.model[0].branch("default")
    assert torch.allclose(b.gain_matrix(), (u[:, :3] * s[:3]) @ vh[:3], atol=1e-5)
    left, right = b.left.norm(dim=0), b.right.norm(dim=1)
    want = {"even": (s[:3] / 2).sqrt(), "values": (s[:3] / 2).sqrt(), "left": s[:3] / 2, "right": torch.ones(3), "none": torch.ones(3)}[
        balance
    ]
    assert torch.allclose(left, want, atol=1e-5)
    assert torch.allclose(right, {"left": torch.ones(3), "right": s[:3] / 2}.get(balance, want), atol=1e-5)


def test_a_fine_tune_learns_a_new_domain_and_can_be_opened(lm_folder, tmp_path) -> None:
    from eckart.hub.peft.train import Protocol, finetune

    words = ["alpha", "beta", "gamma", "delta"]
    g = torch.Generator().manual_seed(0)
    texts = [" ".join(words[i] for i in torch.randint(0, 4, (60,), generator=g).tolist()) for _ in range(24)]
    protocol = Protocol(steps=12, batch_size=4, length=64, lr=2e-3)
    report = finetune(lm_folder, texts, "sorsa", 4, out=tmp_path / "a", protocol=protocol)
    row = report["evaluation"][0]
    assert row["metric"] == "bits per byte"
    assert row["after"] < 0.6 * row["before"]
    assert report["curves"][0]["series"][0]["points"][-1][1] < report["curves"][0]["series"][0]["points"][0][1]
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "report.html", "report.json", "run.json"
    }  # fmt: skip
    assert json.loads((tmp_path / "a" / "report.json").read_text())["tables"][0]["rows"][0][0] == "sorsa"
    model = PeftModel.from_pretrained(ek.load(lm_folder, dtype=torch.float32), tmp_path / "a").merge_and_unload()
    again = ek.evaluate(model, texts[-2:], tokenizer=ek.load_tokenizer(lm_folder))["model"]["bits_per_byte"]
    assert again == pytest.approx(row["after"], rel=1e-4)


def test_fine_tunes_that_cannot_be(lm_folder, tmp_path, tiny_llama) -> None:
    from eckart.hub.peft.train import Protocol, compare, finetune, texts_of

    with pytest.raises(UsageError, match="one text cannot be both trained on and held out"):
        texts_of(["only one"])
    with pytest.raises(UsageError, match="at least two different recipes"):
        compare(lm_folder, ["a", "b"], ["pissa"], out=tmp_path / "c")
    with pytest.raises(UsageError, match="token ids have no bytes"):
        finetune(lm_folder, [[1, 2], [3, 4]], "lora", out=tmp_path / "a")
    with pytest.raises(Refused, match="training diverged at step|not finite"):
        finetune(
            lm_folder,
            ["abc def " * 20] * 4,
            "lora",
            4,
            out=tmp_path / "a",
            protocol=Protocol(steps=6, batch_size=1, length=32, lr=1e30, clip=0.0),
        )
    assert not (tmp_path / "a").exists()
