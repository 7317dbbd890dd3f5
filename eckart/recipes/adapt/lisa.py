"""LISA: fine-tune whole weights, of a few randomly drawn blocks at a time, so that the optimiser remembers only those."""

from eckart.axes import Budget, Recipe, form, refresh, roles, source, target

RECIPE = Recipe(
    name="lisa",
    verb="adapt",
    paper="arXiv:2403.17919",
    title="LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
    fidelity="variant",
    differs="Weights keep their bits and train as a change beside them, in float32: the optimiser's memory is that of the paper, the model's is a weight more. "
    "What the optimiser remembers of a resting block is dropped, which the released code fails to do. Norms and biases do not train; embeddings and the "
    "head do throughout, as in the paper, but not where they share one tensor. Blocks are drawn uniformly, as in the released code.",
    target=target.Linears(skip=("pooler",), blocks=False, embeddings=True),
    source=source.Zero(),
    factor=None,
    filter=None,
    form=form.Whole(),
    budget=Budget(keep=1.0),
    roles={"whole": roles.Train(), "base": roles.Freeze()},
    refresh=(refresh.Sample(blocks=2, every=20),),
    train={"lr": 2e-5},
)
