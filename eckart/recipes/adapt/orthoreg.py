"""OrthoReg: LoRA with a penalty that wants the singular values of each layer's update at one, so that updates of tasks add up."""

from eckart.axes import Budget, Recipe, form, penalty, roles, source

RECIPE = Recipe(
    name="orthoreg",
    verb="adapt",
    paper="arXiv:2604.17078",
    title="Understanding and Enforcing Weight Disentanglement in Task Arithmetic",
    fidelity="variant",
    differs="The norm is smoothed at zero and measured through the r x r Grams of the factors, equal in exact arithmetic; its gradient is added once per step, after "
    "clipping. The weight is the example of the README (1.0); the released code's default is none.",
    source=source.Zero(),
    factor=None,
    filter=None,
    form=form.Branch(of="fresh", left="zero", right="kaiming", scale="alpha/r", minus="nothing"),
    budget=Budget(rank=8),
    roles={"left": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    penalty=(penalty.UnitUpdate(weight=1.0, norm="fro", reduce="sum"),),
    train={"alpha": "r", "lr": 1e-4, "weight_decay": 0.1, "dropout": 0.0},
)
