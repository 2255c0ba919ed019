"""ridge_solve and small_pinv on a GPU by the kernels of csrc/cuda/solve_kernel.cuh: penalties and memory around them.

Up to 64 unknowns a system is solved in a warp's registers, in float32 first where it is float32; what that does not
prove is solved again in float64, and what that does not prove with residuals in twice the precision, as on a CPU.
Larger systems are factored tile by tile in float64, as long as they are few: with narrow right sides in one kernel,
else with torch's triangular solves, and beyond 2,048 in blocks with torch's products between them. Many of them lack
no parallelism: torch's batched factorisation serves. All of those are corrected as the fallback does it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from cfl_ops._core.op import UNSERVED, Unserved
from cfl_ops._gpu import tuning
from cfl_ops._gpu.sources import Constants
from cfl_ops.ops.solve.codes import BAD_PENALTY, PIVOT
from cfl_ops.ops.solve.system import cholesky_solve, first_breakdown, penalties, solve_system

SOLVE = Constants("solve")

SMALL = 64
PINV_SMALL = 32
BLOCK = 1024
"""Beyond, products of matrices are worth their own kernels."""


def ridge_solve(
    kernels: Any, gram: Tensor, cross: Tensor, lam: Tensor, lam_diag: Tensor | None
) -> tuple[Tensor, Tensor] | Unserved:
    """The op ``cfl_ops::ridge_solve``: no synchronisation."""
    order, columns = cross.shape[-2:]
    batch = gram.shape[:-2]
    if order == 0 or cross.numel() == 0:
        return UNSERVED
    if order > SMALL:
        if _few(gram.device, order, columns, batch.numel()):
            return solve_system(gram, cross, lam, lam_diag, functools.partial(_tiled_solve, kernels))
        if _few(gram.device, min(order, BLOCK), 0, batch.numel()):
            return solve_system(gram, cross, lam, lam_diag, functools.partial(_blocked_solve, kernels))
        return solve_system(gram, cross, lam, lam_diag)
    number, shift, good = _penalty(gram, lam, lam_diag)
    dtype = torch.promote_types(gram.dtype, cross.dtype)
    working = torch.promote_types(dtype, torch.float32)
    matrices = gram.to(working).reshape(-1, order, order).contiguous()
    rights = cross.to(working).reshape(-1, order, columns).contiguous()
    solution = torch.empty_like(rights)
    info = _small(kernels, matrices, rights, number, shift, solution).view(batch)
    if good is not None:
        info = torch.where(good.squeeze(-1), info, BAD_PENALTY).to(torch.int32)
    return solution.view(cross.shape).to(dtype), info


def _penalty(
    gram: Tensor, lam: Tensor, lam_diag: Tensor | None
) -> tuple[float, Tensor | None, Tensor | None]:
    """A number for all, or numbers for each diagonal and which systems may have them."""
    if lam_diag is None and lam.ndim == 0 and lam.is_cpu:
        number = float(lam)
        if 0 <= number < math.inf:
            return number, None, None
    shift, good = penalties(gram, lam, lam_diag)
    # A penalty that is refused becomes NaN, which no pivot survives.
    shift = torch.where(good, shift, torch.nan).expand(gram.shape[:-1])
    return 0.0, shift.reshape(-1, gram.shape[-1]).contiguous(), good


def small_pinv(kernels: Any, a: Tensor, limit: float) -> tuple[Tensor, Tensor] | Unserved:
    """The op ``cfl_ops::small_pinv``: a kernel up to 32 columns (or rows, the fewer)."""
    batch, (rows, cols) = a.shape[:-2], a.shape[-2:]
    order = min(rows, cols)
    if order > PINV_SMALL or a.numel() == 0:
        return UNSERVED
    working = a.to(torch.promote_types(a.dtype, torch.float32)).contiguous()
    out = torch.empty(*batch, cols, rows, dtype=working.dtype, device=a.device)
    info = torch.empty(batch, dtype=torch.int32, device=a.device)
    matrices = batch.numel()
    tolerance = order * torch.finfo(torch.float64).eps
    kernels.small_pinv(
        working.view(matrices, rows, cols),
        limit,
        tolerance,
        out.view(matrices, cols, rows),
        info.view(matrices),
    )
    return out.to(a.dtype), info


def factor(kernels: Any, system: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factors of a few float64 systems ``(..., n, n)``, and info."""
    batch, order = system.shape[:-2], system.shape[-1]
    work = system.reshape(batch.numel(), order, order).clone(memory_format=torch.contiguous_format)
    info = torch.zeros(len(work), dtype=torch.int32, device=work.device)
    for begin in range(0, order, BLOCK):
        end = min(order, begin + BLOCK)
        corner = work[:, begin:end, begin:end]
        factors = torch.empty(corner.shape, dtype=work.dtype, device=work.device)
        nothing = work.new_empty(len(work), end - begin, 0)
        failed = _tiled(kernels, corner.contiguous(), nothing, nothing, factors)
        info = torch.where((info == 0) & (failed > 0), failed + begin, info)
        corner.copy_(factors)
        if end < order:
            below = work[:, end:, begin:end]
            below.copy_(torch.linalg.solve_triangular(factors.mT, below, upper=True, left=False))
            work[:, end:, end:].baddbmm_(below, below.mT, alpha=-1)
    factors = work.tril_().reshape(system.shape)
    return factors, first_breakdown(factors, info.reshape(batch), system)


def _blocked_solve(kernels: Any, system: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """factor_and_solve for a few large systems."""
    factors, info = factor(kernels, system)
    return factors, cholesky_solve(right, factors), info


def _tiled_solve(kernels: Any, system: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """factor_and_solve for a few systems and narrow right sides: in one kernel."""
    batch, (order, columns) = system.shape[:-2], right.shape[-2:]
    matrices = system.reshape(-1, order, order).contiguous()
    rights = right.reshape(-1, order, columns).contiguous()
    solution, factors = torch.empty_like(rights), torch.empty_like(matrices)
    info = _tiled(kernels, matrices, rights, solution, factors).view(batch)
    factors = factors.view(system.shape)
    return factors, solution.view(right.shape), first_breakdown(factors, info, system)


def _few(device: torch.device, order: int, columns: int, batch: int) -> bool:
    """Whether a system's own chain of tiles is what its time is made of."""
    use = tuning.choose("ridge_solve_tiled", device, order=order, columns=columns, batch=batch)
    return bool(use["tiled"])


def _small(
    kernels: Any, matrices: Tensor, rights: Tensor, lam: float, shift: Tensor | None, solution: Tensor
) -> Tensor:
    """Systems in a warp's registers: float32 first in float32, what that does not prove in float64, then carefully."""
    info = torch.empty(2, len(matrices), dtype=torch.int32, device=matrices.device)
    given = matrices, rights, lam, shift
    wide = PIVOT * torch.finfo(torch.float64).eps
    if matrices.dtype == torch.float64:
        kernels.solve_small(*given, wide, True, None, solution, info[1], None)
    else:
        narrow = PIVOT * torch.finfo(torch.float32).eps
        kernels.solve_small(*given, narrow, False, None, solution, info[0], info[1])
        kernels.solve_small(*given, wide, True, info[0], solution, info[1], None)
    kernels.solve_careful(*given, solution, info[1])
    return info[1]


def _tiled(kernels: Any, matrices: Tensor, rights: Tensor, solution: Tensor, factors: Tensor) -> Tensor:
    """Float64 systems tile by tile, in one kernel."""
    batch, order, columns = rights.shape
    side = SOLVE.kSide
    tiles, right_tiles = -(-order // side), -(-columns // side)
    device = matrices.device
    held = batch * (tiles + right_tiles) * tiles
    work = torch.empty(held * side * side, dtype=torch.float64, device=device)
    inverse = torch.empty(batch * tiles * side, dtype=torch.float64, device=device)
    flags = torch.zeros(2 * held + 1, dtype=torch.int32, device=device)
    info = torch.empty(batch, dtype=torch.int32, device=device)
    tolerance = PIVOT * torch.finfo(torch.float64).eps
    kernels.solve_tiled(matrices, rights, 0.0, None, tolerance, work, inverse, flags, solution, factors, info)
    return info
