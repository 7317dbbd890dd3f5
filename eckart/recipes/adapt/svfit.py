"""SVFit: train the leading singular values alone, in the frozen basis of their singular vectors."""

from eckart.axes import Budget, Recipe, core, filter, form, roles

RECIPE = Recipe(
    name="svfit",
    verb="adapt",
    paper="arXiv:2409.05926",
    title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
    fidelity="idea",
    differs="From the abstract, no code was found. What is trained is the change of each singular value, from zero, so that weight decay draws "
    "towards the pretrained weight; the rank that holds 99% of the information is read as 99% of the squared spectrum.",
    filter=filter.Top(),
    form=form.Branch(of="kept", core=core.Diag(init="zero"), balance="none", scale="one", minus="nothing"),
    budget=Budget(energy=0.99),
    roles={"left": roles.Freeze(), "core": roles.Train(), "right": roles.Freeze(), "base": roles.Freeze()},
    train={"lr": 1e-2},
)
