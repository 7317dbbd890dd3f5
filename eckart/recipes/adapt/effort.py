"""Effort: train the last singular triple of each weight, value and both vectors, and freeze all before it."""

from eckart.axes import Budget, Recipe, core, filter, form, roles

RECIPE = Recipe(
    name="effort",
    verb="adapt",
    paper="arXiv:2411.15633",
    title="Effort: Efficient Orthogonal Modeling for Generalizable AI-Generated Image Detection",
    fidelity="variant",
    differs="Trained by the task's loss alone, as released. The paper's two further terms, which hold the trained triple orthogonal to the frozen ones and "
    "the norm of the weight, are left out: osf does the first exactly, by projection. The rank counts what trains (1), where the paper counts what is "
    "frozen (1023 of 1024). The paper adapts attention alone, which is the user's choice (target).",
    filter=filter.Bottom(),
    form=form.Branch(of="kept", core=core.Diag(), balance="none", scale="one", split=True),
    budget=Budget(rank=1),
    roles={"left": roles.Train(), "core": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    train={"lr": 2e-4, "weight_decay": 5e-4, "dropout": 0.0},
)
