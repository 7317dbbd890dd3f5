"""PiSSA: train the principal singular values and vectors, freeze the rest of the weight."""

from eckart.axes import Budget, Recipe, filter, form, roles

RECIPE = Recipe(
    name="pissa",
    verb="adapt",
    paper="arXiv:2404.02948",
    title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    filter=filter.Top(),
    form=form.Branch(of="kept", balance="even", scale="alpha/r"),
    budget=Budget(rank=128),
    roles={"left": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    train={"alpha": "r", "lr": 2e-5, "dropout": 0.0},
)
