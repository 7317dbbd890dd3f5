"""SORSA: train the principal singular values and both factors, and keep the factors near orthonormal by a penalty."""

from eckart.axes import Budget, Recipe, core, filter, form, penalty, roles

RECIPE = Recipe(
    name="sorsa",
    verb="adapt",
    paper="arXiv:2409.00055",
    title="SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
    fidelity="variant",
    differs="The norm in the penalty is smoothed at zero, where the bare one pushes along rounding noise; the penalty's gradient is added once per "
    "step of the optimiser, where the released code divides it by the accumulation count.",
    filter=filter.Top(),
    form=form.Branch(of="kept", core=core.Diag(), balance="none", scale="one"),
    budget=Budget(rank=128),
    roles={"left": roles.Train(), "core": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    penalty=(penalty.Orth(weight=4e-4, norm="fro", reduce="mean", over_peak=True),),
    train={"lr": 3e-5, "dropout": 0.0},
)
