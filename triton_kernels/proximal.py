"""proximal_step on a GPU for B <= 128 rows and B <= D: six kernels for the whole head.

The dual form (docs/formulas.md, 1.3): S = Phi Phi^T + t I in float64, the residual R0 at the anchor and A = S^-1
R0. The factor and its inverse are one program's work, panel by panel, so that the K right sides are a matrix
product. On cards with slow float64 that program would take most of the time: there S^-1 is formed in float32 where
its pivots allow it, and A is refined with residuals in float64. The head, the anchor and A^T Phi, is torch's work in
float64: refined by its own residual, rounded, and its loss and gradient taken from it. Everything else (larger
batches, the primal side, row weights, penalties by feature, a free bias, float64) is left to the fallback in torch
ops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from cfl_ops._core.op import UNSERVED, Unserved
from cfl_ops._gpu import tuning
from cfl_ops._gpu.device import device_of
from cfl_ops.ops.proximal.codes import BAD_FEATURES, BAD_PENALTY, BAD_TARGET, BAD_WEIGHT, MEAN, PENALIZED
from cfl_ops.ops.proximal.system import or_inaccurate
from cfl_ops.ops.solve.system import on_device
from torch import Tensor

from . import divide_up
from ._common import _piece, _triangle

if TYPE_CHECKING:
    from cfl_ops.ops.proximal.arguments import ProximalArguments

__all__ = ["proximal_step", "proximal_step_"]

MOST_ROWS = 128
PANEL = 16
REFINEMENTS = tl.constexpr(2)
TRUSTED_PIVOT = tl.constexpr(0.01)  # of its diagonal element: float32 keeps digits enough to refine from


@triton.jit
def _rows_kernel(
    phi_ptr, workspace_ptr, batch_stride, row_stride, col_stride, split_stride, rows, width, triangle, per_split,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of Phi Phi^T over some of the columns, in float64."""
    matrix, tile = _piece(triangle)
    tile_row, tile_col = _triangle(tile)
    phi_ptr += matrix * batch_stride
    left_rows = tile_row * TILE + tl.arange(0, TILE)
    right_rows = tile_col * TILE + tl.arange(0, TILE)
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, width)
    total = tl.zeros((TILE, TILE), dtype=tl.float64)
    for begin in range(first, last, DEPTH):
        columns = (begin + tl.arange(0, DEPTH)).to(tl.int64)
        inside = (columns < last)[None, :]
        left = tl.load(
            phi_ptr + left_rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * col_stride,
            mask=(left_rows < rows)[:, None] & inside, other=0.0,
        )  # fmt: skip
        right = tl.load(
            phi_ptr + right_rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * col_stride,
            mask=(right_rows < rows)[:, None] & inside, other=0.0,
        )  # fmt: skip
        total = tl.dot(
            left.to(tl.float64), tl.trans(right.to(tl.float64)), total,
            input_precision="ieee", out_dtype=tl.float64,
        )  # fmt: skip
    workspace_ptr += tl.program_id(1).to(tl.int64) * split_stride + matrix * rows * rows
    row, col = left_rows[:, None], right_rows[None, :]
    lower = (row < rows) & (col <= row)
    tl.store(workspace_ptr + row * rows + col, total, mask=lower)
    tl.store(workspace_ptr + col * rows + row, total, mask=lower)


@triton.jit
def _predict_kernel(
    phi_ptr, weight_ptr, workspace_ptr, batch_stride, row_stride, col_stride,
    weight_batch_stride, weight_row_stride, weight_col_stride, split_stride, rows, width, targets, per_split,
    ROWS: tl.constexpr, TILE_K: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of Phi W^T over some of the columns."""
    matrix, tile = _piece(tl.cdiv(targets, TILE_K))
    phi_ptr += matrix * batch_stride
    weight_ptr += matrix * weight_batch_stride
    bs = tl.arange(0, ROWS)
    ks = tile * TILE_K + tl.arange(0, TILE_K)
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, width)
    total = tl.zeros((ROWS, TILE_K), dtype=tl.float32)
    for begin in range(first, last, DEPTH):
        columns = (begin + tl.arange(0, DEPTH)).to(tl.int64)
        inside = (columns < last)[None, :]
        phi = tl.load(
            phi_ptr + bs.to(tl.int64)[:, None] * row_stride + columns[None, :] * col_stride,
            mask=(bs < rows)[:, None] & inside, other=0.0,
        )  # fmt: skip
        weight = tl.load(
            weight_ptr + ks.to(tl.int64)[:, None] * weight_row_stride + columns[None, :] * weight_col_stride,
            mask=(ks < targets)[:, None] & inside, other=0.0,
        )  # fmt: skip
        total = tl.dot(phi.to(tl.float32), tl.trans(weight.to(tl.float32)), total, input_precision="tf32x3")
    workspace_ptr += tl.program_id(1).to(tl.int64) * split_stride + matrix * rows * targets
    at = bs.to(tl.int64)[:, None] * targets + ks[None, :]
    tl.store(workspace_ptr + at, total, mask=(bs < rows)[:, None] & (ks < targets)[None, :])


@triton.jit
def _residual_kernel(
    workspace_ptr, target_ptr, bias_ptr, shrink_ptr, out_ptr, split_stride, target_batch_stride, target_row_stride,
    target_col_stride, splits, rows, targets,
    CLASSES: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """R0 = Y - shrink (Phi W^T + b); classes stand for one-hot rows."""
    matrix, tile = _piece(tl.cdiv(targets, TILE_K))
    bs, ks = tl.arange(0, ROWS), tile * TILE_K + tl.arange(0, TILE_K)
    inside = (bs < rows)[:, None] & (ks < targets)[None, :]
    at = matrix * rows * targets + bs.to(tl.int64)[:, None] * targets + ks[None, :]
    total = tl.zeros((ROWS, TILE_K), dtype=tl.float32)
    for _ in range(0, splits):
        total += tl.load(workspace_ptr + at, mask=inside, other=0.0)
        workspace_ptr += split_stride
    if BIAS:
        total += tl.load(bias_ptr + matrix * targets + ks, mask=ks < targets, other=0.0).to(tl.float32)[
            None, :
        ]
    target_ptr += matrix * target_batch_stride
    if CLASSES:
        label = tl.load(target_ptr + bs.to(tl.int64) * target_row_stride, mask=bs < rows, other=-1)
        y = (label[:, None] == ks[None, :]).to(tl.float32)
    else:
        y = tl.load(
            target_ptr + bs.to(tl.int64)[:, None] * target_row_stride + ks.to(tl.int64)[None, :] * target_col_stride,
            mask=inside, other=0.0,
        ).to(tl.float32)  # fmt: skip
    tl.store(out_ptr + at, y - tl.load(shrink_ptr + matrix).to(tl.float32) * total, mask=inside)


@triton.jit
def _factor_kernel(
    system_ptr, t_ptr, factor_ptr, inverse_ptr, info_ptr, refined_ptr, order, tolerance,
    ONES: tl.constexpr, SINGLE: tl.constexpr, ROWS: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """L of S + ONES + t I and L^-1, which is to be refined where float32 is tried first and holds the system."""
    matrix = tl.program_id(0).to(tl.int64)
    system_ptr += matrix * order * order
    factor_ptr += matrix * ROWS * ROWS
    inverse_ptr += matrix * ROWS * ROWS
    t = tl.load(t_ptr + matrix)
    info = 1
    if SINGLE:
        info = _factor(
            system_ptr, t, factor_ptr, inverse_ptr, order, TRUSTED_PIVOT, tl.float32, ONES, ROWS, PANEL
        )
        tl.store(refined_ptr + matrix, (info == 0).to(tl.int32))
    if info != 0:
        info = _factor(
            system_ptr, t, factor_ptr, inverse_ptr, order, tolerance, tl.float64, ONES, ROWS, PANEL
        )
    tl.store(info_ptr + matrix, info)


@triton.jit
def _factor(
    system_ptr, t, factor_ptr, inverse_ptr, order, tolerance,
    ACC: tl.constexpr, ONES: tl.constexpr, ROWS: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """Panel by panel from the left; an identity beyond the order. The first pivot that fails, or 0."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, PANEL)
    info = tl.full((), 0, tl.int32)
    panels = tl.cdiv(order, PANEL)
    for j in range(0, panels):
        here = j * PANEL + cols
        both = (rows < order)[:, None] & (here < order)[None, :]
        diagonal = rows[:, None] == here[None, :]
        panel = tl.load(system_ptr + rows[:, None] * order + here[None, :], mask=both, other=0.0) + ONES
        panel = tl.where(both, panel, 0.0) + tl.where(diagonal, tl.where(both, t, 1.0), 0.0)
        panel = panel.to(ACC)
        original = tl.sum(tl.where(diagonal, panel, 0.0), axis=0)
        for k in range(0, j):
            there = k * PANEL + cols
            left = tl.load(factor_ptr + rows[:, None] * ROWS + there[None, :]).to(ACC)
            right = tl.load(factor_ptr + here[:, None] * ROWS + there[None, :]).to(ACC)
            panel -= tl.dot(left, tl.trans(right), input_precision="ieee", out_dtype=ACC)
        for c in range(0, PANEL):
            at = j * PANEL + c
            column = tl.sum(tl.where((cols == c)[None, :], panel, 0.0), axis=1)
            # Its values at the panel's rows, the pivot among them: one sum over all warps serves both.
            across = tl.sum(tl.where(diagonal, column[:, None], 0.0), axis=0)
            pivot = tl.sum(tl.where(cols == c, across, 0.0), axis=0)
            scale = tl.sum(tl.where(cols == c, original, 0.0), axis=0)
            # Triton 3.8's interpreter takes a constant on the right of a product only.
            good = (pivot > scale * tolerance) & (tl.abs(pivot) < float("inf"))
            info = tl.where((info == 0) & (good == 0), at + 1, info)
            over_sqrt = 1.0 / tl.sqrt(tl.where(good, pivot, 1.0))
            column = tl.where(rows >= at, column * over_sqrt, 0.0)
            across = tl.where(here >= at, across * over_sqrt, 0.0)
            # A failed pivot leaves a finite factor behind.
            column = tl.where(good, column, (rows == at).to(ACC))
            across = tl.where(good, across, (here == at).to(ACC))
            panel = tl.where(
                (cols == c)[None, :], column[:, None],
                tl.where((cols > c)[None, :], panel - column[:, None] * across[None, :], panel),
            )  # fmt: skip
        tl.store(factor_ptr + rows[:, None] * ROWS + here[None, :], panel)
        tl.debug_barrier()
    for j in range(0, panels):
        here = j * PANEL + cols
        block = (here[:, None] == rows[None, :]).to(ACC)
        for k in range(0, j):
            there = k * PANEL + cols
            left = tl.load(factor_ptr + here[:, None] * ROWS + there[None, :]).to(ACC)
            right = tl.load(inverse_ptr + there[:, None] * ROWS + rows[None, :]).to(ACC)
            block -= tl.dot(left, right, input_precision="ieee", out_dtype=ACC)
        corner = tl.load(factor_ptr + here[:, None] * ROWS + here[None, :]).to(ACC)
        for c in range(0, PANEL):
            column = tl.sum(tl.where((cols == c)[None, :], corner, 0.0), axis=1)
            pivot = tl.sum(tl.where(cols == c, column, 0.0), axis=0)
            row = tl.sum(tl.where((cols == c)[:, None], block, 0.0), axis=0) * (1.0 / pivot)
            block = tl.where(
                (cols == c)[:, None], row[None, :],
                tl.where((cols > c)[:, None], block - column[:, None] * row[None, :], block),
            )  # fmt: skip
        tl.store(inverse_ptr + here[:, None] * ROWS + rows[None, :], block)
        tl.debug_barrier()
    return info


@triton.jit
def _normal_kernel(
    inverse_ptr, out_ptr, refined_ptr, order, triangle,
    SINGLE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """S^-1 = L^-T L^-1, tile by tile of the lower triangle, mirrored."""
    matrix, tile = _piece(triangle)
    tile_row, tile_col = _triangle(tile)
    inverse_ptr += matrix * ROWS * ROWS
    out_ptr += matrix * ROWS * ROWS
    row, col = tile_row * TILE + tl.arange(0, TILE), tile_col * TILE + tl.arange(0, TILE)
    if SINGLE and tl.load(refined_ptr + matrix) != 0:
        _normal_tile(inverse_ptr, out_ptr, row, col, order, tl.float32, ROWS, TILE, PANEL)
    else:
        _normal_tile(inverse_ptr, out_ptr, row, col, order, tl.float64, ROWS, TILE, PANEL)


@triton.jit
def _normal_tile(
    inverse_ptr, out_ptr, row, col, order,
    ACC: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((TILE, TILE), dtype=ACC)
    for begin in range(0, order, PANEL):
        ks = begin + tl.arange(0, PANEL)
        # Transposed as it is loaded: tl.trans would take it through registers.
        left = tl.load(inverse_ptr + row[:, None] + ks[None, :] * ROWS).to(ACC)
        right = tl.load(inverse_ptr + ks[:, None] * ROWS + col[None, :]).to(ACC)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=ACC)
    lower = col[None, :] <= row[:, None]
    tl.store(out_ptr + row[:, None] * ROWS + col[None, :], total, mask=lower)
    tl.store(out_ptr + col[None, :] * ROWS + row[:, None], total, mask=lower)


@triton.jit
def _alpha_kernel(
    normal_ptr, residual_ptr, system_ptr, t_ptr, refined_ptr, work_ptr, alpha_ptr, sums_ptr, rows, targets,
    ONES: tl.constexpr, SINGLE: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """A = S^-1 R0 for some targets, and its columns' sums."""
    matrix, tile = _piece(tl.cdiv(targets, TILE_K))
    bs, ks = tl.arange(0, ROWS), tile * TILE_K + tl.arange(0, TILE_K)
    normal_ptr += matrix * ROWS * ROWS
    residual_ptr += matrix * rows * targets
    inside = (bs < rows)[:, None] & (ks < targets)[None, :]
    here = bs.to(tl.int64)[:, None] * targets + ks[None, :]
    if SINGLE and tl.load(refined_ptr + matrix) != 0:
        # S^-1 has float32's digits only: twice more for what is missing, which float64 tells.
        system_ptr += matrix * rows * rows
        work_ptr += matrix * rows * targets
        t = tl.load(t_ptr + matrix)
        start = tl.load(residual_ptr + here, mask=inside, other=0.0).to(tl.float64)
        total = _times(normal_ptr, ROWS, residual_ptr, rows, targets, bs, ks, tl.float32, ROWS, TILE_K, PANEL)
        total = total.to(tl.float64)
        for _ in range(0, REFINEMENTS):
            tl.store(work_ptr + here, total, mask=inside)
            tl.debug_barrier()
            missing = start - t * total - ONES * tl.sum(total, axis=0)[None, :]
            missing -= _times(
                system_ptr, rows, work_ptr, rows, targets, bs, ks, tl.float64, ROWS, TILE_K, PANEL
            )
            tl.debug_barrier()
            tl.store(work_ptr + here, missing, mask=inside)
            tl.debug_barrier()
            total += _times(
                normal_ptr, ROWS, work_ptr, rows, targets, bs, ks, tl.float32, ROWS, TILE_K, PANEL
            ).to(tl.float64)
            tl.debug_barrier()
    else:
        total = _times(normal_ptr, ROWS, residual_ptr, rows, targets, bs, ks, tl.float64, ROWS, TILE_K, PANEL)
    total = tl.where(inside, total, 0.0)
    tl.store(alpha_ptr + matrix * rows * targets + here, total, mask=inside)
    tl.store(sums_ptr + matrix * targets + ks, tl.sum(total, axis=0), mask=ks < targets)


@triton.jit
def _times(
    left_ptr, left_stride, right_ptr, rows, targets, bs, ks,
    ACC: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """A square matrix of ``rows`` times the columns ``ks`` of another."""
    total = tl.zeros((ROWS, TILE_K), dtype=ACC)
    for begin in range(0, rows, PANEL):
        ns = begin + tl.arange(0, PANEL)
        left = tl.load(
            left_ptr + bs[:, None] * left_stride + ns[None, :],
            mask=(bs < rows)[:, None] & (ns < rows)[None, :], other=0.0,
        ).to(ACC)  # fmt: skip
        right = tl.load(
            right_ptr + ns.to(tl.int64)[:, None] * targets + ks[None, :],
            mask=(ns < rows)[:, None] & (ks < targets)[None, :], other=0.0,
        ).to(ACC)  # fmt: skip
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=ACC)
    return total


def _served(arguments: ProximalArguments) -> bool:
    """Whether the kernels here do it."""
    features, weight = arguments.features, arguments.weight
    rows, width = features.shape[-2:]
    return (
        0 < rows <= min(MOST_ROWS, width)
        and weight.shape[-2] > 0
        and features.shape[:-2].numel() > 0
        and features.dtype != torch.float64
        and weight.dtype != torch.float64
        and arguments.lam_diag is None
        and arguments.sample_weight is None
        and (arguments.bias is None or arguments.fit_bias == PENALIZED)
    )


def _step(arguments: ProximalArguments, out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The new weight into ``out`` (which may be the old one); the new bias, loss, gradient and info."""
    features, target, weight, bias, lam, ridge, *_ = arguments
    batch, (rows, width), targets = features.shape[:-2], features.shape[-2:], weight.shape[-2]
    device, matrices = features.device, batch.numel()
    # As float32, for Triton's float64 products cannot start from half precision.
    phi, old = features.reshape(matrices, rows, width).float(), weight.reshape(matrices, targets, width)
    new = out.view(matrices, targets, width)
    classes = not target.is_floating_point()
    y = target.reshape(matrices, rows, *(() if classes else (targets,)))
    y_strides = (*y.stride(), 0) if classes else y.stride()
    float64: dict[str, Any] = {"dtype": torch.float64, "device": device}

    scale = float(rows) if arguments.reduction == MEAN else 1.0
    penalty = on_device(lam, features).expand(batch).reshape(matrices)
    mu = scale * penalty
    t, bad_penalty = mu, ~((penalty >= 0) & penalty.isfinite())
    if ridge is not None:
        more = on_device(ridge, features).expand(batch).reshape(matrices)
        t, bad_penalty = mu + scale * more, bad_penalty | ~((more >= 0) & more.isfinite())
    shrink = torch.where(t > 0, mu / torch.where(t > 0, t, 1.0), 1.0)

    use = tuning.choose("proximal_step", device, rows=rows, width=width, targets=targets)
    block = max(PANEL, triton.next_power_of_2(rows))
    programs = device_of(device).multiprocessors

    def split(size: int, tile: int, others: int) -> tuple[int, int]:
        """How many splits of a dimension make about one program for each multiprocessor, and their size."""
        splits = max(1, min(programs // max(1, others), divide_up(size, tile)))
        each = divide_up(divide_up(size, splits), tile) * tile
        return divide_up(size, each), each

    # S and R0
    tile = min(32, block)
    tiles = divide_up(rows, tile)
    triangle = tiles * (tiles + 1) // 2
    splits, each = split(width, 64, triangle * matrices)
    products = torch.empty(splits, matrices, rows, rows, **float64)
    _rows_kernel[(triangle * matrices, splits)](
        phi, products, *phi.stride(), products.stride(0), rows, width, triangle, each,
        TILE=tile, DEPTH=16, num_warps=4,
    )  # fmt: skip
    system = products.sum(0) if splits > 1 else products[0]
    tile_k = use["TILE_K"]
    tiles_k = divide_up(targets, tile_k)
    splits, each = split(width, 64, tiles_k * matrices)
    predictions = torch.empty(splits, matrices, rows, targets, dtype=torch.float32, device=device)
    _predict_kernel[(tiles_k * matrices, splits)](
        phi, old, predictions, *phi.stride(), *old.stride(), predictions.stride(0), rows, width, targets, each,
        ROWS=block, TILE_K=tile_k, DEPTH=32, num_warps=use["num_warps"],
    )  # fmt: skip
    residual = torch.empty(matrices, rows, targets, dtype=torch.float32, device=device)
    flat_bias = None if bias is None else bias.reshape(matrices, targets).contiguous()
    _residual_kernel[(tiles_k * matrices,)](
        predictions, y, flat_bias, shrink, residual, predictions.stride(0), *y_strides, splits, rows, targets,
        CLASSES=classes, BIAS=bias is not None, ROWS=block, TILE_K=tile_k, num_warps=4,
    )  # fmt: skip

    # A = S^-1 R0
    factor, inverse = torch.empty(2, matrices, block, block, **float64)
    normal = torch.empty(matrices, block, block, **float64)
    info, refined = torch.empty(2, matrices, dtype=torch.int32, device=device)
    ones, single = int(bias is not None), use["single"]
    _factor_kernel[(matrices,)](
        system, t, factor, inverse, info, refined, rows, rows * torch.finfo(torch.float64).eps,
        ONES=ones, SINGLE=single, ROWS=block, PANEL=PANEL, num_warps=use["factor_warps"],
    )  # fmt: skip
    _normal_kernel[(triangle * matrices,)](
        inverse, normal, refined, rows, triangle,
        SINGLE=single, ROWS=block, TILE=tile, PANEL=PANEL, num_warps=4,
    )  # fmt: skip
    alpha = torch.empty(matrices, rows, targets, **float64)
    sums = torch.empty(matrices, targets, **float64)
    work = torch.empty(residual.shape if single else (0,), **float64)
    _alpha_kernel[(tiles_k * matrices,)](
        normal, residual, system, t, refined, work, alpha, sums, rows, targets,
        ONES=ones, SINGLE=single, ROWS=block, TILE_K=tile_k, PANEL=PANEL, num_warps=use["num_warps"],
    )  # fmt: skip

    # W_new = shrink W + A^T Phi. Sums of float32 would lose what cancels in it (features with a large mean), so it is
    # float64's, and refined once by its own residual, which knows what A and R0 have lost. What is left is measured.
    wide = phi.double()
    y64 = (y.unsqueeze(-1) == torch.arange(targets, device=device)).double() if classes else y.double()
    moved = None if flat_bias is None else flat_bias.double() * shrink.unsqueeze(-1)
    head = old.double() * shrink[:, None, None] + alpha.mT @ wide

    def missed() -> Tensor:
        own = y64 - wide @ head.mT - t[:, None, None] * alpha
        return own if moved is None else own - (moved + sums).unsqueeze(-2)

    step = normal[:, :rows, :rows] @ missed()
    alpha, sums, head = alpha + step, sums + step.sum(-2), head + step.mT @ wide
    best = t * torch.linalg.vector_norm(alpha, dim=(-2, -1))
    info = or_inaccurate(
        info, torch.linalg.vector_norm(missed(), dim=(-2, -1)), best, torch.linalg.vector_norm(y64, dim=(-2, -1)), rows
    )  # fmt: skip

    # Loss, gradient and bias are those of the weight as it is stored.
    stored = head.to(new.dtype)
    own, fitted = y64 - wide @ stored.double().mT, None
    if bias is not None and moved is not None:
        fitted = ((own.sum(-2) + t.unsqueeze(-1) * moved) / (rows + t).unsqueeze(-1)).to(bias.dtype)
        own = own - fitted.double().unsqueeze(-2)

    # What failed, before the weight is written.
    def bad(*values: Tensor | None) -> Tensor:
        result = torch.zeros(matrices, dtype=torch.bool, device=device)
        for value in values:
            if value is not None:
                result = result | ~torch.linalg.vector_norm(value.flatten(1), float("inf"), dim=-1).isfinite()
        return result

    info = torch.where((info == 0) & bad(stored, fitted), 1, info)  # finite data that overflow
    info = torch.where(bad(old, flat_bias), BAD_WEIGHT, info)
    bad_target = ((y < 0) | (y >= targets)).any(-1) if classes else bad(y)
    info = torch.where(bad_target, BAD_TARGET, info)
    info = torch.where(bad(phi), BAD_FEATURES, info)
    info = torch.where(bad_penalty, BAD_PENALTY, info).to(torch.int32)
    failed = info != 0

    new.copy_(torch.where(failed[:, None, None], old, stored))
    if bias is None or flat_bias is None or fitted is None:
        new_bias = weight.new_empty(*batch, 0)
    else:
        new_bias = torch.where(failed.unsqueeze(-1), flat_bias, fitted).view(bias.shape)
    gradient = torch.where(failed[:, None, None], 0.0, (-2 / scale) * own @ stored.double()).to(
        features.dtype
    )
    loss = torch.where(failed, torch.nan, own.square().sum((-2, -1)) / scale).float()
    return new_bias, loss.view(batch), gradient.view(features.shape), info.view(batch)


def proximal_step(arguments: ProximalArguments) -> tuple[Tensor, ...] | Unserved:
    """The launcher of the op ``cfl_ops::proximal_step``."""
    if not _served(arguments):
        return UNSERVED
    new = torch.empty_like(arguments.weight, memory_format=torch.contiguous_format)
    return new, *_step(arguments, new)


def proximal_step_(arguments: ProximalArguments) -> tuple[Tensor, ...] | Unserved:
    """The launcher of the op in place."""
    if not _served(arguments):
        return UNSERVED
    weight, bias = arguments.weight, arguments.bias
    dense = (
        weight if weight.is_contiguous() else torch.empty_like(weight, memory_format=torch.contiguous_format)
    )
    new_bias, loss, gradient, info = _step(arguments, dense)
    if dense is not weight:
        weight.copy_(dense)
    if bias is not None:
        bias.copy_(new_bias)
    return loss, gradient, info
