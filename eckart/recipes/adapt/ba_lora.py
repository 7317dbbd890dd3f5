"""BA-LoRA: PiSSA, with terms on the outputs: stay near the pretrained model, stay spread, let few directions lead."""

from eckart.axes import Budget, Recipe, form, loss, roles

RECIPE = Recipe(
    name="ba_lora",
    verb="adapt",
    paper="arXiv:2408.04556",
    title="BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models",
    fidelity="variant",
    differs="Terms are means over the positions that are learnt from; the released code counts padding, and sums the divergence over the length. It takes the "
    "singular values without their gradient, so that its third term does nothing, and of a batch laid out in one row; here they are those of (positions x "
    "vocabulary), on at most 256 positions, with their gradient. The reference is the pretrained model.",
    form=form.Branch(balance="even", scale="alpha/r"),
    budget=Budget(rank=128),
    roles={"left": roles.Train(), "right": roles.Train(), "base": roles.Freeze()},
    loss=(
        loss.Consistency(weight=1e-4, measure="kl"),
        loss.Diversity(weight=3e-4, measure="entropy"),
        loss.LeadingShare(weight=1e-4, k=3),
    ),
    train={"alpha": "r", "lr": 2e-5, "dropout": 0.0},
    variants={
        "nlg": {},
        "nlu": {
            "loss": (
                loss.Consistency(weight=1e-4, measure="mse"),
                loss.Diversity(weight=3e-4, measure="covariance"),
                loss.LeadingShare(weight=1e-4, k=3),
            ),
        },
    },
)
