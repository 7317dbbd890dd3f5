"""Cross Initialization: new tokens begin with what the text encoder makes of known words, and train close to that.

Add the tokens first (`tokenizer.add_tokens`, `model.resize_token_embeddings`); calibration is the phrases to begin from, a list of names for instance.
"""

from eckart.axes import Budget, Recipe, form, penalty, roles, source, target

RECIPE = Recipe(
    name="cross_init",
    verb="adapt",
    paper="arXiv:2312.15905",
    title="Cross Initialization for Personalized Text-to-Image Generation",
    fidelity="variant",
    differs="Only the new rows are parameters, where the released code steps the whole table and restores it. The distance in the penalty is smoothed at zero. "
    "The sequence is not padded to 77 tokens, which a causal encoder does not see. The task's loss (denoising in the paper) is the user's.",
    target=target.Vocabulary(),
    source=source.Encoded(),
    factor=None,
    filter=None,
    form=form.Rows(),
    budget=Budget(rank=2),
    roles={"rows": roles.Train(), "base": roles.Freeze()},
    penalty=(penalty.Anchor(weight=1e-5),),
    train={"lr": 5e-3},
)
