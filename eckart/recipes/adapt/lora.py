"""LoRA: a fresh low-rank update, zero at the start. The baseline of every other adapter."""

from eckart.axes import Budget, Recipe, form, roles, source

RECIPE = Recipe(
    name="lora",
    verb="adapt",
    paper="arXiv:2106.09685",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    source=source.Zero(),
    factor=None,
    filter=None,
    form=form.Branch(of="fresh", left="zero", right="kaiming", scale="alpha/r", minus="nothing"),
    budget=Budget(rank=8),
    roles={"left": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    train={"alpha": "2r", "lr": 2e-4, "dropout": 0.0},
)
