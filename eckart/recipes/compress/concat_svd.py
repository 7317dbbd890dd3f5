"""Concatenated matrix SVD: matrices share one basis where a bound or an estimate says that it loses little."""

from eckart.axes import Budget, Recipe, form, group, metric, roles

RECIPE = Recipe(
    name="concat_svd",
    verb="compress",
    paper="arXiv:2601.11626",
    title="Concatenated Matrix SVD: Compression Bounds, Incremental Approximation, and Error-Constrained Clustering",
    fidelity="variant",
    differs="Matrices without partners get a pair of their own (published: stay dense, --set group.singletons=dense), so that budgets of parameters "
    "compare with other systems; matrices meet on the side of the residual stream; the norm bound counts the r largest singular values of a "
    "first block with more than r columns, without which it is no bound.",
    group=group.ErrorClusters(eps=0.1, predictor="truncated", order="norm", patience=10, oversample=5),
    metric=metric.Identity(),
    form=form.SharedBasis(),
    budget=Budget(keep=0.8),
    roles={"basis": roles.Freeze(), "coeff": roles.Freeze()},
)
