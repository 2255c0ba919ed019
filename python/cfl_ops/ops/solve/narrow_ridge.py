"""narrow_ridge: ridge solutions of few unknowns by a Gram matrix, and how far they can be trusted. A step of ridge."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cfl_ops._core.op import define_op
from cfl_ops.ops.solve.regression import moments
from cfl_ops.ops.solve.ridge_solve import RIDGE_SOLVE

PROBES = 8


class Equilibrated:
    """G + lam I with a unit diagonal, and an estimate of its condition, which comes with the first solution."""

    def __init__(self, gram: Tensor, lam: Tensor) -> None:
        """``gram (..., n, n)`` in float64, ``lam (..., 1)``."""
        diagonal = gram.diagonal(dim1=-2, dim2=-1) + lam
        usable = (diagonal > 0) & diagonal.isfinite()
        self.scale = torch.where(usable, diagonal, 1.0).sqrt().unsqueeze(-1)
        self.system = gram / self.scale
        self.system = self.system / self.scale.mT
        self.system.diagonal(dim1=-2, dim2=-1).copy_(torch.where(usable, 1.0, 0.0))
        self.condition = torch.empty(0)

    def solve(self, right: Tensor) -> Tensor:
        """The solution; NaN where the matrix is not positive definite."""
        order = right.shape[-2]
        probes = _probes(order).to(right.device).expand(*right.shape[:-1], PROBES)
        both = torch.cat([right / self.scale, probes], dim=-1)
        solution, info = RIDGE_SOLVE(self.system, both, torch.zeros((), dtype=torch.float64), None)
        # Vectors of independent normal numbers, of which one at least has a part along the least eigenvector.
        largest = torch.linalg.vector_norm(solution[..., -PROBES:], dim=-2).amax(-1)
        self.condition = torch.where(info == 0, torch.linalg.matrix_norm(self.system) * largest, torch.inf)
        found: Tensor = solution[..., :-PROBES] / self.scale
        return found


@functools.lru_cache(maxsize=256)
def _probes(order: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.randn(order, PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _narrow_ridge_python(
    t: Tensor, b: Tensor | None, right: Tensor | None, lam: Tensor
) -> tuple[Tensor, Tensor]:
    """(T^T T + lam I)^-1 (T^T B + right) in float64, and an estimate of the condition of the system with a unit
    diagonal, infinite where it is not positive definite in rounding.
    """
    gram, cross = moments(t, t[..., :0] if b is None else b)
    system = Equilibrated(gram, lam.unsqueeze(-1))
    if b is None:
        assert right is not None
        total = right
    else:
        total = cross if right is None else cross + right
    return system.solve(total), system.condition


def _narrow_ridge_fake(
    t: Tensor, b: Tensor | None, right: Tensor | None, lam: Tensor
) -> tuple[Tensor, Tensor]:
    batch, like = t.shape[:-2], right if b is None else b
    assert like is not None
    solution = t.new_empty(*batch, t.shape[-1], like.shape[-1], dtype=torch.float64)
    return solution, t.new_empty(batch, dtype=torch.float64)


def _check(t: Tensor, b: Tensor | None, right: Tensor | None, lam: Tensor) -> None:
    if b is None and right is None:
        raise ValueError("cfl_ops.narrow_ridge: b or right must be given")


NARROW_RIDGE = define_op(
    "narrow_ridge(Tensor t, Tensor? b, Tensor? right, Tensor lam) -> (Tensor solution, Tensor condition)",
    python=_narrow_ridge_python,
    fake=_narrow_ridge_fake,
    shapes={"t": "M S", "b": "M K", "right": "float64 S K", "lam": "float64"},
    check=_check,
    helper=True,
)
