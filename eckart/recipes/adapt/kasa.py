"""KaSA: drop the smallest singular values of the weight, train a fresh update with a diagonal of its own values."""

from eckart.axes import Budget, Recipe, core, filter, form, penalty, roles

RECIPE = Recipe(
    name="kasa",
    verb="adapt",
    paper="arXiv:2412.06071",
    title="KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models",
    fidelity="variant",
    differs="The r smallest of min(out, in) singular values are dropped, as in the paper, where the released code counts from the input width; penalties "
    "use the r x r Grams of the paper, not the wide ones of the code, are summed over layers, and their norm is smoothed at zero.",
    filter=filter.Bottom(),
    form=form.Branch(of="fresh", core=core.Diag(init="normal:1"), left="zero", right="kaiming", scale="alpha/r", minus="kept"),
    budget=Budget(rank=8),
    roles={"left": roles.Train(), "core": roles.Train(), "right": roles.Train(), "kept": roles.Drop(), "base": roles.Freeze()},
    penalty=(
        penalty.L2(weight=1e-4, parts=("core",), reduce="sum"),
        penalty.Orth(weight=1e-3, norm="fro", reduce="sum"),
    ),
    train={"alpha": "2r", "lr": 4e-4, "dropout": 0.0},
)
