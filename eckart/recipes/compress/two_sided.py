"""Two-sided metric: input moments and output gradients together, ranks by water-filling on the loss that this predicts."""

from eckart.axes import Budget, Recipe, allocate, metric, roles, score

RECIPE = Recipe(
    name="two_sided",
    verb="compress",
    paper="arXiv:1503.05671",
    title="Kronecker-factored metric (the family of IO-SVD, KFAC-SVD and DipSVD)",
    fidelity="idea",
    differs="The papers of this family were read without their code. Here the out side is the second moment of the loss gradient at the "
    "layer's output (for encoders: of random projections of the embedding), clamped at 1e-4 of its largest eigenvalue, and ranks "
    "come from water-filling on the squared singular values of So W Si. The variant `weight_grads` takes both sides from products of each "
    "sample's weight gradient, Shampoo's factors (arXiv:1802.09568).",
    metric=metric.Both(into=metric.InputGram(power=0.5), out=metric.GradGram(power=0.5, clamp=1e-4)),
    score=score.PredictedLoss(),
    allocate=allocate.WaterFill(),
    budget=Budget(keep=0.8),
    roles={"up": roles.Freeze(), "down": roles.Freeze()},
    variants={"moments": {}, "weight_grads": {"metric": metric.WeightGrads()}},
)
