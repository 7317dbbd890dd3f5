"""ASVD: scale the input channels by their mean absolute activation before the SVD."""

from eckart.axes import Budget, Recipe, metric, roles

RECIPE = Recipe(
    name="asvd",
    verb="compress",
    paper="arXiv:2312.05821",
    title="ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
    fidelity="variant",
    differs="Ranks are uniform instead of searched by the loss of every layer and ratio, the head is left alone, "
    "and the SVD is exact where the released code samples it without oversampling.",
    metric=metric.InputScale(of="absmean", power=0.5, offset=1e-6),
    budget=Budget(keep=0.8),
    roles={"up": roles.Freeze(), "down": roles.Freeze()},
)
