"""ALLoRA: LoRA without dropout and without a scale, whose rows step the further the smaller they still are."""

from eckart.axes import Budget, Recipe, form, gradient, roles, source

RECIPE = Recipe(
    name="allora",
    verb="adapt",
    paper="arXiv:2410.09692",
    title="ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
    fidelity="idea",
    differs="From the abstract and secondary sources; no official code was found. The factor is applied to the step that the optimiser makes, not to the gradient, "
    "where Adam would cancel most of it (gradient.row_norm when=gradient does that). Norms are those of the rows of the whole update and scale the rows of "
    "the left factor; variant=factor takes the rows of each factor. How the paper's factor enters per sample could not be checked; eta is a third party's.",
    source=source.Zero(),
    factor=None,
    filter=None,
    form=form.Branch(of="fresh", left="zero", right="kaiming", scale="one", minus="nothing"),
    budget=Budget(rank=8),
    roles={"left": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    gradient=(gradient.RowNorm(eta=2.0, of="product", when="update"),),
    train={"alpha": "r", "lr": 2e-4, "dropout": 0.0},
    variants={"product": {}, "factor": {"gradient": (gradient.RowNorm(eta=2.0, of="factor", when="update"),)}},
)
