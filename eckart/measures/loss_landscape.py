"""Loss-landscape slices: the loss along random, filter-normalised directions and along the steepest eigenvectors of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from ..catalogue.parts import live_key
from ._live import fits, objective, parameters, reasons, settings
from .base import Found, ModelView, OfModel, Record

TOKENS = 1024
POINTS = 21  # of a slice, from -1 to 1
STEPS = 20  # of each Lanczos run
RUNS = 3
TOLERANCE = 1e-2


def compute(view: ModelView) -> Iterable[Record]:
    """One record: four slices, and the criteria of the Hessian's density."""
    return reasons(_records(view), MEASURE.missing)


def _records(view: ModelView) -> Iterator[Record]:
    from ..linalg.symmetric import lanczos, quadrature, signs
    from ..progress import track
    from ..stats.curvature import Hessian, lla_criteria
    from ..stats.landscape import length, normalise, random_direction, surface

    loss = objective(view, TOKENS)
    hessian = Hessian(loss, parameters(view), hold=True)
    size, steps = hessian.shape[0], min(STEPS, hessian.shape[0])
    fits(size, steps + 4, hessian.dtype.itemsize)
    runs, eigen = [], None
    for i in track(range(RUNS), "Hessian axes"):
        run = lanczos(hessian, signs(size, 1, view.seed, "landscape", str(i))[:, 0], steps)
        if eigen is None:
            eigen = run.extremes(2, 0, tol=TOLERANCE, vectors=True)
        runs.append(run.bare())
    assert eigen is not None
    assert eigen.vectors is not None
    criteria = lla_criteria(quadrature(runs, size))
    weights = {k: hessian.point[k] for k in hessian.names}
    turned = [live_key(s) for s in view.catalogue.sites if s.kind == "linear" and s.view == "transposed"]
    axes: dict[str, dict[str, Any]] = {}
    for i in (1, 2):
        axes[f"random_{i}"] = normalise(random_direction(weights, view.seed, str(i)), weights, "filter", turned=turned)
    for i, (curve, vector) in enumerate(zip(eigen.values.tolist(), eigen.vectors.T, strict=True), 1):
        unit = math.sqrt(2 / abs(curve)) if curve else 1.0  # one step: the quadratic model rises by 1
        axes[f"hessian_{i}"] = {k: unit * d for k, d in hessian.parts(vector).items()}
    at = [2 * i / (POINTS - 1) - 1 for i in range(POINTS)]
    slices = {name: surface(loss, [axis], [at], f"loss along {name}").tolist() for name, axis in axes.items()}
    centre = slices["random_1"][POINTS // 2]
    rise = {f"rise_{kind}": _rise(slices, kind, centre) for kind in ("random", "hessian")}
    value = {
        "loss": centre,
        **rise,
        "r_e": criteria["r_e"],
        "k_hn": criteria["k_hn"],
        "curvatures": eigen.values.tolist(),
        "at": at,
        **slices,
    }
    errors = {"r_e": criteria["r_e_error"], "k_hn": criteria["k_hn_error"], "curvatures": eigen.residuals.tolist()}
    whole = length(weights)
    units = {name: length(axis) / whole for name, axis in axes.items()} if whole else {}
    note = "" if eigen.converged else "the Hessian axes have not settled: read the residuals of their curvatures"
    chosen = {**settings(loss), "parameters": size, "steps": steps, "seed": view.seed, "relative_length_of_a_step": units}
    yield MEASURE.record("", Found(value, errors, note, settings=chosen))


def _rise(slices: dict[str, list[float]], kind: str, centre: float) -> float:
    """Mean rise of the loss over both ends of the slices of a kind."""
    ends = [v for name, values in slices.items() if name.startswith(kind) for v in (values[0], values[-1])]
    return sum(ends) / len(ends) - centre


MEASURE = OfModel(
    name="loss_landscape",
    title="Loss landscape slices and Hessian criteria",
    paper="arXiv:2412.10146",
    estimator="loss at w + t d; random d filter-normalised once, biases and norms at rest; Hessian d an eigenvector of such length that the "
    "quadratic model rises by 1",
    compute=compute,
    settings={"tokens": TOKENS, "points": POINTS, "runs": RUNS, "power": 0.5, "tolerance": TOLERANCE},
    note="of the mean loss on these few tokens; a slice shows two directions of very many. Which direction of r_e and k_hn is better was not verified",
    fidelity="variant",
    differs="slices instead of a 40 x 40 surface (`stats.landscape.surface` takes two axes); the top axes are those of largest curvature, not of "
    "largest modulus; Hessian axes are scaled as a whole, since scaling their rows would turn them; no Adam axes, which need the optimiser",
)
