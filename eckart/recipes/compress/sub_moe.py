"""Sub-MoE: experts whose outputs are alike are merged in a common subspace, weighted by how often they are chosen."""

from eckart.axes import Budget, Recipe, form, group, roles, target

RECIPE = Recipe(
    name="sub_moe",
    verb="compress",
    paper="arXiv:2506.23266",
    title="Sub-MoE: Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging",
    fidelity="variant",
    differs="No official code was found: from the abstract and a re-implementation. The right factors' weighted mean is computed as the projected "
    "weighted mean of the matrices, which it equals; the share of singular values kept is unknown there and 1 here, so that the merge is the "
    "weighted average. Experts are clustered by the mean cosine of their outputs on all tokens of the layer.",
    target=target.Experts(),
    group=group.Experts(),
    form=form.Merged(energy=1.0),
    budget=Budget(keep=0.75),
    roles={"experts": roles.Freeze(), "router": roles.Freeze()},
)
