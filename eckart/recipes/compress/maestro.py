"""Maestro: train the factors so that any first few of their triples do best alone, let a lasso thin them out, and keep the important ones."""

from eckart.axes import Budget, Recipe, allocate, factor, metric, roles, score

RECIPE = Recipe(
    name="maestro",
    verb="compress",
    paper="arXiv:2308.14929",
    title="Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
    fidelity="variant",
    differs="Starts from a trained model and trains on the calibration text for a while, where the paper trains from scratch; with Adam instead of "
    "SGD, without the second pass of the full model; triples are cut once, at the end, by one threshold that meets the budget. A triple counts as "
    "much as the largest product of norms from it on, where the released code takes the norms of everything from it on.",
    metric=metric.Identity(),
    factor=factor.Ordered(steps=300, lr=1e-3, lasso=1e-6),
    score=score.Value(),
    allocate=allocate.Level(min_drop=0.0),
    budget=Budget(keep=0.8),
    roles={"up": roles.Train(), "down": roles.Train()},
)
