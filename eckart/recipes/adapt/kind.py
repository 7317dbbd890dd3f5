"""KIND: split the leading triples of each weight into some that all classes share and groups of which a gate opens one per class.

Train and run with the gate on the classes of the batch: `with eckart.nn.gated.gate(model, classes): ...`. Without one, all groups are open and the layer is whole.
"""

from eckart.axes import Budget, Recipe, core, filter, form, roles

RECIPE = Recipe(
    name="kind",
    verb="adapt",
    paper="arXiv:2408.07337",
    title="KIND: Knowledge Integration and Diversion in Diffusion Models",
    fidelity="idea",
    differs="From the abstract and the equations that a follow-up quotes; no code was found. The paper trains factored diffusion transformers from scratch; here "
    "the leading triples of a given weight are divided, and what lies beside them stays for all classes. Sizes of the parts are ours to choose. Freezing the "
    "shared part for a transfer is not offered.",
    filter=filter.Top(),
    form=form.Gated(of="kept", core=core.Diag(), balance="none", scale="one", shared=0.5, groups=4),
    budget=Budget(rank=16),
    roles={"left": roles.Train(), "core": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    train={"lr": 1e-4, "dropout": 0.0},
)
