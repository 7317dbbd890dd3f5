"""MoDeGPT: fewer hidden units and narrower heads; matrices stay dense, only smaller."""

from eckart.axes import Budget, Recipe, allocate, form, group, roles, score

RECIPE = Recipe(
    name="modegpt",
    verb="compress",
    paper="arXiv:2408.09632",
    title="MoDeGPT: Modular Decomposition for Large Language Model Compression",
    fidelity="variant",
    differs="No official code was found: from the paper's description. Heads of a layer get one width for queries, keys and values, which plain "
    "attention classes demand; under rotary codes they keep the same frequencies; values and outputs are reduced by what attention passes on, "
    "and the output matrix is refitted across heads. The temperature of the allocation is in units of the mean influence.",
    group=group.Channels(),
    score=score.BlockInfluence(),
    allocate=allocate.Softmax(temperature=1.0),
    form=form.Smaller(by="leverage"),
    budget=Budget(keep=0.8),
    roles={"dense": roles.Freeze()},
)
