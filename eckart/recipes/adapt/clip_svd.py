"""CLIP-SVD: train every singular value of every matrix, in the frozen basis of its singular vectors; q, k and v of a fused layer apart."""

from eckart.axes import Budget, Recipe, core, filter, form, roles

RECIPE = Recipe(
    name="clip_svd",
    verb="adapt",
    paper="arXiv:2509.03740",
    title="Singular Value Few-shot Adaptation of Vision-Language Models",
    fidelity="variant",
    differs="Below full rank the rest of the weight stays, where the released code drops it. Layers that a parent reads without calling them (the "
    "projections of torch.nn.MultiheadAttention, CLIP's text and image projection) hold no adapter. As published, weight decay on the singular "
    "values decays the pretrained weights; SVFit trains their change instead.",
    filter=filter.Top(),
    form=form.Branch(of="kept", core=core.Diag(), balance="none", scale="one", split=True),
    budget=Budget(keep=1.0),  # every triple
    roles={"left": roles.Freeze(), "core": roles.Train(), "right": roles.Freeze(), "base": roles.Freeze()},
    train={"lr": 5e-4, "weight_decay": 0.01},
)
