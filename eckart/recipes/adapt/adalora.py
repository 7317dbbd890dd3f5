"""AdaLoRA: a fresh update with a diagonal, of which the least sensitive entries of all layers together are cut while it trains."""

from eckart.axes import Budget, Recipe, core, form, penalty, refresh, roles, source

RECIPE = Recipe(
    name="adalora",
    verb="adapt",
    paper="arXiv:2303.10512",
    title="AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
    fidelity="variant",
    differs="The norm in the penalty is smoothed at zero, and its gradient is added once per step of the optimiser. Of equal scores the first stay, so that "
    "exactly the budget is left, where the released code cuts all of them. The final budget is a share of the first one; the warm and final phases, which the "
    "paper tunes per task, are a tenth and a third of the run.",
    source=source.Zero(),
    factor=None,
    filter=None,
    form=form.Branch(
        of="fresh",
        core=core.Diag(init="zero"),
        left="normal:0.02",
        right="normal:0.02",
        scale="alpha/r",
        minus="nothing",
    ),
    budget=Budget(rank=12),
    roles={"left": roles.Train(), "core": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    penalty=(penalty.Orth(weight=0.1, norm="fro", reduce="mean"),),
    refresh=(refresh.Allocate(keep=2 / 3, every=10, warm=0.1, final=1 / 3, betas=(0.85, 0.85)),),
    train={"alpha": 32, "lr": 1e-3, "dropout": 0.0},
)
