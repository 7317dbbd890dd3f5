"""NLoRA: begin a LoRA with a middle matrix from the leading rows and columns of the weight, the Nyström way."""

from eckart.axes import Budget, Recipe, core, factor, filter, form, roles

RECIPE = Recipe(
    name="nlora",
    verb="adapt",
    paper="arXiv:2502.14482",
    title="NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models",
    fidelity="variant",
    differs="The middle matrix is the regularised pseudoinverse of the block where rows and columns cross, and the branch is taken away from the base, so "
    "that a layer begins as it was. The released code (variant `released`) takes the block itself and leaves the base as it is: the model then changes "
    "at the start, by an amount that grows with the cube of the weights. Neither was compared with the authors' checkpoints.",
    factor=factor.Nystrom(ridge=0.05),
    filter=filter.Top(),
    form=form.Branch(of="kept", core=core.Dense(), balance="none", scale="alpha/r"),
    budget=Budget(rank=128),
    roles={"left": roles.Train(), "core": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    train={"alpha": "r", "lr": 2e-4, "dropout": 0.0},
    variants={
        "paper": {},
        "released": {
            "factor": factor.Nystrom(middle="block"),
            "form": form.Branch(of="kept", core=core.Dense(), balance="none", scale="alpha/r", absorb=False, minus="nothing"),
        },
    },
)
