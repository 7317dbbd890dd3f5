"""Penalties, projections and allocations: once per step, whatever the accumulation, the label smoothing, the precision or the interruption."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import eckart as ek
from eckart.axes import Budget, Recipe, core, form, penalty, refresh, roles, source
from eckart.axes.training import add_gradient
from eckart.errors import Refused, UsageError
from eckart.hub.peft.glue import Glue, adapter_layers
from eckart.registry import get_recipe


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    found = [torch.randint(3, 96, (10,), generator=g) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in found]


def train(model: Any, out: Any, *, resume: str | None = None, glue: Any = None, **how: Any) -> Any:
    options = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0,
        "save_strategy": "no", "logging_strategy": "no", "dataloader_pin_memory": False, **how,
    }  # fmt: skip
    data: Any = rows()
    with torch.random.fork_rng():
        trainer = Trainer(model, TrainingArguments(str(out), **options), train_dataset=data, callbacks=[glue or ek.glue(model)])
        trainer.train(resume_from_checkpoint=resume)
    return model


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "eckart_branch" in k}


HUNDRED = get_recipe("sorsa").with_(penalty=(penalty.L2(weight=100.0, parts=("core",), reduce="sum"),))


class Seen(Glue):
    """Notes what the penalty added at each step."""

    def before_step(self) -> None:
        before = {k: p.grad.clone() for k, p in self.model.named_parameters() if p.grad is not None}
        super().before_step()
        added = {k: p.grad - before[k] for k, p in self.model.named_parameters() if p.grad is not None}
        core = {k: v for k, v in added.items() if k.endswith(".core")}
        values = {k: p.detach().clone() for k, p in self.model.named_parameters()}
        self.notes = [
            *getattr(self, "notes", []),
            max(float((v - 200 * values[k]).abs().max() / values[k].abs().max()) for k, v in core.items()),
        ]
        assert all(not v.any() for k, v in added.items() if not k.endswith(".core"))


@pytest.mark.parametrize(
    "how",
    [
        {"gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": 4},
        {"label_smoothing_factor": 0.2},
        {"max_grad_norm": 0.01},
        {"bf16": True},
    ],
    ids=lambda h: next(iter(h)),
)
def test_a_penalty_is_added_once_per_step_and_whole(how, tiny, tmp_path) -> None:
    model = ek.adapt(tiny("llama"), HUNDRED, rank=2, target=["q_proj"])
    seen = Seen(model)
    train(model, tmp_path, glue=seen, max_steps=3, **how)
    assert len(seen.notes) == 3
    assert max(seen.notes) < 1e-3


def test_the_logged_loss_is_that_of_the_task(tiny, tmp_path) -> None:
    losses = []
    for recipe in (HUNDRED, HUNDRED.with_(penalty=())):
        model = ek.adapt(tiny("llama"), recipe, rank=2)
        model.eval()
        x = rows(2)[0]["input_ids"][None]
        losses.append(float(model(input_ids=x, labels=x).loss.detach()))
    assert losses[0] == losses[1]


GLUE = ["adalora", "ba_lora", "allora", "lora_pro", "lisa", "orthoreg"]


def small(recipe: str, model: Any) -> Any:
    """The recipe at rank 2 on the queries, or on all of its weights where it has no rank."""
    found = get_recipe(recipe)
    if recipe == "lisa":
        return ek.adapt(model, found.with_(refresh=(refresh.Sample(blocks=1, every=1),)), target=["q_proj"])
    return ek.adapt(model, found, rank=None if recipe == "osf" else 2, target=["q_proj"])


@pytest.mark.parametrize("recipe", ["pissa", "sorsa", "osf", "kasa", *GLUE])
def test_resuming_gives_the_same_bytes(recipe, tiny, tmp_path) -> None:
    how = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.01}
    whole = adapters(train(small(recipe, tiny("llama")), tmp_path, **how))
    again = adapters(train(small(recipe, tiny("llama")), tmp_path / "b", resume=str(tmp_path / "checkpoint-2"), **how))
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    began = adapters(small(recipe, tiny("llama")))
    assert any(not torch.equal(whole[k], began[k]) for k in whole)


@pytest.mark.parametrize("recipe", GLUE)
def test_one_pass_or_two_halves_of_it_make_the_same_step(recipe, tiny, tmp_path, monkeypatch) -> None:
    """Rows with unequal numbers of labels, so that an average of averages would not do."""

    def uneven(count: int = 24) -> Any:
        out = [{"input_ids": r["input_ids"], "labels": r["input_ids"].clone()} for r in whole_rows(count)]
        for i, row in enumerate(out):
            row["labels"][: 7 * (i % 2)] = -100
        return out

    whole_rows = rows
    monkeypatch.setitem(globals(), "rows", uneven)
    found = []
    for sizes in ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        model = small(recipe, tiny("llama"))
        if recipe == "ba_lora":  # the share of the leading values is not a mean over positions
            config = model.peft_config["default"]
            terms = tuple(replace(t, weight=3.0) for t in config.value.loss[:2])
            model = ek.adapt(tiny("llama"), config.value.with_(loss=terms), target=["q_proj"])
        found.append(adapters(train(model, tmp_path / str(len(found)), max_steps=2, optim="sgd", learning_rate=0.05, **sizes)))
    for k in found[0]:
        assert torch.allclose(found[0][k], found[1][k], rtol=1e-3, atol=1e-4 * float(found[0][k].abs().max()) + 1e-7), k


def test_training_without_the_callback_is_refused_and_says_how(tiny, ids) -> None:
    model = ek.adapt(tiny("llama"), "sorsa", rank=2)
    model.train()
    with pytest.raises(UsageError, match=r"sorsa does something at every step .* Trainer\(..., callbacks=\[ek.glue\(model\)\]\)"):
        model(input_ids=ids)
    with torch.no_grad():
        model(input_ids=ids)  # nothing is trained here
    model.eval()
    model(input_ids=ids)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    with ek.glue(model).begin(optimizer):
        model(input_ids=ids)
    with pytest.raises(UsageError, match="nothing is attached"):
        model(input_ids=ids)


def test_a_recipe_without_pieces_needs_no_callback(tiny, ids) -> None:
    model = ek.adapt(tiny("llama"), "pissa", rank=2)
    model.train()
    model(input_ids=ids)
    with pytest.raises(UsageError, match=r"glue.begin\(optimizer\) before the first step"):
        ek.glue(model).before_step()


def test_glue_of_another_recipe_acts_beside(tiny) -> None:
    plain, glued = get_recipe("pissa"), ek.adapt(tiny("llama"), "pissa", rank=2, glue=["sorsa"])
    assert glued.peft_config["default"].value.penalty == get_recipe("sorsa").penalty
    assert glued.peft_config["default"].value.form == plain.form
    with pytest.raises(UsageError, match="lora does nothing during training"):
        ek.adapt(tiny("llama"), "pissa", rank=2, glue=["lora"])


def test_models_without_adapters_and_sharded_runs_are_refused(tiny, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"holds no adapter of ours; call ek.adapt"):
        ek.glue(tiny("llama"))
    model = ek.adapt(tiny("llama"), "sorsa", rank=2)
    glue = ek.glue(model)

    class Args:
        deepspeed = "zero3.json"

    with pytest.raises(Refused, match="deepspeed shards parameters"):
        glue.on_train_begin(Args(), None, None)


def test_scaled_gradients_are_unscaled_first() -> None:
    model = ek.adapt(nn.Sequential(nn.Linear(6, 5)), HUNDRED, rank=2)
    layer = next(adapter_layers(model)).branch("default")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with ek.glue(model).begin(optimizer, scaler=scaler) as glue:
        loss = model(torch.ones(3, 6)).sum()
        want = torch.autograd.grad(loss, layer.core, retain_graph=True)[0] + 200 * layer.core.detach()
        scaler.scale(loss).backward()
        glue.before_step()
        assert torch.allclose(layer.core.grad, want, rtol=1e-4)
        scaler.step(optimizer)
        scaler.update()
        glue.after_step()


def test_a_step_that_overflowed_says_nothing() -> None:
    model = ek.adapt(nn.Sequential(nn.Linear(6, 5)), ALLOCATED, rank=3)
    layer = next(adapter_layers(model)).branch("default")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    optimizer.step_was_skipped = True  # as accelerate's optimiser says it
    with ek.glue(model).begin(optimizer, total_steps=16) as glue:
        model(torch.ones(3, 6)).sum().backward()
        layer.core.grad.fill_(math.inf)
        glue.before_step()
        glue.after_step()
        assert glue.trainings["default"].step == 1
    assert not layer.state_core_mean.any()


class TestPenalties:
    def layer(self) -> Any:
        model = ek.adapt(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), "sorsa", rank=2)
        g = torch.Generator().manual_seed(0)
        for found in adapter_layers(model):
            with torch.no_grad():
                for p in found.branch("default").parameters():
                    p.add_(0.3 * torch.randn(p.shape, generator=g))
        return model

    @pytest.mark.parametrize("reduce", ["sum", "mean"])
    @pytest.mark.parametrize("norm", ["fro", "fro2"])
    def test_gradient_is_that_of_the_written_formula(self, norm, reduce) -> None:
        model = self.layer()
        piece = penalty.Orth(weight=0.7, norm=norm, reduce=reduce, smooth=0.0)
        branches = [x.branch("default") for x in adapter_layers(model)]
        terms = []
        leaves: list[Any] = []
        for b in branches:
            for part in ("left", "right"):
                t = getattr(b, part).detach().double().requires_grad_()
                leaves.append((getattr(b, part), t))
                gram = t.T @ t if part == "left" else t @ t.T
                square = (gram - torch.eye(2, dtype=torch.float64)).square().sum()
                terms.append(square if norm == "fro2" else square.sqrt())
        total = 0.7 * sum(terms) / (len(terms) if reduce == "mean" else 1)
        total.backward()
        optimizer = torch.optim.SGD([p for p, _ in leaves], lr=1.0)
        with Glue(model).begin(optimizer) as glue:
            training = glue.trainings["default"]
            assert float(piece.value(training).detach()) == pytest.approx(float(total.detach()), rel=1e-5)
            piece.before_step(training)
        for p, t in leaves:
            assert torch.allclose(p.grad.double(), t.grad, rtol=1e-4, atol=1e-6)

    def test_parts_that_do_not_train_are_left_alone(self) -> None:
        model = self.layer()
        first, second = (x.branch("default") for x in adapter_layers(model))
        first.left.requires_grad_(False)
        with Glue(model).begin(torch.optim.SGD(second.parameters(), lr=1.0)) as glue:
            penalty.Orth(weight=1.0).before_step(glue.trainings["default"])
        assert first.left.grad is None
        assert second.left.grad is not None

    def test_gradients_add_up(self) -> None:
        p = nn.Parameter(torch.zeros(2))
        add_gradient(p, torch.ones(2))
        add_gradient(p, torch.ones(2))
        assert torch.equal(p.grad, 2 * torch.ones(2))


def test_refactoring_keeps_the_product_and_forgets_the_moments() -> None:
    recipe = get_recipe("lora").with_(refresh=(refresh.Refactor(every=2, balance="right"),))
    model = ek.adapt(nn.Sequential(nn.Linear(6, 5)), recipe, rank=3)
    b = next(adapter_layers(model)).branch("default")
    optimizer = torch.optim.Adam(b.parameters(), lr=0.05)
    g = torch.Generator().manual_seed(0)
    with ek.glue(model).begin(optimizer) as glue:
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 6, generator=g)).square().sum().backward()
            glue.before_step()
            optimizer.step()
            before = b.gain_matrix().detach()
            glue.after_step()
            assert torch.allclose(b.gain_matrix(), before, atol=1e-5)
            if step % 2:
                assert torch.allclose(b.left.T @ b.left, torch.eye(3), atol=1e-4)
                assert not any(optimizer.state[p] for p in b.parameters())
            else:
                assert all(optimizer.state[p] for p in b.parameters())


ALLOCATED = Recipe(
    name="allocated", verb="adapt", paper="-", source=source.Zero(), factor=None, filter=None, budget=Budget(rank=6),
    form=form.Branch(of="fresh", core=core.Diag(init="zero"), left="normal:0.02", right="normal:0.02", scale="alpha", minus="nothing"),
    roles={"left": roles.Train(), "core": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    refresh=(refresh.Allocate(keep=0.5, every=2, warm=2, final=4, betas=(0.8, 0.7)),),
)  # fmt: skip


class TestAllocation:
    def run(self, steps: int = 16) -> tuple[list[dict[str, Any]], Any]:
        """Train two layers and write down, by hand, what the scores should be."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = ek.adapt(nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7)), ALLOCATED, rank=6, alpha=2)
        layers = [x.branch("default") for x in adapter_layers(model)]
        optimizer = torch.optim.SGD([p for b in layers for p in b.parameters()], lr=0.05)
        ema: dict[Any, Any] = {}
        trace = []
        g = torch.Generator().manual_seed(3)
        with ek.glue(model).begin(optimizer, total_steps=steps) as glue:
            for step in range(1, steps + 1):
                optimizer.zero_grad()
                x = torch.randn(16, 9, generator=g)
                (model(x) - x[:, :7]).square().mean().backward()
                glue.before_step()
                optimizer.step()
                for i, b in enumerate(layers):
                    for part in ("left", "core", "right"):
                        p = getattr(b, part)
                        now = (p.detach().double() * p.grad.double()).abs()
                        mean, spread = ema.get((i, part), (torch.zeros_like(now), torch.zeros_like(now)))
                        if step <= steps - 4:
                            mean = 0.8 * mean + 0.2 * now
                            spread = 0.7 * spread + 0.3 * (now - mean).abs()
                        ema[i, part] = mean, spread
                glue.after_step()
                score = torch.cat(
                    [
                        ema[i, "core"][0] * ema[i, "core"][1]
                        + (ema[i, "left"][0] * ema[i, "left"][1]).mean(0)
                        + (ema[i, "right"][0] * ema[i, "right"][1]).mean(1)
                        for i in range(2)
                    ]
                )
                trace.append({"step": step, "core": torch.cat([b.core.detach().clone() for b in layers]), "score": score})
        return trace, layers

    def test_budget_and_scores_follow_the_paper(self) -> None:
        trace, _ = self.run()
        for row in trace:
            alive = int((row["core"] != 0).sum())
            if row["step"] <= 2:
                assert alive == 12
            elif row["step"] >= 12:
                assert alive == 6
            if row["step"] % 2 == 0 and 2 < row["step"] <= 12:
                left = 1 - (row["step"] - 2) / 10
                want = int(6 + 6 * left**3)
                assert alive == want
                best = row["score"].argsort(descending=True)[:want]
                assert set(best.tolist()) == set(torch.nonzero(row["core"]).reshape(-1).tolist())

    def test_the_last_cut_stays(self) -> None:
        trace, _ = self.run()
        masks = [row["core"] != 0 for row in trace if row["step"] >= 12]
        assert all(torch.equal(m, masks[0]) for m in masks)

    def test_what_it_remembers_survives_a_checkpoint(self, tmp_path) -> None:
        from peft import PeftModel

        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = nn.Sequential(nn.Linear(9, 8))
        import copy

        model = ek.adapt(copy.deepcopy(base), ALLOCATED, rank=6)
        b = next(adapter_layers(model)).branch("default")
        optimizer = torch.optim.SGD(b.parameters(), lr=0.1)
        with ek.glue(model).begin(optimizer, total_steps=16) as glue:
            for _ in range(4):
                optimizer.zero_grad()
                model(torch.ones(2, 9)).square().sum().backward()
                optimizer.step()
                glue.after_step()
        assert b.state_core_mean.any()
        model.save_pretrained(tmp_path)
        again = next(adapter_layers(PeftModel.from_pretrained(base, tmp_path))).branch("default")
        assert all(torch.equal(again.parts()[k], v) for k, v in b.parts().items())

    def test_a_schedule_wants_the_number_of_steps(self) -> None:
        model = ek.adapt(nn.Sequential(nn.Linear(9, 8)), ALLOCATED, rank=6)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with pytest.raises(UsageError, match="must know the run's steps"):
            ek.glue(model).begin(optimizer)
        with pytest.raises(UsageError, match="2 warm and 4 final steps leave none of 6"):
            ek.glue(model).begin(optimizer, total_steps=6)
