"""Basis Sharing: pairs of neighbouring layers share one basis for the matrices that read the residual stream, each with coefficients of its own."""

from eckart.axes import Budget, Recipe, form, group, metric, refine, roles

RECIPE = Recipe(
    name="basis_sharing",
    verb="compress",
    paper="arXiv:2410.03765",
    title="Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression",
    fidelity="variant",
    differs="The basis comes from eigenvectors in projector form, never through an inverse; coefficients are always refitted, on each layer's own "
    "inputs in the original model (published: above 40% removed, on inputs of the compressed one: --set refine.inputs=propagated).",
    group=group.Adjacent(count=2),
    metric=metric.InputGram(power=0.5),
    form=form.SharedBasis(),
    refine=refine.LeastSquares(update=("up",), bias="never"),
    budget=Budget(keep=0.8),
    roles={"basis": roles.Freeze(), "coeff": roles.Freeze()},
)
