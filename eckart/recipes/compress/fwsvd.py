"""FWSVD: weight the input channels by Fisher information, the squared gradients of the task loss summed over outputs."""

from eckart.axes import Budget, Recipe, metric, roles

RECIPE = Recipe(
    name="fwsvd",
    verb="compress",
    paper="arXiv:2207.00112",
    title="Language model compression with weighted low-rank factorization",
    fidelity="variant",
    differs="No retraining follows here, on which the paper relies; where a model has no task loss, gradients are those of random "
    "projections of its embedding.",
    metric=metric.InputScale(of="fisher", power=0.5, floor=1e-6, per="sample"),
    budget=Budget(keep=0.8),
    roles={"up": roles.Train(), "down": roles.Train()},
)
