"""LoLDU: train the leading pivots of the weight's LDU decomposition, between its frozen triangular factors."""

from eckart.axes import Budget, Recipe, core, factor, filter, form, roles

RECIPE = Recipe(
    name="loldu",
    verb="adapt",
    paper="arXiv:2410.13618",
    title="LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
    fidelity="variant",
    differs="The pivots begin with their own values; the released code also draws them at random, which it takes away from the base as well. A row whose "
    "pivot is tiny beside its other entries is scaled by the largest of them. The first pivots are no approximation of the weight, and none is claimed.",
    factor=factor.LDU(),
    filter=filter.Top(),
    form=form.Branch(of="kept", core=core.Diag(), balance="none", scale="alpha/r", absorb=False),
    budget=Budget(rank=768),
    roles={"left": roles.Freeze(), "core": roles.Train(), "right": roles.Freeze(), "base": roles.Freeze()},
    train={"alpha": 8, "lr": 1e-2, "dropout": 0.0},
)
