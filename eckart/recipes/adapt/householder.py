"""Householder projector: train the leading singular vectors of a weight as products of reflections, which keeps them orthonormal."""

from eckart.axes import Budget, Recipe, filter, form, roles

RECIPE = Recipe(
    name="householder",
    verb="adapt",
    paper="arXiv:2307.08012",
    title="Householder Projector for Unsupervised Latent Semantics Discovery",
    fidelity="variant",
    differs="As many reflections as there are directions, where the paper trains m and n of them; signs are carried apart, without which half of all bases are out "
    "of reach. Bases begin as those of the weight: the released code's conversion is wrong, and not called there. By default (variant `kept`) singular values and "
    "the rest of the weight stay, so that a layer begins as it was; variant `paper` replaces the whole weight by a flat projector, as for style modulation.",
    filter=filter.Top(),
    form=form.Householder(),
    budget=Budget(rank=10),
    roles={"left": roles.Train(), "core": roles.Freeze(), "right": roles.Train(), "base": roles.Freeze()},
    train={"lr": 1e-3, "dropout": 0.0},
    variants={"kept": {}, "paper": {"form": form.Householder(spectrum="ones", rest="drop", minus="kept")}},
)
