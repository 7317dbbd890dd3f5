"""LoRD: one-shot decomposition of code language models by the covariance of each layer's output."""

from eckart.axes import Budget, Recipe, form, metric, roles

RECIPE = Recipe(
    name="lord",
    verb="compress",
    paper="arXiv:2309.14021",
    title="LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression",
    fidelity="idea",
    differs="No official code was found: the mathematics is that of Atomic Feature Mimicking, as the paper describes it; its calibration "
    "size, its rank per layer and whether inputs are propagated are unknown, so ranks are uniform and inputs are the original model's.",
    metric=metric.InputGram(power=0.5, centred=True, keep_mean=True),
    form=form.Pair(balance="right"),
    budget=Budget(keep=0.8),
    roles={"up": roles.Train(), "down": roles.Train()},
)
