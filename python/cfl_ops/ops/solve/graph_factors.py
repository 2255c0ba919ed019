"""factors: what factorize keeps of a matrix, in one form whatever path the data chose. For graphs and transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops._core.op import define_op
from cfl_ops.ops.solve.least_squares import factored
from cfl_ops.ops.solve.tall import Factors, underdetermined


def graph_factors(a: Tensor, rtol: Tensor | None) -> Factors:
    """The factors of ``a``, which is not empty, for a graph, which cannot depend on what it holds."""
    left, right, basis, rank, info, by_gram = FACTORS(a, rtol)
    t = a.mT if underdetermined(a) else a
    if not _has_basis(a, rtol):
        return Factors(t, left, right, None, rank, info, None)
    return Factors(t, left, right, basis, rank, info, None, None if rtol is not None else by_gram)


def _has_basis(a: Tensor, rtol: Tensor | None) -> bool:
    """Whether the orthogonal path is taken, or may be."""
    return rtol is not None or a.dtype == torch.float64


def _factors_python(a: Tensor, rtol: Tensor | None) -> tuple[Tensor, ...]:
    if a.numel() == 0:
        return tuple(torch.zeros_like(value) for value in _factors_fake(a, rtol))
    factors = factored(a, rtol, None)
    t, left, right, basis, rank, info, *_ = factors
    if not _has_basis(a, rtol):
        basis = left.new_empty(*left.shape[:-2], 0, left.shape[-1])
    elif basis is None:
        basis = t.double() @ left
    by_gram = torch.zeros_like(info, dtype=torch.bool) if factors.by_gram is None else factors.by_gram
    return left, right.clone(), basis, rank, info, by_gram


def _factors_fake(a: Tensor, rtol: Tensor | None) -> tuple[Tensor, ...]:
    batch, (rows, order) = a.shape[:-2], (a.mT if underdetermined(a) else a).shape[-2:]
    return (
        a.new_empty(*batch, order, order, dtype=torch.float64),
        a.new_empty(*batch, order, order, dtype=torch.float64),
        a.new_empty(*batch, rows if _has_basis(a, rtol) else 0, order, dtype=torch.float64),
        a.new_empty(batch, dtype=torch.int64),
        a.new_empty(batch, dtype=torch.int32),
        a.new_empty(batch, dtype=torch.bool),
    )


FACTORS = define_op(
    "factors(Tensor a, Tensor? rtol) -> "
    "(Tensor left, Tensor right, Tensor basis, Tensor rank, Tensor info, Tensor by_gram)",
    python=_factors_python,
    fake=_factors_fake,
    shapes={"a": "M N", "rtol": ""},
    composite=True,
)
