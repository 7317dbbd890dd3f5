"""FLoRA: a fresh update in Tucker form, so that the kernel of a convolution stays a tensor."""

from eckart.axes import Budget, Recipe, form, roles, source

RECIPE = Recipe(
    name="flora",
    verb="adapt",
    paper="arXiv:2405.14739",
    title="FLoRA: Low-Rank Core Space for N-dimension",
    fidelity="variant",
    differs="With groups the update has the kernel's own shape (out, in / groups, ...), where the released code fails. Embeddings are two axes, and the "
    "update can be merged; neither works there. Convolutions are the user's choice (target); per-task ranks and scales are not published.",
    source=source.Zero(),
    factor=None,
    filter=None,
    form=form.Tucker(kernel=2),
    budget=Budget(rank=16),
    roles={"core": roles.Train(), "left": roles.Train(), "right": roles.Train(), "kernel": roles.Train(), "base": roles.Freeze()},
    train={"alpha": 4, "lr": 2e-4, "dropout": 0.01},
)
