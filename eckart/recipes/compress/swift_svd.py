"""Swift-SVD: closed form from the output's second moment, ranks by block influence and local error."""

from eckart.axes import Budget, Recipe, allocate, form, metric, roles, score

RECIPE = Recipe(
    name="swift_svd",
    verb="compress",
    paper="arXiv:2604.01609",
    title="Swift-SVD: Theoretical Optimality Meets Practical Efficiency in Low-Rank LLM Compression",
    fidelity="variant",
    differs="The output's second moment is W G W^T with G that of the input, which layers share. The size of an output counts relative to its kind, "
    "since the logarithm of a bare norm depends on units; of the published mixing exponents, tried on held-out text, the released script's 0.6 is "
    "taken.",
    metric=metric.InputGram(power=0.5),
    score=score.InfluenceAndLoss(),
    allocate=allocate.Pool(floor=0.5, alpha=0.6),
    form=form.Pair(balance="right"),
    budget=Budget(keep=0.8),
    roles={"up": roles.Freeze(), "down": roles.Freeze()},
)
