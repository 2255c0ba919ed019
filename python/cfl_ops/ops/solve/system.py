"""The regularised system (G + lam I + diag(lam_diag)) X = C in torch ops: penalties, factor, solution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cfl_ops.ops.solve.codes import BAD_PENALTY


def factor_system(system: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor and info: 0, or the order of the first leading minor that breaks down."""
    factor, info = torch.linalg.cholesky_ex(system)
    return factor, first_breakdown(factor, info, system)


def first_breakdown(factor: Tensor, info: Tensor, system: Tensor) -> Tensor:
    """The info of a factorisation, for which a pivot within its rounding error is a breakdown too."""
    order = system.shape[-1]
    if order == 0:
        return info
    pivots, scale = factor.diagonal(dim1=-2, dim2=-1).square(), system.diagonal(dim1=-2, dim2=-1)
    breakdown = ~((pivots > order * torch.finfo(system.dtype).eps * scale) & pivots.isfinite())
    first = (breakdown.int().argmax(-1) + 1).to(info.dtype)
    before = breakdown.any(-1) & ((info == 0) | (first < info))
    return torch.where(before, first, info)


def cholesky_solve(right: Tensor, factor: Tensor) -> Tensor:
    """(L L^T)^-1 right. On a GPU torch's batched one may be MAGMA's, which no CUDA graph can capture."""
    if right.is_cpu:
        return torch.cholesky_solve(right, factor)
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solution


def on_device(lam: Tensor, like: Tensor) -> Tensor:
    """A penalty in float64 where ``like`` is; one on the CPU as a kernel's argument, as a copy would synchronise."""
    if lam.device == like.device:
        return lam.to(torch.float64)
    return torch.zeros(lam.shape, dtype=torch.float64, device=like.device) + lam


def penalties(gram: Tensor, lam: Tensor, lam_diag: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is added to the diagonal in float64, (..., 1) or (..., D), and whether all of it is valid (..., 1)."""
    shift = on_device(lam, gram).expand(gram.shape[:-2]).unsqueeze(-1)
    good = (shift >= 0) & shift.isfinite()
    if lam_diag is not None:
        good = good & ((lam_diag >= 0) & lam_diag.isfinite()).all(-1, keepdim=True)
        shift = shift + lam_diag.to(torch.float64)
    return shift, good


def solve_system(
    gram: Tensor,
    cross: Tensor,
    lam: Tensor,
    lam_diag: Tensor | None,
    factor_of: Callable[[Tensor], tuple[Tensor, Tensor]] = factor_system,
) -> tuple[Tensor, Tensor]:
    """(G + lam I + diag(lam_diag))^-1 C, factored in float64, where it is NaN if info is not 0."""
    dtype = torch.promote_types(gram.dtype, cross.dtype)
    shift, good = penalties(gram, lam, lam_diag)
    shift = torch.where(good, shift, 1.0).expand(gram.shape[:-1])
    system = gram.to(torch.float64, copy=True)  # its lower triangle is what a factorisation reads
    system.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor, info = factor_of(system)
    info = torch.where(good.squeeze(-1), info, BAD_PENALTY).to(torch.int32)
    solution = cholesky_solve(cross.to(torch.float64), factor)
    return torch.where((info == 0)[..., None, None], solution, torch.nan).to(dtype), info
