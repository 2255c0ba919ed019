"""The rank-k update of a Cholesky factor on a GPU: one program for each matrix, its part of V in registers.

A column depends on all before it, so a matrix has no more parallelism than its rows; a batch has.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from cfl_ops._core.op import UNSERVED, Unserved
from cfl_ops._gpu import tuning
from cfl_ops.ops.cholesky.codes import BREAKDOWN_EPS
from cfl_ops.ops.cholesky.factor import copy_good_, with_bad_arguments, with_lost_digits
from torch import Tensor

__all__ = ["cholesky_update", "cholesky_update_"]

MOST_ROWS = 16384
"""One program holds a row of V in registers for each row of L."""


@triton.jit
def _update_kernel(
    l_ptr, v_ptr, info_ptr, order, rank, breakdown,
    DOWN: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """L (column-major, D x D) <- factor of L L^T +- V V^T; V is row-major, D x k."""
    matrix = tl.program_id(0).to(tl.int64)
    l_ptr += matrix * order * order
    v_ptr += matrix * order * rank
    rows = tl.arange(0, BLOCK)
    ks = tl.arange(0, RANK)
    inside = (rows < order)[:, None] & (ks < rank)[None, :]
    w = tl.load(v_ptr + rows.to(tl.int64)[:, None] * rank + ks[None, :], mask=inside, other=0.0)
    failed = tl.load(info_ptr + matrix)
    for j in range(0, order):
        below = (rows >= j) & (rows < order)
        column = tl.load(l_ptr + rows, mask=below, other=0.0)
        here = rows == j
        diagonal = tl.sum(tl.where(here, column, 0.0), 0)
        v = tl.sum(tl.where(here[:, None], w, 0.0), 0)
        column = tl.where(diagonal < 0, -column, column)
        length = tl.abs(diagonal)
        # Scaled by the largest entry, so that squares neither overflow nor underflow.
        unit = tl.maximum(length, tl.max(tl.abs(v), 0))
        unit = tl.where(unit > 0, unit, 1.0)
        l1, v1 = length / unit, v / unit
        total = tl.sum(v1 * v1, 0)
        if DOWN:
            square = l1 * l1 - total
            good = square > breakdown * l1 * l1
        else:
            square = l1 * l1 + total
            good = square >= 0
        r1 = tl.sqrt(tl.where(good, square, 1.0))
        r = r1 * unit
        good = good & (tl.abs(r) < float("inf"))  # r - r would be fused with r's product: its rounding error
        failed = tl.where((failed == 0) & (good == 0), j + 1, failed)
        zero_pivot = r1 == 0  # a zero column of a semi-definite factor stays one
        safe_r1 = tl.where(zero_pivot, 1.0, r1)
        c = tl.where(zero_pivot, 1.0, l1 / safe_r1)
        s = v1 / safe_r1
        if DOWN:
            s = -s
        g = v1 / tl.where(zero_pivot, 1.0, l1 + r1)
        new = c * column + tl.sum(w * s[None, :], 1)
        turned = w - (column + new)[:, None] * g[None, :]
        if (not DOWN) and RANK == 1:
            # W less what is nearly W would leave rounding, where a single v is longer than l.
            rotated = c * w - column[:, None] * s[None, :]
            turned = tl.where(total > l1 * l1, rotated, turned)
        w = turned
        tl.store(l_ptr + rows, tl.where(here, r, new), mask=below)
        l_ptr += order
    tl.store(info_ptr + matrix, failed)


def cholesky_update(L: Tensor, V: Tensor, alpha: float, decay: float) -> tuple[Tensor, Tensor] | Unserved:
    """The launcher: the arguments and results of the op ``cfl_ops::cholesky_update``."""
    batch, order, rank = L.shape[:-2], L.shape[-1], V.shape[-1]
    block = triton.next_power_of_2(max(order, 16))
    if block > MOST_ROWS:
        return UNSERVED
    matrices = batch.numel()
    old = L.tril()
    columns = (old * math.sqrt(decay)).mT.contiguous()  # a column is what a program reads at a time
    vectors = (V * math.sqrt(abs(alpha))).reshape(matrices, order, rank)
    info = torch.zeros(matrices, dtype=torch.int32, device=L.device)
    use = tuning.choose("cholesky_update", L.device, order=order, element=L.element_size())
    # Entries of V that fit the registers; more vectors than that take turns.
    held = max(1, min(use["vectors"], use["held"] // block))
    for begin in range(0, rank, held):
        chunk = vectors[..., begin : begin + held].contiguous()
        width = chunk.shape[-1]
        if matrices and order:
            _update_kernel[(matrices,)](
                columns, chunk, info, order, width, BREAKDOWN_EPS * torch.finfo(L.dtype).eps,
                DOWN=alpha < 0, BLOCK=block, RANK=triton.next_power_of_2(width),
                num_warps=use["num_warps"],
            )  # fmt: skip
    info = with_bad_arguments(info.reshape(batch), old, V)
    out = columns.mT
    info = with_lost_digits(info, out, V, alpha)
    if rank == 0:  # no kernel ran: a negative diagonal is to be made positive all the same
        diagonal = out.diagonal(dim1=-2, dim2=-1)
        out = out * torch.where(diagonal < 0, -1.0, 1.0).to(out.dtype).unsqueeze(-2)
    failed = (info != 0)[..., None, None]
    return torch.where(failed, old, out).contiguous(), info


def cholesky_update_(L: Tensor, V: Tensor, alpha: float, decay: float) -> Tensor | Unserved:
    """The launcher of the op in place: what lies above the diagonal stays."""
    done = cholesky_update(L, V, alpha, decay)
    if isinstance(done, Unserved):
        return done
    out, info = done
    copy_good_(L, out, info)
    return info
