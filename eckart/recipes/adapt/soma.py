"""SoMA: train the minor singular components and the biases, freeze the principal ones."""

from eckart.axes import Budget, Recipe, filter, form, roles

RECIPE = Recipe(
    name="soma",
    verb="adapt",
    paper="arXiv:2412.04077",
    title="SoMA: Singular Value Decomposed Minor Components Adaptation for Domain Generalizable Representation Learning",
    fidelity="variant",
    differs="Biases train as a change from zero, per adapter, so weight decay draws towards the pretrained bias. Blocks that the paper leaves "
    "frozen are the user's choice (target), and its annealed weight decay is the optimiser's. Singular values below 1e-6 of the largest "
    "count as that: the branch of a rank-deficient weight would begin without gradients.",
    filter=filter.Bottom(),
    form=form.Branch(of="kept", balance="even", scale="alpha/r", bias=True, floor=1e-6, split=True),
    budget=Budget(rank=16),
    roles={"left": roles.Train(), "right": roles.Train(), "bias": roles.Train(), "base": roles.Freeze()},
    train={"alpha": "r", "lr": 1e-4, "weight_decay": 0.05},
)
