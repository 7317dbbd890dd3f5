"""EVA: begin the right factor with the principal components of the layer's inputs, and give rank to the layers whose inputs they explain best."""

from eckart.axes import Budget, Recipe, filter, form, roles, source, variance

RECIPE = Recipe(
    name="eva",
    verb="adapt",
    paper="arXiv:2410.07170",
    title="Parameter Efficient Fine-tuning via Explained Variance Adaptation",
    fidelity="variant",
    differs="Principal components come from the covariance of all calibration tokens, once, instead of incrementally until they settle.",
    source=source.Moments(centred=True),
    filter=filter.Top(),
    score=variance.Ratio(),
    allocate=variance.GlobalTop(cap=2.0),
    form=form.Branch(of="kept", left="zero", balance="left", scale="alpha/r0", absorb=False, minus="nothing"),
    budget=Budget(total_rank=16.0),
    roles={"left": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    train={"alpha": 1, "lr": 5e-4, "dropout": 0.0},
)
