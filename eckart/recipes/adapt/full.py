"""Full fine-tuning: train every weight of the linear layers, as the yardstick of all adapters."""

from eckart.axes import Budget, Recipe, form, roles, source

RECIPE = Recipe(
    name="full",
    verb="adapt",
    paper="arXiv:2106.09685",
    title="Full fine-tuning of the linear layers",
    fidelity="variant",
    differs="The change of each weight trains beside a weight that keeps its bits, in float32; weight decay acts on the change. Embeddings, norms and biases do not "
    "train. The source is LoRA's paper, which has it as its baseline.",
    source=source.Zero(),
    factor=None,
    filter=None,
    form=form.Whole(),
    budget=Budget(keep=1.0),
    roles={"whole": roles.Train(), "base": roles.Freeze()},
    train={"lr": 1e-5},
)
