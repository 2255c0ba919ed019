"""ridge_solve on a GPU: one program per small system, which stays in registers from load to answer.

In float64, whatever the dtype; on cards with slow float64 in float32 first, and those systems again in float64 that
float32 does not prove. What float64 does not prove is solved with residuals in twice the precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cfl_ops._core.op import UNSERVED, Unserved
from cfl_ops._gpu import tuning
from cfl_ops.ops.solve.codes import (
    AGAIN,
    BAD_PENALTY,
    CONTRACTION,
    CORRECTIONS,
    ERROR,
    PIVOT,
    PROBES,
    PROVEN,
    RESIDUAL,
)
from cfl_ops.ops.solve.system import penalties
from torch import Tensor

from . import divide_up
from ._common import _piece

__all__ = ["ridge_solve"]

LARGEST = 64  # above, torch's batched factorisation takes over


@triton.jit
def _solve_kernel(
    gram_ptr, cross_ptr, shift_ptr, solution_ptr, doubt_ptr, info_ptr, order, columns, tolerance, limit, smallest,
    largest, AGAIN: tl.constexpr, ACC: tl.constexpr, ORDER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A system's solution for some right sides; with AGAIN only where there is doubt.

    The info is that of the elimination, or order + 1 where it does not prove its solution: csrc/cpu/solve_kernel.h.
    """
    matrix, piece = _piece(tl.cdiv(columns, COLUMNS))
    wanted = True
    if AGAIN:
        wanted = tl.load(doubt_ptr + matrix) != 0
    if wanted:
        rows = tl.arange(0, ORDER)
        system, diagonal, _ = _load_system(gram_ptr, shift_ptr, order, matrix, ACC, ORDER)
        at, held = _sides(order, columns, matrix, piece, ORDER, COLUMNS)
        right = tl.load(cross_ptr + at, mask=held, other=0.0).to(ACC)
        right, info, spread, norm, _ = _eliminate(system, diagonal, right, order, tolerance, ORDER)
        low = tl.min(tl.where(rows < order, diagonal, float("inf")), axis=0)
        high = tl.max(tl.where(rows < order, diagonal, 0.0), axis=0)
        proven = (2.7183 * spread * (2.7183 * spread) * high <= low * limit) | (
            norm * norm * high <= low * limit
        )
        proven = proven & (low >= smallest) & (high <= largest)
        info = tl.where((info == 0) & (proven == 0), order + 1, info)
        right = tl.where(info == 0, right, float("nan"))
        tl.store(solution_ptr + at, right.to(solution_ptr.dtype.element_ty), mask=held)
        tl.store(info_ptr + matrix, info, mask=piece == 0)
        if not AGAIN:
            tl.store(doubt_ptr + matrix, info, mask=piece == 0)


@triton.jit
def _load_system(gram_ptr, shift_ptr, order, matrix, ACC: tl.constexpr, ORDER: tl.constexpr):
    """The lower triangle, mirrored, an identity beyond the order; its diagonal, and what rounding lost of that."""
    rows = tl.arange(0, ORDER)
    inside = rows < order
    low = tl.maximum(rows[:, None], rows[None, :])
    high = tl.minimum(rows[:, None], rows[None, :])
    both = inside[:, None] & inside[None, :]
    gram = tl.load(gram_ptr + matrix * order * order + low * order + high, mask=both, other=0.0).to(ACC)
    shift = tl.load(shift_ptr + matrix * order + rows, mask=inside, other=1.0).to(ACC)
    own = tl.load(gram_ptr + matrix * order * order + rows * (order + 1), mask=inside, other=0.0).to(ACC)
    diagonal, lost = _two_sum(own, shift)
    return tl.where(rows[:, None] == rows[None, :], diagonal[:, None], gram), diagonal, lost


@triton.jit
def _sides(order, columns, matrix, piece, ORDER: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a piece of the right sides lies, and what of it is there."""
    rows = tl.arange(0, ORDER)
    sides = piece * COLUMNS + tl.arange(0, COLUMNS)
    return (matrix * order + rows[:, None]) * columns + sides[None, :], (rows < order)[:, None] & (
        sides < columns
    )[None, :]


@triton.jit
def _eliminate(system, original, right, order, tolerance, ORDER: tl.constexpr):
    """The solution; the order of the first leading minor that breaks down, or 0; the product of the diagonal's entries
    over the pivots; about the norm of the inverse, with a diagonal of ones; and the row of the smallest pivot.
    """
    rows = tl.arange(0, ORDER)
    diagonal = rows[:, None] == rows[None, :]
    one = tl.full((), 1.0, system.dtype)
    spread, before, least = one, one * 0.0, one * float("inf")
    info, weakest = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    probe = original * 0.0  # what is chosen so that its elimination grows
    for j in range(0, order):
        # Column j of the symmetric remainder is its row j.
        column = tl.sum(tl.where(rows[None, :] == j, system, 0.0), axis=1)
        pivot = tl.sum(tl.where(rows == j, column, 0.0), axis=0)
        scale = tl.sum(tl.where(rows == j, original, 0.0), axis=0)
        # Not x - x == 0: of a product x the compiler makes a fused x - x, which is its rounding error.
        good = (pivot > tolerance * scale) & (tl.abs(pivot) < float("inf"))
        info = tl.where((info == 0) & (good == 0), j + 1, info)
        pivot = tl.where(good, pivot, 1.0)
        share = pivot / tl.where(good, scale, 1.0)
        spread /= share
        weakest = tl.where(share < least, j + 1, weakest)
        least = tl.minimum(share, least)
        own = tl.sqrt(tl.where(good, scale, 1.0))
        known = tl.sum(tl.where(rows == j, probe, 0.0), axis=0)
        known = tl.where(known < 0.0, known - own, known + own)
        before += known * known / pivot
        below = tl.where(rows > j, column / pivot, 0.0)
        row = tl.sum(tl.where(rows[:, None] == j, system, 0.0), axis=0)
        right_row = tl.sum(tl.where(rows[:, None] == j, right, 0.0), axis=0)
        system -= below[:, None] * row[None, :]
        right -= below[:, None] * right_row[None, :]
        probe = tl.where(rows == j, known, probe) - below * known
    pivots = tl.sum(tl.where(diagonal, system, 0.0), axis=1)
    for step in range(0, order):
        j = order - 1 - step
        pivot = tl.sum(tl.where(rows == j, pivots, 0.0), axis=0)
        answer = tl.sum(tl.where(rows[:, None] == j, right, 0.0), axis=0) / pivot
        known = tl.sum(tl.where(rows == j, probe, 0.0), axis=0) / pivot
        column = tl.where(rows < j, tl.sum(tl.where(rows[None, :] == j, system, 0.0), axis=1), 0.0)
        right = tl.where(rows[:, None] == j, answer[None, :], right - column[:, None] * answer[None, :])
        probe = tl.where(rows == j, known, probe - column * known)
    after = tl.sum(tl.where(rows < order, probe * probe * original, 0.0), axis=0)
    return right, info, spread, after / before, weakest


@triton.jit
def _careful_kernel(
    gram_ptr, cross_ptr, shift_ptr, solution_ptr, info_ptr, order, columns, tolerance, eps, contraction, small_error,
    unseen, CORRECTIONS: tl.constexpr, PROBES: tl.constexpr, ORDER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A system with info other than 0 once more, as solve_system in ops/solve/system.py."""
    matrix = tl.program_id(0).to(tl.int64)
    if tl.load(info_ptr + matrix) != 0:
        rows = tl.arange(0, ORDER)
        inside = rows < order
        system, diagonal, lost = _load_system(gram_ptr, shift_ptr, order, matrix, tl.float64, ORDER)
        scale = _power(-((_exponent(diagonal) + 1) >> 1))
        scale = tl.where(inside, scale, 1.0)
        system = system * scale[:, None] * scale[None, :]
        diagonal = diagonal * scale * scale
        lost = tl.where(inside, lost * scale * scale, 0.0)
        largest_scale = tl.max(tl.where(inside, scale, 0.0), axis=0)

        # Named apart from what the loop below holds, whose shapes are others.
        sides = tl.arange(0, PROBES)
        number = (rows + 1).to(tl.float64)
        probe = tl.cos((number * number)[:, None] * (sides + 1).to(tl.float64)[None, :])
        probe = tl.where(inside[:, None], probe, 0.0)
        reached, info, _, _, weakest = _eliminate(system, diagonal, probe, order, tolerance, ORDER)
        moved, _, _, _, _ = _eliminate(
            system, diagonal, _residual(system, lost, probe, reached, order, ORDER), order, tolerance, ORDER
        )
        shares = tl.max(tl.abs(moved), axis=0) / tl.max(tl.abs(reached), axis=0) + eps
        rate = tl.max(shares, axis=0)
        contracts = tl.sum((shares <= contraction).to(tl.int32), axis=0) == PROBES  # false for NaN
        info = tl.where((info == 0) & (contracts == 0), weakest, info)

        for piece in range(0, tl.cdiv(columns, COLUMNS)):
            at, held = _sides(order, columns, matrix, piece, ORDER, COLUMNS)
            given = tl.load(cross_ptr + at, mask=held, other=0.0).to(tl.float64)
            highest = tl.max(tl.abs(given), axis=0)
            level = _power(_exponent(highest))
            right = given / level[None, :] * scale[:, None]
            z, _, _, _, _ = _eliminate(system, diagonal, right, order, tolerance, ORDER)
            proven = highest < 0.0
            for _ in tl.static_range(CORRECTIONS):
                change, _, _, _, _ = _eliminate(
                    system, diagonal, _residual(system, lost, right, z, order, ORDER), order, tolerance, ORDER
                )
                z += change
                of_solution = tl.max(tl.abs(z) * scale[:, None], axis=0)
                # The rate of the last change, and of what residuals do not see. Not `>`: NaN is no bound.
                of_change = tl.max(tl.abs(change), axis=0) + unseen * tl.max(tl.abs(z), axis=0)
                proven = rate * largest_scale * of_change <= small_error * of_solution
            # A right side that is not finite has no solution to be wrong.
            finite = tl.sum((tl.abs(z * scale[:, None]) < float("inf")).to(tl.int32), axis=0) == ORDER
            wrong = tl.max((finite & (proven == 0)).to(tl.int32), axis=0)
            info = tl.where((info == 0) & (wrong != 0), weakest, info)
            answer = z * scale[:, None] * level[None, :]
            tl.store(solution_ptr + at, answer.to(solution_ptr.dtype.element_ty), mask=held)
        if info != 0:
            for piece in range(0, tl.cdiv(columns, COLUMNS)):
                at, held = _sides(order, columns, matrix, piece, ORDER, COLUMNS)
                nothing = tl.full((ORDER, COLUMNS), float("nan"), solution_ptr.dtype.element_ty)
                tl.store(solution_ptr + at, nothing, mask=held)
        tl.store(info_ptr + matrix, info)


@triton.jit
def _residual(system, lost, right, z, order, ORDER: tl.constexpr):
    """What remains, right - (system + diag(lost)) z, in twice the precision."""
    rows = tl.arange(0, ORDER)
    total, rest = right, -lost[:, None] * z
    for j in range(0, order):
        entry = -tl.sum(tl.where(rows[None, :] == j, system, 0.0), axis=1)[:, None]
        value = tl.sum(tl.where(rows[:, None] == j, z, 0.0), axis=0)[None, :]
        product = entry * value
        # What rounding lost of it, by halves whose products are exact.
        entry_high, value_high = _high(entry), _high(value)
        entry_low, value_low = entry - entry_high, value - value_high
        lost_part = (entry_high * value_high - product) + entry_high * value_low + entry_low * value_high
        total, error = _two_sum(total, product)
        rest += (lost_part + entry_low * value_low) + error
    return total + rest


@triton.jit
def _high(value):
    """The first half of a number's bits."""
    return (value.to(tl.int64, bitcast=True) & -134217728).to(tl.float64, bitcast=True)


@triton.jit
def _two_sum(a, b):
    """The sum, and its rounding error."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def _exponent(value):
    """The e of a number in [2^(e - 1), 2^e), within what a power of two can be."""
    exponent = ((value.to(tl.int64, bitcast=True) >> 52) & 2047) - 1022
    exponent = tl.where((tl.abs(value) > 0.0) & (tl.abs(value) < float("inf")), exponent, 0)
    return tl.minimum(tl.maximum(exponent, -1000), 1000)


@triton.jit
def _power(exponent):
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


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

    def solve(kind: torch.dtype, again: bool) -> None:
        _solve_kernel[(info.numel() * divide_up(columns, width),)](
            *arguments, order, columns, *_limits(kind, order, working), AGAIN=again,
            ACC=tl.float64 if kind == torch.float64 else tl.float32,
            ORDER=triton.next_power_of_2(order), COLUMNS=width, num_warps=use["num_warps"],
        )  # fmt: skip

    single = use["single"] and working == torch.float32
    if single:
        solve(torch.float32, False)
    solve(torch.float64, single)
    eps = torch.finfo(torch.float64).eps
    gram_, cross_, shift_, solution_, _, info_ = arguments
    _careful_kernel[(info.numel(),)](
        gram_, cross_, shift_, solution_, info_, order, columns, PIVOT * eps, eps, CONTRACTION, ERROR, RESIDUAL,
        CORRECTIONS=CORRECTIONS, PROBES=PROBES, ORDER=triton.next_power_of_2(order), COLUMNS=width,
        num_warps=use["num_warps"], enable_fp_fusion=False,
    )  # fmt: skip
    return solution.to(dtype), torch.where(good.squeeze(-1), info, BAD_PENALTY).to(torch.int32)


def _limits(kind: torch.dtype, order: int, given: torch.dtype) -> tuple[float, float, float, float]:
    """As csrc/cpu/solve.cpp: a lost pivot, what makes a factor prove its solutions, and the range of the diagonal."""
    eps, tiny, largest = torch.finfo(kind).eps, torch.finfo(kind).tiny, torch.finfo(kind).max
    proven = PROVEN if kind == given else AGAIN * PROVEN
    return PIVOT * eps, proven**2 / (order * eps * eps), 100 * tiny / eps, largest * eps * eps
