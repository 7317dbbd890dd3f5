"""SoKA: train the leading Kronecker products of the weight, as many as its spectrum shows before the knee."""

from eckart.axes import Budget, Recipe, allocate, factor, filter, form, roles

RECIPE = Recipe(
    name="soka",
    verb="adapt",
    paper="arXiv:2506.15251",
    title="Singular Value Decomposition on Kronecker Adaptation for Large Language Model",
    fidelity="idea",
    differs="From the abstract and a third party's summary; no code was found. Ours to choose: factors as square as divisors allow, 90% of the energy or the "
    "knee of the singular values, whichever is less, singular values half in each factor, ranks decided once and never pruned again.",
    factor=factor.Kronecker(),
    filter=filter.Top(),
    allocate=allocate.Elbow(),
    form=form.Kron(),
    budget=Budget(energy=0.9),
    roles={"outer": roles.Train(), "inner": roles.Train(), "base": roles.Freeze()},
    train={"lr": 2e-4, "dropout": 0.0},
)
