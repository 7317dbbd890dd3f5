"""Matrices that need not exist: everything `svd` asks of a matrix is its shape and its products with thin blocks.

Shapes: A is (m, n), `matmat` takes X (n, k), `rmatmat` takes Y (m, k). Sums of squares and Grams are accumulated in float64 whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..errors import Refused, UsageError

Side = Literal["left", "right"]
Rows = Callable[[], Iterable[Tensor]] | Iterable[Tensor]
ROWS = 128  # rows of a block where an operator is walked through: 4 MB of float64 at 4096 columns
PANEL = 1024  # columns converted to float64 at a time in a Gram: 8 MB at 1024 rows
SPLITS = 8  # row blocks of a Gram: only those on and above the diagonal are multiplied, 9/16 of the flops
CHUNK = 1 << 16  # numbers converted to float64 at a time in a sum of squares: stays in the cache, no fresh pages


class Operator:
    """A real matrix known by its products. Not a tensor: entries are seen only through `row_blocks` and `to_dense`.

    A subclass defines `matmat`, `rmatmat` and, where it can do better than products with unit vectors, `row_blocks`.

    Args:
        shape: (m, n).
        dtype: float32 or float64, of the products.
        device: where the products are made.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device

    def matmat(self, X: Tensor) -> Tensor:
        """A X, (m, k)."""
        raise NotImplementedError

    def rmatmat(self, Y: Tensor) -> Tensor:
        """A^T Y, (n, k)."""
        raise NotImplementedError

    def row_blocks(self) -> Iterator[Tensor]:
        """The matrix as consecutive dense blocks of rows, each at most one in memory at a time."""
        m = self.shape[0]
        for start in range(0, m, ROWS):
            stop = min(m, start + ROWS)
            unit = torch.zeros(m, stop - start, dtype=self.dtype, device=self.device)
            unit[start:stop].fill_diagonal_(1)
            yield self.rmatmat(unit).T

    def fro2(self) -> float:
        """Squared Frobenius norm, summed in float64; NaN or infinite when an entry is."""
        return sum(sum_of_squares(block) for block in self.row_blocks())

    def gram(self, side: Side) -> Tensor:
        """A A^T ("left", (m, m)) or A^T A ("right", (n, n)), in float64."""
        if side == "left":
            return gram_of(self.to_dense())
        total = torch.zeros(self.shape[1], self.shape[1], dtype=torch.float64, device=self.device)
        for block in self.row_blocks():
            total += gram_of(block.T)
        return total

    def to_dense(self) -> Tensor:
        """The matrix itself (m, n). May be the operator's own storage: do not write into it."""
        return torch.cat(list(self.row_blocks()))

    @property
    def T(self) -> Operator:
        """The transposed operator, without copying."""
        return Transposed(self)


class Transposed(Operator):
    """A^T of an operator A."""

    def __init__(self, base: Operator) -> None:
        super().__init__((base.shape[1], base.shape[0]), base.dtype, base.device)
        self.base = base

    def matmat(self, X: Tensor) -> Tensor:
        return self.base.rmatmat(X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        return self.base.matmat(Y)

    def row_blocks(self) -> Iterator[Tensor]:
        dense = self.to_dense()
        for start in range(0, self.shape[0], ROWS):
            yield dense[start : start + ROWS]

    def fro2(self) -> float:
        return self.base.fro2()

    def gram(self, side: Side) -> Tensor:
        return self.base.gram("right" if side == "left" else "left")

    def to_dense(self) -> Tensor:
        return self.base.to_dense().T

    @property
    def T(self) -> Operator:
        return self.base


class Dense(Operator):
    """A tensor in memory, row-contiguous."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device)
        self.matrix = matrix.contiguous()

    def matmat(self, X: Tensor) -> Tensor:
        return self.matrix @ (X.contiguous() if X.shape[1] <= 64 else X)  # thin blocks: row-major is 1.5 times faster in MKL

    def rmatmat(self, Y: Tensor) -> Tensor:
        return (Y.T.contiguous() @ self.matrix).T

    def row_blocks(self) -> Iterator[Tensor]:
        for start in range(0, self.shape[0], ROWS):
            yield self.matrix[start : start + ROWS]

    def fro2(self) -> float:
        return sum_of_squares(self.matrix)

    def gram(self, side: Side) -> Tensor:
        return gram_of(self.matrix if side == "left" else self.matrix.T)

    def to_dense(self) -> Tensor:
        return self.matrix


class Sum(Operator):
    """A_1 + A_2 + ... with a sign for each."""

    def __init__(self, ops: Sequence[Operator], signs: Sequence[float]) -> None:
        _same(ops, "sum_of")
        super().__init__(ops[0].shape, ops[0].dtype, ops[0].device)
        self.ops, self.signs = tuple(ops), tuple(signs)

    def _add(self, parts: Iterable[Tensor]) -> Tensor:
        total: Tensor | None = None
        for sign, part in zip(self.signs, parts, strict=True):
            total = sign * part if total is None else total.add_(part, alpha=sign)
        assert total is not None
        return total

    def matmat(self, X: Tensor) -> Tensor:
        return self._add(op.matmat(X) for op in self.ops)

    def rmatmat(self, Y: Tensor) -> Tensor:
        return self._add(op.rmatmat(Y) for op in self.ops)

    def to_dense(self) -> Tensor:
        return self._add(op.to_dense() for op in self.ops)

    def row_blocks(self) -> Iterator[Tensor]:
        if all(isinstance(op, Dense) for op in self.ops):
            for blocks in zip(*(op.row_blocks() for op in self.ops), strict=True):
                yield self._add(blocks)
        else:
            yield from Dense(self.to_dense()).row_blocks()


class Concat(Operator):
    """Operators side by side (dim 1) or on top of each other (dim 0), never copied together for a product."""

    def __init__(self, ops: Sequence[Operator], dim: int) -> None:
        _same(ops, "concat", free=dim)
        along = sum(op.shape[dim] for op in ops)
        across = ops[0].shape[1 - dim]
        super().__init__((along, across) if dim == 0 else (across, along), ops[0].dtype, ops[0].device)
        self.ops, self.dim = tuple(ops), dim

    def _apart(self, X: Tensor) -> list[Tensor]:
        return list(X.split([op.shape[self.dim] for op in self.ops]))

    def matmat(self, X: Tensor) -> Tensor:
        if self.dim == 0:
            return torch.cat([op.matmat(X) for op in self.ops])
        parts = [op.matmat(x) for op, x in zip(self.ops, self._apart(X), strict=True)]
        return torch.stack(parts).sum(0)

    def rmatmat(self, Y: Tensor) -> Tensor:
        if self.dim == 1:
            return torch.cat([op.rmatmat(Y) for op in self.ops])
        parts = [op.rmatmat(y) for op, y in zip(self.ops, self._apart(Y), strict=True)]
        return torch.stack(parts).sum(0)

    def row_blocks(self) -> Iterator[Tensor]:
        if self.dim == 0:
            for op in self.ops:
                yield from op.row_blocks()
        else:
            yield from Dense(self.to_dense()).row_blocks()

    def fro2(self) -> float:
        return sum(op.fro2() for op in self.ops)

    def gram(self, side: Side) -> Tensor:
        if (side == "left") != (self.dim == 1):  # the side along which the blocks lie: their cross products are needed
            return gram_of(self.to_dense() if side == "left" else self.to_dense().T)
        total = self.ops[0].gram(side)
        for op in self.ops[1:]:
            total = total + op.gram(side)
        return total

    def to_dense(self) -> Tensor:
        return torch.cat([op.to_dense() for op in self.ops], dim=self.dim)


class Weighted(Operator):
    """L A R, each side a matrix, a diagonal given as a vector, or absent."""

    def __init__(self, op: Operator, left: Tensor | None, right: Tensor | None) -> None:
        rows = op.shape[0] if left is None else left.shape[0]
        cols = op.shape[1] if right is None else right.shape[-1]
        super().__init__((rows, cols), op.dtype, op.device)
        self.op = op
        self.left = None if left is None else left.to(op.device, op.dtype)
        self.right = None if right is None else right.to(op.device, op.dtype)

    def matmat(self, X: Tensor) -> Tensor:
        return _times(self.left, self.op.matmat(_times(self.right, X)))

    def rmatmat(self, Y: Tensor) -> Tensor:
        return _times(_turned(self.right), self.op.rmatmat(_times(_turned(self.left), Y)))

    def to_dense(self) -> Tensor:
        return _times(_turned(self.right), _times(self.left, self.op.to_dense()).T).T

    def row_blocks(self) -> Iterator[Tensor]:
        yield from Dense(self.to_dense()).row_blocks()


class RowStream(Operator):
    """Rows that are produced block by block, again for every product: one block is in memory at a time."""

    def __init__(self, blocks: Rows, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        self._blocks = blocks

    def row_blocks(self) -> Iterator[Tensor]:
        rows = 0
        for block in self._blocks() if callable(self._blocks) else self._blocks:
            if block.ndim != 2 or block.shape[1] != self.shape[1]:
                raise Refused(f"row_stream: expected blocks of shape (k, {self.shape[1]}), found {tuple(block.shape)}.")
            rows += block.shape[0]
            yield block.to(self.device, self.dtype)
        if rows != self.shape[0]:
            raise Refused(
                f"row_stream: expected {self.shape[0]} rows in all, found {rows}. The source must give all its blocks on every pass: "
                "hand over a function that starts again, or a list, not a generator."
            )

    def matmat(self, X: Tensor) -> Tensor:
        return torch.cat([block @ X for block in self.row_blocks()])

    def rmatmat(self, Y: Tensor) -> Tensor:
        total = torch.zeros(self.shape[1], Y.shape[1], dtype=self.dtype, device=self.device)
        start = 0
        for block in self.row_blocks():
            total += block.T @ Y[start : start + block.shape[0]]
            start += block.shape[0]
        return total

    def gram(self, side: Side) -> Tensor:
        if side == "right":
            return super().gram(side)
        total = torch.zeros(self.shape[0], self.shape[0], dtype=torch.float64, device=self.device)
        above = 0
        for upper in self.row_blocks():
            wide = upper.to(torch.float64)
            beside = 0
            for lower in self.row_blocks():
                if beside >= above:
                    part = gram_of(upper) if beside == above else wide @ lower.to(torch.float64).T
                    total[above : above + part.shape[0], beside : beside + part.shape[1]] = part
                    total[beside : beside + part.shape[1], above : above + part.shape[0]] = part.T
                beside += lower.shape[0]
            above += upper.shape[0]
        return total


def dense(matrix: Tensor) -> Operator:
    """A tensor as an operator. Half precision is upcast to float32 once; a transposed view is not copied.

    Args:
        matrix: (m, n), floating point.

    Raises:
        Refused: not two-dimensional, empty, or not real floating point.

    Example:
        >>> dense(torch.ones(2, 3)).fro2()
        6.0
    """
    return as_operator(matrix)


def as_operator(x: Tensor | Operator, name: str = "matrix") -> Operator:
    """An operator from a tensor; operators pass through. `name` is used in messages.

    Raises:
        Refused: not two-dimensional, empty, or not real floating point.
    """
    if isinstance(x, Operator):
        if min(x.shape) < 1:
            raise Refused(f"{name}: expected at least one row and one column, found shape {tuple(x.shape)}.")
        return x
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"{name}: expected a torch.Tensor or an Operator, found {type(x).__name__}.")
    if x.ndim != 2:
        hint = " Batches are not taken: call once per matrix." if x.ndim > 2 else ""
        raise Refused(f"{name}: expected a matrix (two dimensions), found shape {tuple(x.shape)}.{hint}")
    if x.numel() == 0:
        raise Refused(f"{name}: expected at least one row and one column, found shape {tuple(x.shape)}.")
    if x.dtype not in (torch.float32, torch.float64):
        if not x.dtype.is_floating_point:
            raise Refused(f"{name}: expected a real floating-point matrix, found {x.dtype}. Convert it first: matrix.to(torch.float32).")
        x = x.to(torch.float32)
    if x.is_meta or x.layout != torch.strided:
        raise Refused(f"{name}: expected a dense tensor with data, found {'a meta tensor' if x.is_meta else x.layout}.")
    x = x.detach()
    if not x.is_contiguous() and x.T.is_contiguous():
        return Transposed(Dense(x.T))
    return Dense(x)


def sum_of(*ops: Tensor | Operator) -> Operator:
    """A_1 + A_2 + ..., never formed for a product.

    Example:
        >>> a = torch.eye(2)
        >>> sum_of(a, a).to_dense()[0]
        tensor([2., 0.])
    """
    return Sum([as_operator(op) for op in ops], [1.0] * len(ops))


def difference(a: Tensor | Operator, b: Tensor | Operator) -> Operator:
    """A - B, for instance a weight minus what quantisation left of it.

    Example:
        >>> difference(torch.eye(2), torch.eye(2)).fro2()
        0.0
    """
    return Sum([as_operator(a), as_operator(b)], [1.0, -1.0])


def concat(ops: Sequence[Tensor | Operator], dim: int) -> Operator:
    """Operators on top of each other (`dim` 0) or side by side (`dim` 1).

    Example:
        >>> concat([torch.ones(2, 3), torch.ones(2, 1)], dim=1).shape
        (2, 4)
    """
    if dim not in (0, 1):
        raise UsageError(f"concat: dim is 0 (rows below each other) or 1 (side by side), found {dim}.")
    return Concat([as_operator(op) for op in ops], dim)


def weighted(op: Tensor | Operator, left: Tensor | None = None, right: Tensor | None = None) -> Operator:
    """L A R. Not a metric: no root is taken and nothing is inverted.

    Args:
        op: A (m, n).
        left: (m,) the diagonal of L, or L (k, m).
        right: (n,) the diagonal of R, or R (n, k).

    Raises:
        Refused: a side whose size does not fit.

    Example:
        >>> weighted(torch.ones(2, 2), left=torch.tensor([1.0, 2.0])).to_dense()[1]
        tensor([2., 2.])
    """
    base = as_operator(op)
    for what, side, size, at in (("left", left, base.shape[0], -1), ("right", right, base.shape[1], 0)):
        if side is not None and (side.ndim not in (1, 2) or side.shape[at] != size):
            raise Refused(f"weighted: the {what} side must meet {size} {'rows' if at else 'columns'}, found shape {tuple(side.shape)}.")
    return Weighted(base, left, right)


def row_stream(blocks: Rows, shape: tuple[int, int], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Operator:
    """A matrix whose rows come in blocks, one in memory at a time. Every product walks through all of them once.

    Args:
        blocks: a function that returns a fresh iterator over the blocks (k, n), or something that can be iterated again, such as a list.
        shape: (m, n).
        dtype: of the products, float32 or float64.
        device: where the products are made.

    Example:
        >>> x = torch.ones(5, 3)
        >>> row_stream(lambda: x.split(2), (5, 3)).fro2()
        15.0
    """
    if isinstance(blocks, Iterator):
        raise UsageError("row_stream: a generator can be walked through only once. Hand over a function that makes a new one.")
    return RowStream(blocks, shape, dtype, torch.device(device))


def sum_of_squares(x: Tensor) -> float:
    """Sum of the squares of all entries, in float64 without a float64 copy of the tensor."""
    if x.device.type != "cpu":
        return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
    flat = x.reshape(-1)
    if flat.dtype == torch.float64:
        return sum(float(part.dot(part)) for part in flat.split(CHUNK))
    buffer = torch.empty(min(CHUNK, flat.numel()), dtype=torch.float64)
    parts: list[float] = []
    for part in flat.split(CHUNK):
        wide = buffer[: part.numel()].copy_(part)
        parts.append(float(wide.dot(wide)))
    return sum(parts)


def gram_of(rows: Tensor) -> Tensor:
    """rows rows^T in float64, (k, k), exactly symmetric. Only the blocks on and above the diagonal are multiplied."""
    total = upper_gram_of(rows)
    for top, bottom in pairwise(_edges(len(rows))):  # the lower half in place: no second Gram in memory
        diagonal = total[top:bottom, top:bottom]
        diagonal.copy_(torch.triu(diagonal) + torch.triu(diagonal, 1).T)
        total[bottom:, top:bottom] = total[top:bottom, bottom:].T
    return total


def upper_gram_of(rows: Tensor) -> Tensor:
    """rows rows^T in float64, (k, k), on and above the diagonal; what stands below it is no result."""
    k, n = rows.shape
    total = torch.zeros(k, k, dtype=torch.float64, device=rows.device)
    edges = _edges(k)
    for start in range(0, n, PANEL):
        panel = rows[:, start : start + PANEL].to(torch.float64)
        for top, bottom in pairwise(edges):
            total[top:bottom, top:].addmm_(panel[top:bottom], panel[top:].T)
        del panel  # before the next one is made
    return total


def _edges(k: int) -> list[int]:
    splits = SPLITS if k >= 32 * SPLITS else 1
    return [k * i // splits for i in range(splits + 1)]


def _times(side: Tensor | None, x: Tensor) -> Tensor:
    """side @ x, where a vector stands for a diagonal."""
    if side is None:
        return x
    return side[:, None] * x if side.ndim == 1 else side @ x


def _turned(side: Tensor | None) -> Tensor | None:
    return side.T if side is not None and side.ndim == 2 else side


def _same(ops: Sequence[Operator], what: str, free: int | None = None) -> None:
    if not ops:
        raise UsageError(f"{what}: expected at least one matrix.")
    first = ops[0]
    for op in ops[1:]:
        if any(op.shape[d] != first.shape[d] for d in (0, 1) if d != free):
            raise Refused(f"{what}: shapes do not fit, found {first.shape} and {op.shape}.")
        if op.dtype != first.dtype or op.device != first.device:
            raise Refused(
                f"{what}: expected one dtype and one device, found {first.dtype} on {first.device} and {op.dtype} on {op.device}."
            )
