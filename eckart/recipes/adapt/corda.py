"""CorDA: train the components of the weight that the covariance of its inputs puts last (knowledge is kept) or first (a task is previewed)."""

from eckart.axes import Budget, Recipe, filter, form, metric, roles

RECIPE = Recipe(
    name="corda",
    verb="adapt",
    paper="arXiv:2406.05223",
    title="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient Fine-tuning",
    fidelity="variant",
    differs="The second moment is that of all tokens of the calibration text; the released code first divides each sample by its largest entry. It is "
    "never inverted, so the ridge of 1% needs no doubling, which guards a float32 inverse there.",
    metric=metric.InputGram(power=1.0, ridge=0.01),
    filter=filter.Top(),
    form=form.Branch(of="kept", balance="values", scale="alpha/r"),
    budget=Budget(rank=128),
    roles={"left": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    train={"alpha": "r", "lr": 2e-5, "dropout": 0.0},
    variants={"ipm": {"filter": filter.Top()}, "kpm": {"filter": filter.Bottom()}},
)
