"""RDP-LoRA: adapt only the blocks at which the path of the hidden state through the model turns."""

from eckart.axes import Budget, Recipe, form, roles, source, target

RECIPE = Recipe(
    name="rdp_lora",
    verb="adapt",
    paper="arXiv:2604.19321",
    title="RDP LoRA: Geometry-Driven Identification for Parameter-Efficient Adaptation in Large Language Models",
    fidelity="idea",
    differs="From the abstract; neither code nor details could be read. Points are mean states of a text, then of all texts, scaled to length 1; a point stands for "
    "the block that made it; the end of the path does not count; the number of blocks is a share, of which the abstract gives one example (13 of 36). "
    "Rank and rates are ours.",
    target=target.Turns(share=13 / 36),
    source=source.Zero(),
    factor=None,
    filter=None,
    form=form.Branch(of="fresh", left="zero", right="kaiming", scale="alpha/r", minus="nothing"),
    budget=Budget(rank=8),
    roles={"left": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    train={"alpha": "2r", "lr": 2e-4, "dropout": 0.0},
)
