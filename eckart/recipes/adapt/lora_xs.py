"""LoRA-XS: train one r x r matrix between the frozen leading singular vectors of the weight."""

from eckart.axes import Budget, Recipe, core, filter, form, roles

RECIPE = Recipe(
    name="lora_xs",
    verb="adapt",
    paper="arXiv:2405.17604",
    title="LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
    filter=filter.Top(),
    form=form.Branch(of="kept", core=core.Dense(init="normal:1e-5"), balance="right", absorb=False, minus="nothing", scale="alpha/r"),
    budget=Budget(rank=16),
    roles={"left": roles.Freeze(), "core": roles.Train(), "right": roles.Freeze(), "base": roles.Freeze()},
    train={"alpha": "r", "lr": 1e-3},
)
