"""SLoRA: a LoRA with a trained r x r matrix between its factors."""

from eckart.axes import Budget, Recipe, core, form, roles, source

RECIPE = Recipe(
    name="slora",
    verb="adapt",
    paper="arXiv:2502.14482",
    title="NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models (SLoRA, its structured LoRA)",
    source=source.Zero(),
    factor=None,
    filter=None,
    form=form.Branch(of="fresh", core=core.Dense(init="kaiming"), left="zero", right="kaiming", scale="alpha/r", minus="nothing"),
    budget=Budget(rank=128),
    roles={"left": roles.Train(), "core": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    train={"alpha": "r", "lr": 2e-4, "dropout": 0.0},
)
