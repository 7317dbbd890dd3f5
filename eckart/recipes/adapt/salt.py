"""SALT: scale and shift the leading tenth of the singular values, and train a low-rank update among the others."""

from eckart.axes import Budget, Recipe, core, filter, form, roles

RECIPE = Recipe(
    name="salt",
    verb="adapt",
    paper="arXiv:2503.16055",
    title="SALT: Parameter-Efficient Fine-Tuning via Singular Value Adaptation with Low-Rank Transformation",
    fidelity="variant",
    differs="Only the diagonal of the core is kept from turning negative, as singular values must be; the released code (variant `released`) clips every "
    "entry, so that negative couplings die and the update is no longer of low rank. Its penalty on the change of the core, of weight 0 there, is left out. "
    "The low-rank update begins at zero, as released for SAM 2; that for SAM 1 is no identity at the start.",
    filter=filter.Top(),
    form=form.Branch(of="kept", core=core.Block(lead=0.1, inner=256, positive="diagonal"), balance="none", scale="one"),
    budget=Budget(keep=1.0),  # every triple
    roles={"left": roles.Freeze(), "core": roles.Train(), "right": roles.Freeze(), "base": roles.Freeze()},
    train={"lr": 1e-4, "weight_decay": 0.01},
    variants={
        "paper": {},
        "released": {"form": form.Branch(of="kept", core=core.Block(lead=0.1, inner=256, positive="all"), balance="none", scale="one")},
    },
)
