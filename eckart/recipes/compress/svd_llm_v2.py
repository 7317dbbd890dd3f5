"""SVD-LLM V2: the truncation of SVD-LLM, with more removed from those matrices of a kind that lose little."""

from eckart.axes import Budget, Recipe, allocate, metric, roles, score

RECIPE = Recipe(
    name="svd_llm_v2",
    verb="compress",
    paper="arXiv:2503.12340",
    title="SVD-LLM V2: Optimizing Singular Value Truncation for Large Language Model Compression",
    fidelity="variant",
    differs="No code of it was released: from the paper's description. Among matrices of one kind the removed share goes with 1 / log(loss at the "
    "uniform rank); losses are taken relative to the smallest times e, since the paper leaves their unit open and the logarithm of a loss below "
    "one has the wrong sign.",
    metric=metric.InputGram(power=0.5),
    score=score.PredictedLoss(),
    allocate=allocate.InverseLog(),
    budget=Budget(keep=0.8),
    roles={"up": roles.Freeze(), "down": roles.Freeze()},
)
