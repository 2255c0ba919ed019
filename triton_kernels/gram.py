"""gram on a GPU: triangle tiles, split over the rows, mirrored where they are stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cfl_ops.config import backend_of
from cfl_ops.gram import BAD_CLASS, BAD_WEIGHT, EXACT_GRAM, NOT_FINITE
from torch import Tensor

__all__ = ["gram", "gram_"]

# Below D = 4096 one triangle has fewer tiles than a large GPU has multiprocessors: the rows are split, too.
TARGET_PROGRAMS = 264
MAX_SPLITS = 64
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _load_features(
    x_ptr, row_stride, col_stride, rows, columns, last, width, BIAS: tl.constexpr, ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of [x 1]; zero outside."""
    inside = (rows < last)[:, None] & (columns < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * col_stride
    tile = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    if UPCAST:
        tile = tile.to(ACC)
    if BIAS:
        one = (rows < last)[:, None] & (columns == width)[None, :]
        tile = tl.where(one, 1.0, tile).to(tile.dtype)
    return tile


@triton.jit
def _gram_kernel(
    x_ptr, weight_ptr, out_ptr,
    batch_stride, row_stride, col_stride, weight_batch_stride, weight_stride, out_batch_stride, out_split_stride,
    num_rows, width, order, rows_per_split,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Tiles of the lower triangle are numbered row by row; the root gives the row, corrected for rounding.
    tile = tl.program_id(0)
    tile_row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    tile_row = tl.where(tile_row * (tile_row + 1) // 2 > tile, tile_row - 1, tile_row)
    tile_row = tl.where((tile_row + 1) * (tile_row + 2) // 2 <= tile, tile_row + 1, tile_row)
    tile_col = tile - tile_row * (tile_row + 1) // 2
    split, matrix = tl.program_id(1), tl.program_id(2).to(tl.int64)
    x_ptr += matrix * batch_stride
    left_columns = tile_row * TILE + tl.arange(0, TILE)
    right_columns = tile_col * TILE + tl.arange(0, TILE)
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, num_rows)
    total = tl.zeros((TILE, TILE), dtype=ACC)
    for begin in range(first, last, DEPTH):
        rows = begin + tl.arange(0, DEPTH)
        left = _load_features(
            x_ptr, row_stride, col_stride, rows, left_columns, last, width, BIAS, ACC, UPCAST
        )
        right = _load_features(
            x_ptr, row_stride, col_stride, rows, right_columns, last, width, BIAS, ACC, UPCAST
        )
        if WEIGHTED:
            s = tl.load(
                weight_ptr + matrix * weight_batch_stride + rows.to(tl.int64) * weight_stride,
                mask=rows < last, other=0.0,
            )  # fmt: skip
            left = left * s.to(ACC)[:, None]
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION, out_dtype=ACC)
    out_ptr += split.to(tl.int64) * out_split_stride + matrix * out_batch_stride
    row, col = left_columns.to(tl.int64)[:, None], right_columns.to(tl.int64)[None, :]
    lower = (row < order) & (col <= row)
    tl.store(out_ptr + row * order + col, total, mask=lower)
    tl.store(out_ptr + col * order + row, total, mask=lower)


@triton.jit
def _cross_kernel(
    x_ptr, y_ptr, weight_ptr, out_ptr,
    batch_stride, row_stride, col_stride, y_batch_stride, y_row_stride, y_col_stride,
    weight_batch_stride, weight_stride, out_batch_stride, out_split_stride,
    num_rows, width, order, targets, rows_per_split,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles_k = tl.cdiv(targets, TILE_K)
    tile = tl.program_id(0)
    columns = (tile // tiles_k) * TILE + tl.arange(0, TILE)
    ks = (tile % tiles_k) * TILE_K + tl.arange(0, TILE_K)
    split, matrix = tl.program_id(1), tl.program_id(2).to(tl.int64)
    x_ptr += matrix * batch_stride
    y_ptr += matrix * y_batch_stride
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, num_rows)
    total = tl.zeros((TILE, TILE_K), dtype=ACC)
    for begin in range(first, last, DEPTH):
        rows = begin + tl.arange(0, DEPTH)
        left = _load_features(x_ptr, row_stride, col_stride, rows, columns, last, width, BIAS, ACC, UPCAST)
        if WEIGHTED:
            s = tl.load(
                weight_ptr + matrix * weight_batch_stride + rows.to(tl.int64) * weight_stride,
                mask=rows < last, other=0.0,
            )  # fmt: skip
            left = left * s.to(ACC)[:, None]
        if CLASSES:  # a tile of the one-hot matrix, which lives in registers only
            label = tl.load(y_ptr + rows.to(tl.int64) * y_row_stride, mask=rows < last, other=-1)
            right = (label[:, None] == ks[None, :]).to(left.dtype)
        else:
            inside = (rows < last)[:, None] & (ks < targets)[None, :]
            offsets = rows.to(tl.int64)[:, None] * y_row_stride + ks.to(tl.int64)[None, :] * y_col_stride
            right = tl.load(y_ptr + offsets, mask=inside, other=0.0)
            if UPCAST:
                right = right.to(ACC)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION, out_dtype=ACC)
    out_ptr += split.to(tl.int64) * out_split_stride + matrix * out_batch_stride
    row, col = columns.to(tl.int64)[:, None], ks.to(tl.int64)[None, :]
    tl.store(out_ptr + row * targets + col, total, mask=(row < order) & (col < targets))


def gram(
    x: Tensor,
    y: Tensor | None,
    sample_weight: Tensor | None,
    bias_column: bool,
    num_classes: int,
    acc_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """The launcher: the arguments and results of the op ``cfl_ops::gram``."""
    batch, rows, width = x.shape[:-2], x.shape[-2], x.shape[-1]
    order = width + bias_column
    matrices = batch.numel()
    x3 = x.reshape(matrices, rows, width)
    weight = None if sample_weight is None else sample_weight.reshape(matrices, rows)
    # Half inputs go to the tensor cores as they are, unless a weight must multiply them exactly. (The
    # interpreter cannot multiply bfloat16.)
    upcast = weight is not None or INTERPRETED or acc_dtype == torch.float64
    acc = tl.float64 if acc_dtype == torch.float64 else tl.float32
    options = {
        "BIAS": bias_column,
        "WEIGHTED": weight is not None,
        "ACC": acc,
        "UPCAST": upcast,
        # Three TF32 products carry float32's digits; half inputs are exact in any case.
        "PRECISION": "tf32x3" if acc_dtype == torch.float32 else "ieee",
        "TILE": 32 if acc_dtype == torch.float64 or order <= 64 else 64,
        "DEPTH": 32,
    }
    strides = (*x3.stride(), *(weight.stride() if weight is not None else (0, 0)))

    gram_out = torch.zeros(matrices, order, order, dtype=acc_dtype, device=x.device)
    tiles = triton.cdiv(order, options["TILE"])
    triangle = tiles * (tiles + 1) // 2
    if gram_out.numel() and rows and not bias_column and acc_dtype == torch.float64 and _exact_kernel(x):
        exact_weight = None if weight is None else weight.double()
        gram_out = EXACT_GRAM.overload(x3, exact_weight)
    elif gram_out.numel() and rows:
        splits, per_split = _split(rows, triangle * matrices, options["DEPTH"])
        parts = gram_out.new_empty(splits, *gram_out.shape) if splits > 1 else gram_out.unsqueeze(0)
        _gram_kernel[(triangle, splits, matrices)](
            x3, weight, parts, *strides, parts.stride(1), parts.stride(0), rows, width, order, per_split,
            **options,
        )  # fmt: skip
        gram_out = parts.sum(0) if splits > 1 else parts.squeeze(0)

    ones = (
        torch.ones(matrices, rows, dtype=acc_dtype, device=x.device)
        if weight is None
        else weight.to(acc_dtype)
    )
    count = (
        torch.full((matrices,), rows, dtype=torch.float64, device=x.device)
        if weight is None
        else weight.sum(-1, dtype=torch.float64)
    )
    targets = 0 if y is None else num_classes or y.shape[-1]
    cross = torch.zeros(matrices, order, targets, dtype=acc_dtype, device=x.device)
    target_sum = cross.new_zeros(matrices, targets)
    target_sq = cross.new_zeros(matrices, targets)
    info = torch.zeros(matrices, dtype=torch.int32, device=x.device)
    if acc_dtype == torch.float64 and x.dtype != torch.float64:
        info = torch.where(gram_out.diagonal(dim1=-2, dim2=-1).isfinite().all(-1), info, NOT_FINITE)
    if weight is not None:
        info = torch.where((weight >= 0).all(-1), info, BAD_WEIGHT)
    if y is not None and targets:
        y3 = y.reshape(matrices, rows, *(() if num_classes else (targets,)))
        if rows and order and matrices:
            tile_k = 16 if targets <= 16 else 32
            programs = tiles * triton.cdiv(targets, tile_k)
            splits, per_split = _split(rows, programs * matrices, options["DEPTH"])
            parts = cross.new_empty(splits, *cross.shape) if splits > 1 else cross.unsqueeze(0)
            y_strides = (*y3.stride(), 0) if num_classes else y3.stride()
            _cross_kernel[(programs, splits, matrices)](
                x3, y3, weight, parts, *strides[:3], *y_strides, *strides[3:], parts.stride(1), parts.stride(0),
                rows, width, order, targets, per_split, CLASSES=num_classes > 0, TILE_K=tile_k, **options,
            )  # fmt: skip
            cross = parts.sum(0) if splits > 1 else parts.squeeze(0)
        if num_classes:
            outside = (y3 < 0) | (y3 >= num_classes)
            info = torch.where(outside.any(-1), BAD_CLASS, info)
            target_sum = target_sum.scatter_add(-1, torch.where(outside, 0, y3), ones)
            target_sq = target_sum.clone()
        else:
            wide = y3.to(acc_dtype)
            target_sum = (wide * ones.unsqueeze(-1)).sum(-2)
            target_sq = (wide * wide * ones.unsqueeze(-1)).sum(-2)
    return (
        gram_out.reshape(*batch, order, order),
        cross.reshape(*batch, order, targets),
        target_sum.reshape(*batch, targets),
        target_sq.reshape(*batch, targets),
        count.reshape(batch),
        info.reshape(batch),
    )


def gram_(
    gram_out: Tensor,
    cross: Tensor,
    target_sum: Tensor,
    target_sq: Tensor,
    count: Tensor,
    x: Tensor,
    y: Tensor | None,
    sample_weight: Tensor | None,
    num_classes: int,
    decay: float,
) -> Tensor:
    """The launcher of ``cfl_ops::gram_``: the new rows' moments, then one pass that adds them."""
    *fresh, info = gram(x, y, sample_weight, gram_out.shape[-1] > x.shape[-1], num_classes, gram_out.dtype)
    moments = (gram_out, cross, target_sum, target_sq, count)
    for old, new, dims in zip(moments, fresh, (2, 2, 1, 1, 0), strict=True):
        keep = (info == 0)[(...,) + (None,) * dims]
        kept = old * decay if decay != 0 else torch.zeros_like(old)
        old.copy_(torch.where(keep, kept + new, old))
    return info


def _exact_kernel(x: Tensor) -> bool:
    """Whether a CUDA C++ kernel of float64 sums serves; Triton's float64 dots are not measured."""
    return x.is_cuda and backend_of(EXACT_GRAM.name, "cuda") in ("native", "nvrtc")


def _split(rows: int, programs: int, depth: int) -> tuple[int, int]:
    """How many parts the rows are cut into, and how many rows a part has."""
    wanted = max(1, min(TARGET_PROGRAMS // max(1, programs), MAX_SPLITS, rows // (4 * depth)))
    per_split = triton.cdiv(triton.cdiv(rows, wanted), depth) * depth
    return triton.cdiv(rows, per_split), per_split
