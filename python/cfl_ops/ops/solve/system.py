"""The regularised system (G + lam I + diag(lam_diag)) X = C in torch ops: penalties, factor, solution.

A solution is given only if it is known to be right. Cholesky's error is about eps n times the condition of the system
with a diagonal of ones, H, and no test of one pivot sees that condition. So a solution is corrected with residuals in
twice the precision, which at the same time measure the error: a correction is A^-1 E times what it corrects, E the
factor's error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cfl_ops.ops.solve.codes import BAD_PENALTY, CONTRACTION, CORRECTIONS, ERROR, PIVOT, PROBES, RESIDUAL

F64 = torch.float64


def factor_system(system: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor and info: 0, or the order of the first leading minor that breaks down."""
    factor, info = torch.linalg.cholesky_ex(system)
    return factor, first_breakdown(factor, info, system)


def first_breakdown(factor: Tensor, info: Tensor, system: Tensor) -> Tensor:
    """The info of a factorisation, for which a pivot that is a rounding error is a breakdown too."""
    if system.shape[-1] == 0:
        return info
    pivots, scale = factor.diagonal(dim1=-2, dim2=-1).square(), system.diagonal(dim1=-2, dim2=-1)
    breakdown = ~((pivots > PIVOT * torch.finfo(system.dtype).eps * scale) & pivots.isfinite())
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
        return lam.to(F64)
    return torch.zeros(lam.shape, dtype=F64, device=like.device) + lam


def penalties(gram: Tensor, lam: Tensor, lam_diag: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is added to the diagonal in float64, (..., 1) or (..., D), and whether all of it is valid (..., 1)."""
    shift = on_device(lam, gram).expand(gram.shape[:-2]).unsqueeze(-1)
    good = (shift >= 0) & shift.isfinite()
    if lam_diag is not None:
        good = good & ((lam_diag >= 0) & lam_diag.isfinite()).all(-1, keepdim=True)
        shift = shift + lam_diag.to(F64)
    return shift, good


def factor_and_solve(system: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Cholesky factor, the solution and info of a factorisation."""
    factor, info = factor_system(system)
    return factor, cholesky_solve(right, factor), info


def solve_system(
    gram: Tensor,
    cross: Tensor,
    lam: Tensor,
    lam_diag: Tensor | None,
    solve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = factor_and_solve,
) -> tuple[Tensor, Tensor]:
    """(G + lam I + diag(lam_diag))^-1 C, factored in float64, where it is NaN if info is not 0."""
    dtype = torch.promote_types(gram.dtype, cross.dtype)
    order, sides = cross.shape[-2:]
    shift, good = penalties(gram, lam, lam_diag)
    if order == 0:
        return cross.to(dtype, copy=True), torch.where(good.squeeze(-1), 0, BAD_PENALTY).to(torch.int32)
    shift = torch.where(good, shift, 1.0).expand(gram.shape[:-1])
    diagonal, lost = _two_sum(gram.diagonal(dim1=-2, dim2=-1).to(F64), shift)
    # Powers of two bring the diagonal to [1/4, 1) and each right side to [1/2, 1): no rounding.
    scale = _power(-((_exponent(diagonal) + 1) // 2)).unsqueeze(-1)
    system = gram.to(F64, copy=True).tril_(-1)
    system = (system + system.mT + torch.diag_embed(diagonal)) * scale * scale.mT
    lost = lost.unsqueeze(-1) * scale * scale
    level = _exponent(_largest(cross.to(F64)))
    right = torch.cat([cross.to(F64) * _power(-level) * scale, _probes(cross)], dim=-1)

    factor, z, info = solve(system, right)
    for step in range(CORRECTIONS):
        change = cholesky_solve(_residual(system, lost, right, z), factor)
        if step == 0:
            share = (_largest(change) / _largest(z))[..., sides:] + torch.finfo(F64).eps
            rate = share.amax(-1, keepdim=True)
        z = z + change
    # The rate of the last change, and of what residuals do not see.
    error = rate * _largest(scale) * (_largest(change) + RESIDUAL * _largest(z))[..., :sides]
    solution = z[..., :sides] * scale
    # Not `>`: NaN is no bound. A right side that is not finite has no solution to be wrong.
    right_or_not = (error <= ERROR * _largest(solution)) | ~solution.isfinite().all(-2, keepdim=True)
    proven = right_or_not.all(-1).squeeze(-1) & (rate <= CONTRACTION).squeeze(-1).squeeze(-1)
    # What has no answer within rounding is named by its smallest pivot.
    pivots = factor.diagonal(dim1=-2, dim2=-1).square() / system.diagonal(dim1=-2, dim2=-1)
    info = torch.where((info == 0) & ~proven, pivots.argmin(-1) + 1, info)
    info = torch.where(good.squeeze(-1), info, BAD_PENALTY).to(torch.int32)
    return torch.where((info == 0)[..., None, None], solution * _power(level), torch.nan).to(dtype), info


def _probes(like: Tensor) -> Tensor:
    """Right sides whose solutions lie near the direction where the inverse is largest.

    Of E, the error of a factorisation, a step leaves A^-1 E of the error before it: the probes tell how much that is
    at most, for right sides that do not see it.
    """
    at = torch.arange(1, like.shape[-2] + 1, dtype=F64, device=like.device).unsqueeze(-1)
    probes = torch.cos(at.square() * torch.arange(1, PROBES + 1, dtype=F64, device=like.device))
    return probes.expand(*like.shape[:-1], PROBES)


def _residual(system: Tensor, lost: Tensor, right: Tensor, z: Tensor) -> Tensor:
    """What remains, right - (system + diag(lost)) z, to about 2^-90 of the largest z.

    Parts of few bits have products whose sums are exact, whatever multiplies the matrices.
    """
    order, sides = right.shape[-2:]
    bits = (53 - order.bit_length()) // 2
    power = _exponent(_largest(z))
    parts = _slices(z * _power(-power), bits)
    total, rest = right * _power(-power), -lost * z * _power(-power)
    for piece in _slices(system, bits):
        for product in (piece @ torch.cat(parts, dim=-1)).split(sides, dim=-1):
            total, error = _two_sum(total, -product)
            rest = rest + error
    return (total + rest) * _power(power)


def _slices(m: Tensor, bits: int) -> list[Tensor]:
    """Three parts of m, abs(m) <= 1: the highest bits, so many others, and the rest."""
    first = (m * 2.0**bits).round() / 2.0**bits
    second = ((m - first) * 2.0 ** (2 * bits)).round() / 2.0 ** (2 * bits)
    return [first, second, m - first - second]


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and its rounding error."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _power(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=F64), exponent)


def _exponent(m: Tensor) -> Tensor:
    """The e of m in [2^(e - 1), 2^e), within what a power of two can be."""
    return torch.frexp(torch.where(m.isfinite(), m, 0.0)).exponent.clamp(-1000, 1000)


def _largest(m: Tensor) -> Tensor:
    """Of each column."""
    return m.abs().amax(-2, keepdim=True)
