"""ridge_solve on a GPU: one program per small system, which stays in registers from load to answer.

In float64, whatever the dtype; on cards with slow float64 in float32 first, and those systems again in float64 whose
pivots come near float32's rounding errors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cfl_ops._core.op import UNSERVED, Unserved
from cfl_ops._gpu import tuning
from cfl_ops.ops.solve.codes import BAD_PENALTY, DOUBT
from cfl_ops.ops.solve.system import penalties
from torch import Tensor

from . import divide_up
from ._common import _piece

__all__ = ["ridge_solve"]

LARGEST = 64  # above, torch's batched factorisation takes over


@triton.jit
def _solve_kernel(
    gram_ptr, cross_ptr, shift_ptr, solution_ptr, doubt_ptr, info_ptr, order, columns, tolerance,
    AGAIN: tl.constexpr, ACC: tl.constexpr, ORDER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A system's solution for some right sides; with AGAIN only where there is doubt."""
    matrix, piece = _piece(tl.cdiv(columns, COLUMNS))
    wanted = True
    if AGAIN:
        wanted = tl.load(doubt_ptr + matrix) != 0
    if wanted:
        info = _solve(
            gram_ptr, cross_ptr, shift_ptr, solution_ptr, order, columns, tolerance, matrix, piece,
            ACC, ORDER, COLUMNS,
        )  # fmt: skip
        tl.store(info_ptr + matrix, info, mask=piece == 0)
        if not AGAIN:
            tl.store(doubt_ptr + matrix, info, mask=piece == 0)


@triton.jit
def _solve(
    gram_ptr, cross_ptr, shift_ptr, solution_ptr, order, columns, tolerance, matrix, piece,
    ACC: tl.constexpr, ORDER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """By elimination; the order of the first leading minor that breaks down, or 0."""
    rows = tl.arange(0, ORDER)
    sides = piece * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows < order
    # The lower triangle, mirrored; an identity beyond the order.
    low = tl.maximum(rows[:, None], rows[None, :])
    high = tl.minimum(rows[:, None], rows[None, :])
    both = inside[:, None] & inside[None, :]
    diagonal = rows[:, None] == rows[None, :]
    gram = tl.load(gram_ptr + matrix * order * order + low * order + high, mask=both, other=0.0)
    shift = tl.load(shift_ptr + matrix * order + rows, mask=inside, other=1.0)
    system = gram.to(ACC) + tl.where(diagonal, shift[:, None], 0.0).to(ACC)
    original = tl.sum(tl.where(diagonal, system, 0.0), axis=1)
    held = inside[:, None] & (sides < columns)[None, :]
    at = (matrix * order + rows[:, None]) * columns + sides[None, :]
    right = tl.load(cross_ptr + at, mask=held, other=0.0).to(ACC)

    info = tl.full((), 0, tl.int32)
    for j in range(0, order):
        # Column j of the symmetric remainder is its row j.
        column = tl.sum(tl.where(rows[None, :] == j, system, 0.0), axis=1)
        pivot = tl.sum(tl.where(rows == j, column, 0.0), axis=0)
        scale = tl.sum(tl.where(rows == j, original, 0.0), axis=0)
        # Not x - x == 0: of a product x the compiler makes a fused x - x, which is its rounding error.
        good = (pivot > tolerance * scale) & (tl.abs(pivot) < float("inf"))
        info = tl.where((info == 0) & (good == 0), j + 1, info)
        pivot = tl.where(good, pivot, 1.0)
        below = tl.where(rows > j, column / pivot, 0.0)
        row = tl.sum(tl.where(rows[:, None] == j, system, 0.0), axis=0)
        right_row = tl.sum(tl.where(rows[:, None] == j, right, 0.0), axis=0)
        system -= below[:, None] * row[None, :]
        right -= below[:, None] * right_row[None, :]
    pivots = tl.sum(tl.where(diagonal, system, 0.0), axis=1)
    for step in range(0, order):
        j = order - 1 - step
        pivot = tl.sum(tl.where(rows == j, pivots, 0.0), axis=0)
        answer = tl.sum(tl.where(rows[:, None] == j, right, 0.0), axis=0) / pivot
        column = tl.sum(tl.where(rows[None, :] == j, system, 0.0), axis=1)
        change = tl.where(rows < j, column, 0.0)[:, None] * answer[None, :]
        right = tl.where(rows[:, None] == j, answer[None, :], right - change)
    right = tl.where(info == 0, right, float("nan"))
    tl.store(solution_ptr + at, right.to(solution_ptr.dtype.element_ty), mask=held)
    return info


def ridge_solve(
    gram: Tensor, cross: Tensor, lam: Tensor, lam_diag: Tensor | None
) -> tuple[Tensor, Tensor] | Unserved:
    """The launcher of the op: one pass, or in float32 first and then in float64."""
    order, columns = cross.shape[-2:]
    batch = gram.shape[:-2]
    if order > LARGEST or order == 0 or cross.numel() == 0:
        return UNSERVED
    shift, good = penalties(gram, lam, lam_diag)
    # A penalty that is refused becomes NaN, which no pivot survives.
    shift = torch.where(good, shift, torch.nan).expand(*batch, order).contiguous()
    dtype = torch.promote_types(gram.dtype, cross.dtype)
    working = torch.promote_types(dtype, torch.float32)  # the interpreter cannot store bfloat16
    solution = torch.empty(cross.shape, dtype=working, device=gram.device)
    info, doubt = torch.empty(2, *batch, dtype=torch.int32, device=gram.device)
    use = tuning.choose("ridge_solve", gram.device, order=order, columns=columns)
    width = min(use["columns"], triton.next_power_of_2(columns))
    arguments = gram.to(working).contiguous(), cross.to(working).contiguous(), shift, solution, doubt, info

    def solve(kind: torch.dtype, pivots: float, again: bool) -> None:
        _solve_kernel[(info.numel() * divide_up(columns, width),)](
            *arguments, order, columns, pivots * order * torch.finfo(kind).eps, AGAIN=again,
            ACC=tl.float64 if kind == torch.float64 else tl.float32,
            ORDER=triton.next_power_of_2(order), COLUMNS=width, num_warps=use["num_warps"],
        )  # fmt: skip

    single = use["single"] and working == torch.float32
    if single:
        solve(torch.float32, DOUBT, False)
    solve(torch.float64, 1.0, single)
    return solution.to(dtype), torch.where(good.squeeze(-1), info, BAD_PENALTY).to(torch.int32)
