"""Atomic Feature Mimicking: principal components of a layer's centred output; the mean output stays exact through the bias."""

from eckart.axes import Budget, Recipe, form, metric, roles

RECIPE = Recipe(
    name="afm",
    verb="compress",
    paper="doi:10.1609/aaai.v37i9.26304",
    title="Compressing Transformers: Features Are Low-Rank, but Weights Are Not!",
    fidelity="variant",
    differs="The covariance of the output comes from the moments of the input (W C W^T), which layers that read the same input share; "
    "both biases of the paper's pair are added into one. Embedding tables on request: --set target.embeddings=true.",
    metric=metric.InputGram(power=0.5, centred=True, keep_mean=True),
    form=form.Pair(balance="right"),
    budget=Budget(keep=0.8),
    roles={"up": roles.Train(), "down": roles.Train()},
)
