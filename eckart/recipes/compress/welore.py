"""WeLore: one threshold on min-max scaled spectra splits layers into low-rank ones (stored as pairs, trained) and dense ones (frozen)."""

from eckart.axes import Budget, Recipe, allocate, roles, score

RECIPE = Recipe(
    name="welore",
    verb="compress",
    paper="arXiv:2407.11239",
    title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    fidelity="variant",
    differs="The threshold is searched for a budget of stored parameters, where the paper targets the mean share of dropped ranks, which "
    "saves nothing on square matrices at one half; the fine-tuning half is not part of this recipe.",
    score=score.MinMax(),
    allocate=allocate.Level(min_drop=0.4999),
    budget=Budget(keep=0.8),
    roles={"up": roles.Train(), "down": roles.Train()},
)
