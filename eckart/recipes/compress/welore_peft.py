"""WeLore-PEFT: cut as WeLore does, then train the factors of the low-rank layers and nothing else."""

from eckart.axes import Budget, Recipe, allocate, recover, roles, score

RECIPE = Recipe(
    name="welore_peft",
    verb="compress",
    paper="arXiv:2407.11239",
    title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    fidelity="variant",
    differs="The cut is that of `welore`, whose threshold is searched for a budget of stored parameters. Training is short and on the calibration "
    "text (published: 10000 steps of batch 4 on C4 at a learning rate of 5e-5), with Adam and without dropout: --set recover.steps=...",
    score=score.MinMax(),
    allocate=allocate.Level(min_drop=0.4999),
    recover=recover.Factors(steps=100, lr=5e-5, goal="task"),
    budget=Budget(keep=0.8),
    roles={"up": roles.Train(), "down": roles.Train()},
)
