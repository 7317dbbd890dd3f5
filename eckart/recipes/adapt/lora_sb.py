"""LoRA-SB: begin at the low-rank image of the first step that full fine-tuning would make, and train the r x r matrix in its middle."""

from eckart.axes import Budget, Recipe, core, filter, form, roles, source

RECIPE = Recipe(
    name="lora_sb",
    verb="adapt",
    paper="arXiv:2411.19557",
    title="Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
    fidelity="variant",
    differs="The output is not unchanged at the start: the first step has been made. Its size is a setting (source.step), where the released code divides the "
    "learning rate by the warm-up steps of its own run. Factors are exact and float32, there randomised and bfloat16.",
    source=source.Gradient(step=2e-6),
    filter=filter.Top(),
    form=form.Branch(of="kept", core=core.Dense(), balance="none", scale="alpha/r", minus="nothing"),
    budget=Budget(rank=96),
    roles={"left": roles.Freeze(), "core": roles.Train(), "right": roles.Freeze(), "base": roles.Freeze()},
    train={"alpha": "r", "lr": 1e-4, "dropout": 0.0},
)
