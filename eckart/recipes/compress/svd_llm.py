"""SVD-LLM (W): least squared error of every layer's output on calibration inputs, from the second moment of the input."""

from eckart.axes import Budget, Recipe, metric, roles

RECIPE = Recipe(
    name="svd_llm",
    verb="compress",
    paper="arXiv:2403.07378",
    title="SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    fidelity="variant",
    differs="Same minimum in projector form, U U^T W with the left vectors of W S: no root S of the second moment is inverted, so a singular one is "
    "no special case. Stage one only: --set refine.kind=least_squares refits the up factor, --set recover.kind=lora trains.",
    metric=metric.InputGram(power=0.5),
    budget=Budget(keep=0.8),
    roles={"up": roles.Freeze(), "down": roles.Freeze()},
)
