"""gram on a GPU: triangle tiles, split over the rows, mirrored where the parts are summed.

Below D = 4096 one triangle has fewer tiles than a large GPU has multiprocessors, so the rows are split, too. Tile
sizes come from cfl_ops._tuning. float32 runs on the tensor cores as three TF32 products with float32's accuracy;
``torch.set_float32_matmul_precision("high")`` makes it one, as in torch's own products. Half inputs go there as they
are, with float32 sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cfl_ops import _tuning
from cfl_ops.config import backend_of
from cfl_ops.gram import BAD_CLASS, BAD_WEIGHT, EXACT_GRAM, NOT_FINITE
from torch import Tensor

__all__ = ["gram", "gram_"]

MAX_SPLITS = 64
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _load_tile(
    ptr, row_stride, col_stride, rows, columns, last, width, ACC: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows before ``last`` and columns before ``width``; zero outside."""
    inside = (rows < last)[:, None] & (columns < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * col_stride
    tile = tl.load(ptr + offsets, mask=inside, other=0.0)
    if UPCAST:
        tile = tile.to(ACC)
    return tile


@triton.jit
def _triangle(tile):
    """The row and column of a tile of the lower triangle; the root is corrected for rounding."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def _gram_kernel(
    x_ptr, weight_ptr, out_ptr,
    batch_stride, row_stride, col_stride, weight_batch_stride, weight_stride, out_batch_stride, out_split_stride,
    num_rows, width, order, rows_per_split,
    WEIGHTED: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    MIRROR: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of one split's X^T S X (width x width), at rows of ``order`` elements."""
    tile_row, tile_col = _triangle(tl.program_id(0))
    split, matrix = tl.program_id(1), tl.program_id(2).to(tl.int64)
    x_ptr += matrix * batch_stride
    left_columns = tile_row * TILE + tl.arange(0, TILE)
    right_columns = tile_col * TILE + tl.arange(0, TILE)
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, num_rows)
    total = tl.zeros((TILE, TILE), dtype=ACC)
    for begin in range(first, last, DEPTH):
        rows = begin + tl.arange(0, DEPTH)
        left = _load_tile(x_ptr, row_stride, col_stride, rows, left_columns, last, width, ACC, UPCAST)
        right = _load_tile(x_ptr, row_stride, col_stride, rows, right_columns, last, width, ACC, UPCAST)
        if WEIGHTED:
            s = tl.load(
                weight_ptr + matrix * weight_batch_stride + rows.to(tl.int64) * weight_stride,
                mask=rows < last, other=0.0,
            )  # fmt: skip
            left = left * s.to(ACC)[:, None]
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION, out_dtype=ACC)
    out_ptr += split.to(tl.int64) * out_split_stride + matrix * out_batch_stride
    row, col = left_columns.to(tl.int64)[:, None], right_columns.to(tl.int64)[None, :]
    lower = (row < width) & (col <= row)
    tl.store(out_ptr + row * order + col, total, mask=lower)
    if MIRROR:
        tl.store(out_ptr + col * order + row, total, mask=lower)


@triton.jit
def _sum_kernel(
    parts_ptr, out_ptr, parts_batch_stride, split_stride, out_batch_stride, splits, width, order,
    ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The sum of the splits' triangles, stored in both halves."""
    tile_row, tile_col = _triangle(tl.program_id(0))
    matrix = tl.program_id(1).to(tl.int64)
    row = (tile_row * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    col = (tile_col * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    lower = (row < width) & (col <= row)
    total = tl.zeros((TILE, TILE), dtype=ACC)
    parts_ptr += matrix * parts_batch_stride
    for _ in range(0, splits):
        total += tl.load(parts_ptr + row * width + col, mask=lower, other=0.0)
        parts_ptr += split_stride
    out_ptr += matrix * out_batch_stride
    tl.store(out_ptr + row * order + col, total, mask=lower)
    tl.store(out_ptr + col * order + row, total, mask=lower)


@triton.jit
def _cross_kernel(
    x_ptr, y_ptr, weight_ptr, out_ptr,
    batch_stride, row_stride, col_stride, y_batch_stride, y_row_stride, y_col_stride,
    weight_batch_stride, weight_stride, out_batch_stride, out_split_stride,
    num_rows, width, targets, rows_per_split,
    ONES: tl.constexpr, WEIGHTED: tl.constexpr, CLASSES: tl.constexpr, TARGETS: tl.constexpr, ACC: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of one split's X^T S [Y 1]; the column of ones, whose product is a column sum, is optional."""
    columns_k = targets + ONES
    tiles_k = tl.cdiv(columns_k, TILE_K)
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
        left = _load_tile(x_ptr, row_stride, col_stride, rows, columns, last, width, ACC, UPCAST)
        if WEIGHTED:
            s = tl.load(
                weight_ptr + matrix * weight_batch_stride + rows.to(tl.int64) * weight_stride,
                mask=rows < last, other=0.0,
            )  # fmt: skip
            left = left * s.to(ACC)[:, None]
        if CLASSES:  # a tile of the one-hot matrix, which lives in registers only
            label = tl.load(y_ptr + rows.to(tl.int64) * y_row_stride, mask=rows < last, other=-1)
            right = ((label[:, None] == ks[None, :]) & (ks < targets)[None, :]).to(left.dtype)
        elif TARGETS:
            right = _load_tile(y_ptr, y_row_stride, y_col_stride, rows, ks, last, targets, ACC, UPCAST)
        else:
            right = tl.zeros((DEPTH, TILE_K), dtype=left.dtype)
        if ONES:
            right = tl.where((ks == targets)[None, :], 1.0, right).to(left.dtype)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION, out_dtype=ACC)
    out_ptr += split.to(tl.int64) * out_split_stride + matrix * out_batch_stride
    row, col = columns.to(tl.int64)[:, None], ks.to(tl.int64)[None, :]
    tl.store(out_ptr + row * columns_k + col, total, mask=(row < width) & (col < columns_k))


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
    # Triton's float64 products cannot start from half precision.
    narrow = acc_dtype == torch.float64 and x.dtype in (torch.float16, torch.bfloat16)
    if narrow and (bias_column or y is not None or not _exact_kernel(x)):
        x3 = x3.float()
    weight = None if sample_weight is None else sample_weight.reshape(matrices, rows)
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
    info = torch.zeros(matrices, dtype=torch.int32, device=x.device)
    targets = 0 if y is None else num_classes or y.shape[-1]
    y3 = None if y is None else y.reshape(matrices, rows, *(() if num_classes else (targets,)))
    target_sum = torch.zeros(matrices, targets, dtype=acc_dtype, device=x.device)
    target_sq = torch.zeros_like(target_sum)
    if y3 is not None and num_classes:
        outside = (y3 < 0) | (y3 >= num_classes)
        info = torch.where(outside.any(-1), BAD_CLASS, info)
        target_sum = target_sum.scatter_add(-1, torch.where(outside, 0, y3), ones)
        target_sq = target_sum.clone()
    elif y3 is not None:
        wide = y3.to(acc_dtype)
        target_sum = (wide * ones.unsqueeze(-1)).sum(-2)
        target_sq = (wide * wide * ones.unsqueeze(-1)).sum(-2)

    gram_out = torch.zeros(matrices, order, order, dtype=acc_dtype, device=x.device)
    cross = torch.zeros(matrices, order, targets, dtype=acc_dtype, device=x.device)
    if matrices and rows and width:
        if acc_dtype == torch.float64 and _exact_kernel(x):
            exact = EXACT_GRAM.overload(x3, None if weight is None else weight.double())
            gram_out[:, :width, :width] = exact
        else:
            _launch_gram(x3, weight, gram_out, acc_dtype)
        if bias_column or targets:
            if y3 is not None and acc_dtype == torch.float64 and y3.dtype in (torch.float16, torch.bfloat16):
                y3 = y3.float()
            products = _launch_cross(x3, y3, weight, targets, bias_column, num_classes > 0, acc_dtype)
            cross[:, :width] = products[..., :targets]
            if bias_column:
                gram_out[:, width, :width] = gram_out[:, :width, width] = products[..., targets]
    if bias_column:
        gram_out[:, width, width] = count
        cross[:, width] = target_sum

    if acc_dtype == torch.float64 and x.dtype != torch.float64:
        info = torch.where(gram_out.diagonal(dim1=-2, dim2=-1).isfinite().all(-1), info, NOT_FINITE)
    if weight is not None:
        info = torch.where((weight >= 0).all(-1), info, BAD_WEIGHT)
    return (
        gram_out.reshape(*batch, order, order),
        cross.reshape(*batch, order, targets),
        target_sum.reshape(*batch, targets),
        target_sq.reshape(*batch, targets),
        count.reshape(batch),
        info.reshape(batch),
    )


def _kind(x: Tensor, weight: Tensor | None, acc_dtype: torch.dtype) -> str:
    """What the tensor cores multiply: ``float64``, ``half``, ``tf32`` or ``tf32x3``."""
    if acc_dtype == torch.float64:
        return "float64"
    # A weight must multiply half inputs exactly, and the interpreter cannot multiply bfloat16.
    if x.dtype in (torch.float16, torch.bfloat16) and weight is None and not INTERPRETED:
        return "half"
    exact = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"


def _arithmetic(kind: str) -> dict[str, object]:
    return {
        "ACC": tl.float64 if kind == "float64" else tl.float32,
        "UPCAST": kind != "half",
        "PRECISION": kind if kind.startswith("tf32") else "ieee",
    }


def _launch_gram(x: Tensor, weight: Tensor | None, out: Tensor, acc_dtype: torch.dtype) -> None:
    """X^T S X into the first rows and columns of ``out``."""
    matrices, rows, width = x.shape
    kind = _kind(x, weight, acc_dtype)
    use = dict(_tuning.choose("gram", x.device, kind=kind, order=width, rows=rows))
    tiles = triton.cdiv(width, use["TILE"])
    triangle = tiles * (tiles + 1) // 2
    splits, per_split = _split(x, rows, triangle * matrices, use)
    parts = out.new_empty(splits, matrices, width, width) if splits > 1 else None
    target = out if parts is None else parts
    _gram_kernel[(triangle, splits, matrices)](
        x, weight, target, *x.stride(), *(weight.stride() if weight is not None else (0, 0)),
        target.stride(-3), 0 if parts is None else parts.stride(0), rows, width, target.shape[-1], per_split,
        WEIGHTED=weight is not None, MIRROR=parts is None, **_arithmetic(kind), **use,
    )  # fmt: skip
    if parts is not None:
        tiles = triton.cdiv(width, 32)
        _sum_kernel[(tiles * (tiles + 1) // 2, matrices)](
            parts, out, parts.stride(1), parts.stride(0), out.stride(0), splits, width, out.shape[-1],
            ACC=tl.float64 if kind == "float64" else tl.float32, TILE=32,
        )  # fmt: skip


def _launch_cross(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    targets: int,
    ones: bool,
    classes: bool,
    acc_dtype: torch.dtype,
) -> Tensor:
    """X^T S [Y 1], with float32's accuracy whatever the precision of products is set to."""
    matrices, rows, width = x.shape
    kind = _kind(x, weight, acc_dtype)
    mixed = y is not None and not classes and y.dtype != x.dtype
    if kind == "tf32" or (kind == "half" and mixed):
        kind = "tf32x3"
    columns = targets + ones
    use = dict(_tuning.choose("gram_cross", x.device, kind=kind, order=width, targets=columns, rows=rows))
    programs = triton.cdiv(width, use["TILE"]) * triton.cdiv(columns, use["TILE_K"])
    splits, per_split = _split(x, rows, programs * matrices, use)
    parts = x.new_empty(splits, matrices, width, columns, dtype=acc_dtype)
    # Without targets y is never read.
    y_strides: tuple[int, ...] = (0, 0, 0) if y is None else (*y.stride(), 0) if classes else y.stride()
    weight_strides = weight.stride() if weight is not None else (0, 0)
    _cross_kernel[(programs, splits, matrices)](
        x, x if y is None else y, weight, parts, *x.stride(), *y_strides, *weight_strides,
        parts.stride(1), parts.stride(0), rows, width, targets, per_split, ONES=int(ones),
        WEIGHTED=weight is not None, CLASSES=classes, TARGETS=targets > 0, **_arithmetic(kind), **use,
    )  # fmt: skip
    return parts.sum(0) if splits > 1 else parts[0]


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


def _split(x: Tensor, rows: int, programs: int, use: dict[str, int]) -> tuple[int, int]:
    """How many parts the rows are cut into, so that each multiprocessor has ``waves`` programs, and their rows."""
    wanted_programs = use.pop("waves") * _tuning.device_of(x.device).multiprocessors
    depth = use["DEPTH"]
    wanted = max(1, min(wanted_programs // max(1, programs), MAX_SPLITS, rows // (4 * depth)))
    per_split = triton.cdiv(triton.cdiv(rows, wanted), depth) * depth
    return triton.cdiv(rows, per_split), per_split
