"""Second derivatives of a loss as symmetric operators: the Hessian, and its Gauss-Newton part.

A product costs about two forward and two backward passes over the batches. Batches are summed in their order, in float64.
Pearlmutter 1994 (doi:10.1162/neco.1994.6.1.147); Schraudolph 2002 (doi:10.1162/08997660260028683).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import Refused
from ..linalg.operator import Operator
from ..linalg.symmetric import Quadrature
from .objective import Objective


class Curvature(Operator):
    """A second derivative of an `Objective` in some of its parameters, as one long vector. Base of the two below.

    Args:
        objective: the loss.
        names: parameters that vary, in the order of the vector; None takes all real ones of the model.
        hold: keep the graph of every batch between products: 2 to 3 times faster, for the memory of all activations and their gradients.

    Raises:
        Refused: no such parameter; in a product, a loss that is not finite or a layer without a second derivative.
    """

    def __init__(self, objective: Objective, names: Sequence[str] | None = None, *, hold: bool = False) -> None:
        own = {k: p for k, p in objective.model.named_parameters() if p.is_floating_point()}
        chosen = tuple(own if names is None else names)
        unknown = [k for k in chosen if k not in own]
        if unknown or not chosen:
            raise Refused(f"curvature: the model has no real parameter {unknown[0]!r}." if unknown else "curvature: no parameter is named.")
        self.objective, self.names, self.hold = objective, chosen, hold
        self.sizes = [own[k].numel() for k in chosen]
        self.shapes = [own[k].shape for k in chosen]
        self.point = objective.state()
        self._graphs: dict[int, Any] = {}
        size = sum(self.sizes)
        super().__init__((size, size), objective.compute, next(iter(own.values())).device)

    def vector(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The long vector of tensors by name; those that are not named count as zero."""
        zero = [parts[k].reshape(-1) if k in parts else torch.zeros(n) for k, n in zip(self.names, self.sizes, strict=True)]
        return torch.cat([z.to(self.device, self.dtype) for z in zero])

    def parts(self, vector: Tensor) -> dict[str, Tensor]:
        """The tensors of a long vector, by name; views."""
        split = vector.split(self.sizes)
        return {k: p.reshape(s) for k, p, s in zip(self.names, split, self.shapes, strict=True)}

    def matmat(self, X: Tensor) -> Tensor:
        """H X, (P, k)."""
        total = torch.zeros(X.shape, dtype=torch.float64, device=self.device)
        columns = [list(self.parts(x).values()) for x in X.to(self.device, self.dtype).T]
        with torch.enable_grad():
            for i in range(len(self.objective.batches)):
                graph = self._graphs.get(i) or self._build(i)
                for c, column in enumerate(columns):
                    total[:, c] += torch.cat([p.detach().reshape(-1) for p in self._apply(graph, column)])
                if self.hold:
                    self._graphs[i] = graph
        return (total / self.objective.total).to(self.dtype)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """H Y: the operator is symmetric."""
        return self.matmat(Y)

    def _term(self, i: int) -> tuple[list[Tensor], Tensor, Any]:
        """(leaves, summed loss, output) of a batch."""
        leaves = [self.point[k].clone().requires_grad_() for k in self.names]
        loss, output = self.objective.term({**self.point, **dict(zip(self.names, leaves, strict=True))}, i)
        if not bool(torch.isfinite(loss)):
            raise Refused(f"loss: not finite in calibration batch {i}. Check the weights (eckart inspect), or run in float32.")
        return leaves, loss, output

    def _build(self, i: int) -> Any:
        raise NotImplementedError

    def _apply(self, graph: Any, column: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError


class Hessian(Curvature):
    """H = d²L/dw², by double backward. Indefinite away from a minimum.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> L = Objective(net, [torch.eye(2, dtype=torch.float64)], loss=lambda y, x: 0.5 * y.square().sum())
        >>> Hessian(L).to_dense()
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """

    def _build(self, i: int) -> Any:
        leaves, loss, _ = self._term(i)
        return leaves, _grad([loss], leaves, None, create=True)

    def _apply(self, graph: Any, column: list[Tensor]) -> list[Tensor]:
        leaves, slopes = graph
        return _grad(slopes, leaves, column)


class GaussNewton(Curvature):
    """G = J^T (d²l/dz²) J with z the output and J = dz/dw: what the Hessian would be if the network were linear in its parameters.

    Positive semidefinite where the loss is convex in the output. For cross-entropy it is the Fisher information (labels drawn from the model).
    The output is the model's tensor, or its `.logits`; the loss must read nothing else of it.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> L = Objective(net, [torch.eye(2, dtype=torch.float64)], loss=lambda y, x: 0.5 * y.square().sum())
        >>> GaussNewton(L).to_dense()
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """

    def _build(self, i: int) -> Any:
        leaves, loss, output = self._term(i)
        z = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if z is None:
            raise Refused(f"Gauss-Newton: expected an output tensor or .logits, found {type(output).__name__}.")
        slope = _grad([loss], [z], None, create=True)
        dummy = torch.zeros_like(z, requires_grad=True)
        pulled = _grad([z], leaves, [dummy], create=True)  # J^T u, linear in u: its derivative in u, applied to v, is J v
        return leaves, z, slope, dummy, pulled

    def _apply(self, graph: Any, column: list[Tensor]) -> list[Tensor]:
        leaves, z, slope, dummy, pulled = graph
        push = _grad(pulled, [dummy], column)
        return _grad([z], leaves, _grad(slope, [z], push))


def _grad(of: list[Tensor], to: list[Tensor], along: list[Tensor] | None, *, create: bool = False) -> list[Tensor]:
    """Vector-Jacobian products, on a graph that stays; zeros where nothing depends on anything."""
    live = [j for j, t in enumerate(of) if t.requires_grad]
    if not live:
        return [torch.zeros_like(t) for t in to]
    weights = None if along is None else [along[j] for j in live]
    try:
        found = torch.autograd.grad(
            [of[j] for j in live], to, weights, create_graph=create, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    except RuntimeError as error:
        if "not implemented" not in str(error) and "double backward" not in str(error):
            raise
        raise Refused(f"curvature: a layer of the model has no second derivative: {str(error).splitlines()[0]}") from error
    return list(found)


def lla_criteria(q: Quadrature, power: float = 0.5) -> dict[str, Any]:
    """The criteria of Loss Landscape Analysis (arXiv:2412.10146) on a Hessian density, as means over its runs with their standard errors.

    `r_e` = |lowest node / highest node|; `k_hn` = sum over nodes < 0 of |node weight|^n over the same sum for nodes > 0. Neither is a count of
    negative eigenvalues: K_hn depends on n and on the number of nodes, and is comparable only at equal settings.

    Args:
        q: density of the Hessian.
        power: n.

    Returns:
        `r_e`, `k_hn`, and `r_e_error`, `k_hn_error` (None for one run). None where nothing is positive.

    Example:
        >>> nodes = torch.tensor([[-1.0, 4.0]], dtype=torch.float64)
        >>> found = lla_criteria(Quadrature(nodes, torch.full((1, 2), 0.5, dtype=torch.float64), 2))
        >>> found["r_e"], found["k_hn"]
        (0.25, 0.5)
    """
    terms = (q.nodes * q.weights).abs() ** power
    upper, lower = (terms * (q.nodes > 0)).sum(1), (terms * (q.nodes < 0)).sum(1)
    highest, lowest = q.nodes.amax(1), q.nodes.amin(1)
    if not bool((highest > 0).all()):
        return {"r_e": None, "k_hn": None, "r_e_error": None, "k_hn_error": None}
    out: dict[str, Any] = {}
    for name, each in (("r_e", (lowest / highest).abs()), ("k_hn", lower / upper)):
        out[name] = float(each.mean())
        out[name + "_error"] = float(each.std(correction=1)) / len(each) ** 0.5 if len(each) > 1 else None
    return out
