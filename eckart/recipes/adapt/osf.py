"""OSF: protect the leading singular subspaces of what was learnt before, train everything else."""

from eckart.axes import Budget, Recipe, core, filter, form, roles

RECIPE = Recipe(
    name="osf",
    verb="adapt",
    paper="arXiv:2504.07097",
    title="Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
    fidelity="variant",
    differs="The factors themselves are projected after each step, which keeps the protected subspaces under Adam as well; the paper projects gradients, "
    "which does not. The rank that is protected is one share for all layers, without the paper's layer importance.",
    filter=filter.Top(),
    form=form.Branch(of="rest", core=core.Diag(), balance="none", scale="one"),
    budget=Budget(rank=0.5),
    roles={
        "left": roles.Train(),
        "core": roles.Train(),
        "right": roles.Train(),
        "kept": roles.Protect(),
        "base": roles.Freeze(),
    },
    train={"lr": 5e-6},
)
