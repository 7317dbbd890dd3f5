"""Dobi-SVD: the place where each matrix is cut is trained on the model's loss; the cut itself is the best one for the layer's output."""

from eckart.axes import Budget, Recipe, allocate, metric, roles, score

RECIPE = Recipe(
    name="dobi_svd",
    verb="compress",
    paper="arXiv:2502.02723",
    title="Dobi-SVD: Differentiable SVD for LLM Compression and Some New Perspectives",
    fidelity="variant",
    differs="While positions are trained the directions of each output stay those of the calibration set, where the paper takes the SVD of every "
    "batch and differentiates through it; at a fixed order of directions the soft cut is the same. Without the 8-bit remapping, which stores "
    "more ranks under the same name: parameters are counted as stored. Fewer and shorter steps "
    "than published (20 epochs of 256 samples at a learning rate of 5).",
    metric=metric.InputGram(power=0.5),
    score=score.PredictedLoss(),
    allocate=allocate.TrainedCut(steps=100, lr=1.0, weight=10.0),
    budget=Budget(keep=0.8),
    roles={"up": roles.Freeze(), "down": roles.Freeze()},
)
