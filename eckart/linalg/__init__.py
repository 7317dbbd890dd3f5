"""Factorise matrices: one certified `svd` over tensors and operators. The only caller of dense factorisations in the library.

`eckart.linalg.weighted` is the module of metrics; the two-sided weighted operator is `weighted_operator` here, `operator.weighted` at its home.
"""

from __future__ import annotations

from .choose import Choice, choose
from .factors import Certificate, Factors
from .operator import Operator, as_operator, concat, dense, difference, row_stream, sum_of
from .operator import weighted as weighted_operator
from .orth import orth
from .svd import svd, svdvals

from . import psd, weighted  # isort: skip

__all__ = [
    "Certificate",
    "Choice",
    "Factors",
    "Operator",
    "as_operator",
    "choose",
    "concat",
    "dense",
    "difference",
    "orth",
    "psd",
    "row_stream",
    "sum_of",
    "svd",
    "svdvals",
    "weighted",
    "weighted_operator",
]
