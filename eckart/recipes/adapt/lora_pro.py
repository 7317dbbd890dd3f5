"""LoRA-Pro: let both factors step so that their product moves as near to full fine-tuning as it can."""

from eckart.axes import Budget, Recipe, form, gradient, roles, source

RECIPE = Recipe(
    name="lora_pro",
    verb="adapt",
    paper="arXiv:2407.18242",
    title="LoRA-Pro: Are Low-Rank Adapters Properly Optimized?",
    fidelity="variant",
    differs="Small Gram matrices are inverted without the directions that hold only rounding, where the released code adds 1e-8; the scale is the adapter's own, "
    "there a constant 16 / 8; bias correction begins at the first step, there at the second. Moments of the full matrix are kept in float32.",
    source=source.Zero(),
    factor=None,
    filter=None,
    form=form.Branch(of="fresh", left="zero", right="kaiming", scale="alpha/r", minus="nothing"),
    budget=Budget(rank=8),
    roles={"left": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    gradient=(gradient.Equivalent(moments="adamw", betas=(0.9, 0.999)),),
    train={"alpha": "2r", "lr": 2e-5, "dropout": 0.0},
    variants={"adamw": {}, "sgd": {"gradient": (gradient.Equivalent(moments="optimiser"),)}},
)
