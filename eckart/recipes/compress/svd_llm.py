"""SVD-LLM (W): least squared error of every layer's output on calibration inputs, from the second moment of the input."""

from eckart.axes import Budget, Recipe, metric, roles

RECIPE = Recipe(
    name="svd_llm",
    verb="compress",
    paper="arXiv:2403.07378",
    title="SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    fidelity="variant",
    differs="Same minimum, from eigenvectors of W G W^T instead of a Cholesky factor of G, so a singular G is no special case; "
    "stage one only, without the update of the up factor and without LoRA.",
    metric=metric.InputGram(power=0.5),
    budget=Budget(keep=0.8),
    roles={"up": roles.Freeze(), "down": roles.Freeze()},
)
