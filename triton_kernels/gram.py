"""gram on a GPU: tiles of one triangle, the last of them split over the rows (split-K), mirrored where they are summed.

A rule of cfl_ops.tuning says how a problem is done:

- ``pointers``: any strides, batches, weights and cards. float32 is three TF32 products with float32's accuracy;
  ``torch.set_float32_matmul_precision("high")`` makes it one, as in torch's own products. Half inputs are
  multiplied as they are, with float32 sums.
- ``planes``: one matrix on cards with warpgroup products (sm_90 and later). Those read both operands of X^T X as
  they lie in memory only if elements have 16 bits, so float32 is first copied: to three bf16 splits (float32's
  accuracy) or to one float16 matrix with a power of two for each column (TF32's digits). A copy engine fetches the
  tiles.
- ``library``: torch.mm and one pass that mirrors, where little is to be won.
- ``exact``: float64 accumulation by the CUDA C++ kernel, where it can be had. Its tensor core products are the
  8 x 8 x 4 of sm_80; Triton's are 16 x 8 x 16 on sm_90, twice as fast there.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from cfl_ops._core import dispatch
from cfl_ops._gpu import tuning
from cfl_ops._gpu.device import device_of
from cfl_ops.ops.gram.codes import BAD_CLASS, BAD_WEIGHT, NOT_FINITE
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import divide_up
from ._common import _piece, _triangle

if TYPE_CHECKING:
    from cfl_ops.ops.gram.gram import GramArguments, GramInPlaceArguments

__all__ = ["gram", "gram_"]

HALVES = (torch.float16, torch.bfloat16)
MAX_SPLITS = 64
ELEMENTS_AT_ONCE = 1 << 28  # of x: its bf16 splits take no more than 1.6 GB
MIRRORED = 32  # a side of what one program of _sum_kernel writes
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
def _corner(tile, triangle, tile_rows, tile_cols):
    """The matrix of a tile, and its first row and column: square blocks of a triangle, cut into ``tile_rows``."""
    matrix, inside = tile // triangle, tile % triangle
    pieces = tile_cols // tile_rows
    row, col = _triangle(inside // pieces)
    return matrix.to(tl.int64), row * tile_cols + inside % pieces * tile_rows, col * tile_cols


@triton.jit
def _tile_and_rows(program, whole, rest, rows, rows_per_split):
    """A program's tile and its rows, first and number: the first ``whole`` tiles are not split, ``rest`` are."""
    split = tl.where(program < whole, 0, (program - whole) // rest)
    tile = tl.where(program < whole, program, whole + (program - whole) % rest)
    first = split.to(tl.int64) * rows_per_split
    return tile, first, tl.where(program < whole, rows, tl.minimum(rows_per_split, rows - first))


@triton.jit
def _gram_kernel(
    x_ptr, weight_ptr, out_ptr,
    batch_stride, row_stride, col_stride, weight_batch_stride, weight_stride, out_batch_stride,
    rows, width, order, triangle, whole, rest, rows_per_split,
    WEIGHTED: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    MIRROR: tl.constexpr, TILE: tl.constexpr, TILE_N: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of X^T S X (width x width), or one of its splits: into the workspace, or mirrored at rows of ``order``."""
    program = tl.program_id(0)
    tile, first, count = _tile_and_rows(program, whole, rest, rows, rows_per_split)
    matrix, row, col = _corner(tile, triangle, TILE, TILE_N)
    row, col = row + tl.arange(0, TILE), col + tl.arange(0, TILE_N)
    ks = tl.arange(0, DEPTH)
    x_ptr += matrix * batch_stride + first * row_stride
    weight_ptr += matrix * weight_batch_stride + first * weight_stride
    step = tl.cast(DEPTH, tl.int64)  # times a stride of 2^25 it is no 32-bit number
    # The left tile is loaded as the transpose that it is: tl.trans would take it through registers.
    along = ks.to(tl.int64) * row_stride
    left_offsets = row.to(tl.int64)[:, None] * col_stride + along[None, :]
    right_offsets = along[:, None] + col.to(tl.int64)[None, :] * col_stride
    total = tl.zeros((TILE, TILE_N), dtype=ACC)
    for begin in range(0, count, DEPTH):
        here = ks < tl.minimum(count - begin, DEPTH).to(tl.int32)
        left = tl.load(x_ptr + left_offsets, mask=(row < width)[:, None] & here[None, :], other=0.0)
        right = tl.load(x_ptr + right_offsets, mask=here[:, None] & (col < width)[None, :], other=0.0)
        if UPCAST:
            left, right = left.to(ACC), right.to(ACC)
        if WEIGHTED:
            s = tl.load(weight_ptr + ks.to(tl.int64) * weight_stride, mask=here, other=0.0)
            left = left * s.to(ACC)[None, :]
            weight_ptr += step * weight_stride
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=ACC)
        x_ptr += step * row_stride
    if MIRROR:
        out_ptr += matrix * out_batch_stride
        row, col = row.to(tl.int64)[:, None], col.to(tl.int64)[None, :]
        lower = (row < width) & (col <= row)
        tl.store(out_ptr + row * order + col, total, mask=lower)
        tl.store(out_ptr + col * order + row, total, mask=lower)
    else:
        _store_split(out_ptr, program, total, TILE, TILE_N)


@triton.jit
def _store_split(workspace_ptr, program, total, TILE: tl.constexpr, TILE_N: tl.constexpr):
    workspace_ptr += program.to(tl.int64) * TILE * TILE_N
    tl.store(workspace_ptr + tl.arange(0, TILE)[:, None] * TILE_N + tl.arange(0, TILE_N)[None, :], total)


@triton.jit
def _planes_kernel(
    x_ptr, weight_ptr, scale_ptr, out_ptr, row_stride, col_stride, weight_stride, copy_stride, out_stride,
    rows, width, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """X, its rows times sqrt(s), as three bf16 splits that sum to it, or as one float16 matrix, X scale.

    A split ends with rows of zeros, so that no tile of one reaches the next.
    """
    row = (tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE))[:, None]
    col = (tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)).to(tl.int64)[None, :]
    x = tl.load(x_ptr + row * row_stride + col * col_stride, mask=(row < rows) & (col < width), other=0.0)
    x = x.to(tl.float32)
    if WEIGHTED:
        x *= tl.sqrt_rn(tl.load(weight_ptr + row * weight_stride, mask=row < rows, other=0.0).to(tl.float32))
    out_ptr += row * out_stride + col
    stored = (row * out_stride < copy_stride) & (col < out_stride)
    if SCALED:
        x *= tl.load(scale_ptr + col, mask=col < width, other=0.0)
        tl.store(out_ptr, x.to(tl.float16), mask=stored)
    else:
        high = x.to(tl.bfloat16).to(tl.float32)
        x = tl.where(tl.abs(high) < float("inf"), x - high, 0.0)  # Inf and NaN are in the first split only
        middle = x.to(tl.bfloat16).to(tl.float32)
        kind = out_ptr.dtype.element_ty
        tl.store(out_ptr, high.to(kind), mask=stored)
        tl.store(out_ptr + copy_stride, middle.to(kind), mask=stored)
        tl.store(out_ptr + 2 * copy_stride, (x - middle).to(kind), mask=stored)


@triton.jit
def _plane_kernel(
    left_desc, right_desc, workspace_ptr, rows, copy_rows, triangle, whole, rest, rows_per_split,
    PLANES: tl.constexpr, TILE: tl.constexpr, TILE_N: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of X^T X, or one of its splits over the rows, from one 16-bit matrix or from three that sum to X."""
    program = tl.program_id(0)
    tile, first, count = _tile_and_rows(program, whole, rest, rows, rows_per_split)
    _, row, col = _corner(tile, triangle, TILE, TILE_N)
    first = first.to(tl.int32)
    total = tl.zeros((TILE, TILE_N), dtype=tl.float32)
    for begin in range(first, first + count.to(tl.int32), DEPTH):
        left = left_desc.load([begin, row]).T
        right = right_desc.load([begin, col])
        if PLANES == 1:
            total = tl.dot(left, right, total)
        else:
            left1 = left_desc.load([begin + copy_rows, row]).T
            left2 = left_desc.load([begin + 2 * copy_rows, row]).T
            right1 = right_desc.load([begin + copy_rows, col])
            right2 = right_desc.load([begin + 2 * copy_rows, col])
            # The least products first; the tensor core truncates its sums, so they start anew for each stretch of
            # rows and are added up here, where addition rounds to nearest.
            low = tl.dot(left, right2)
            low = tl.dot(left2, right, low)
            low = tl.dot(left1, right1, low)
            low = tl.dot(left, right1, low)
            low = tl.dot(left1, right, low)
            low = tl.where(tl.abs(low) < float("inf"), low, 0.0)  # the first bf16 split alone says Inf or NaN
            total += tl.dot(left, right, low)
    _store_split(workspace_ptr, program, total, TILE, TILE_N)


@triton.jit
def _sum_kernel(
    workspace_ptr, scale_ptr, out_ptr, tile_stride, split_stride, out_batch_stride, whole, split_k, triangle,
    width, order, tile_rows, tile_cols, SCALED: tl.constexpr, ACC: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """A square of a tile: the sum over the workspace, without the columns' scales, stored in both halves."""
    across = tl.cdiv(tile_cols, SIDE)
    squares = tl.cdiv(tile_rows, SIDE) * across
    tile, square = tl.program_id(0) // squares, tl.program_id(0) % squares
    matrix, first_row, first_col = _corner(tile, triangle, tile_rows, tile_cols)
    inner_row = (square // across) * SIDE + tl.arange(0, SIDE)
    inner_col = (square % across) * SIDE + tl.arange(0, SIDE)
    row, col = (first_row + inner_row).to(tl.int64)[:, None], (first_col + inner_col).to(tl.int64)[None, :]
    lower = (row < width) & (col <= row) & (inner_row < tile_rows)[:, None] & (inner_col < tile_cols)[None, :]
    workspace_ptr += tile.to(tl.int64) * tile_stride
    inner = inner_row.to(tl.int64)[:, None] * tile_cols + inner_col[None, :]
    total = tl.zeros((SIDE, SIDE), dtype=ACC)
    for _ in range(0, tl.where(tile < whole, 1, split_k)):
        total += tl.load(workspace_ptr + inner, mask=lower, other=0.0)
        workspace_ptr += split_stride
    if SCALED:  # one after the other: their product could overflow
        total /= tl.load(scale_ptr + row, mask=row < width, other=1.0)
        total /= tl.load(scale_ptr + col, mask=col < width, other=1.0)
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
    matrix, tile = _piece(tl.cdiv(width, TILE) * tiles_k)
    split = tl.program_id(1)
    columns = (tile // tiles_k) * TILE + tl.arange(0, TILE)
    ks = (tile % tiles_k) * TILE_K + tl.arange(0, TILE_K)
    x_ptr += matrix * batch_stride
    y_ptr += matrix * y_batch_stride
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, num_rows)
    total = tl.zeros((TILE, TILE_K), dtype=ACC)
    for begin in range(first, last, DEPTH):
        rows = begin + tl.arange(0, DEPTH)
        # The transpose is loaded as such, as in _gram_kernel.
        left = _load_tile(x_ptr, col_stride, row_stride, columns, rows, width, last, ACC, UPCAST)
        if WEIGHTED:
            s = tl.load(
                weight_ptr + matrix * weight_batch_stride + rows.to(tl.int64) * weight_stride,
                mask=rows < last, other=0.0,
            )  # fmt: skip
            left = left * s.to(ACC)[None, :]
        if CLASSES:  # a tile of the one-hot matrix, which lives in registers only
            label = tl.load(y_ptr + rows.to(tl.int64) * y_row_stride, mask=rows < last, other=-1)
            right = ((label[:, None] == ks[None, :]) & (ks < targets)[None, :]).to(left.dtype)
        elif TARGETS:
            right = _load_tile(y_ptr, y_row_stride, y_col_stride, rows, ks, last, targets, ACC, UPCAST)
        else:
            right = tl.zeros((DEPTH, TILE_K), dtype=left.dtype)
        if ONES:
            right = tl.where((ks == targets)[None, :], 1.0, right).to(left.dtype)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=ACC)
    out_ptr += split.to(tl.int64) * out_split_stride + matrix * out_batch_stride
    row, col = columns.to(tl.int64)[:, None], ks.to(tl.int64)[None, :]
    tl.store(out_ptr + row * columns_k + col, total, mask=(row < width) & (col < columns_k))


def gram(a: GramArguments) -> tuple[Tensor, ...]:
    """The launcher of ``cfl_ops::gram``."""
    batch, (rows, width) = a.x.shape[:-2], a.x.shape[-2:]
    matrices, order, targets, acc_dtype = batch.numel(), a.order, a.targets, a.acc_dtype
    x = a.x.reshape(matrices, rows, width)
    # Triton's float64 products cannot start from half precision.
    in_cuda = acc_dtype == torch.float64 and _float64_in_cuda(x)
    alone = in_cuda and not a.bias_column and a.y is None
    if acc_dtype == torch.float64 and x.dtype in HALVES and not alone:
        x = x.float()
    weight = None if a.sample_weight is None else a.sample_weight.reshape(matrices, rows)
    if weight is not None and acc_dtype == torch.float64 and weight.dtype in HALVES:
        weight = weight.float()  # nor can Triton take a half to float64
    y = None if a.y is None else a.y.reshape(matrices, rows, *(() if a.num_classes else (targets,)))
    count, target_sum, target_sq, info = _sums(a, matrices, y, weight)

    # What the kernels write is not cleared first.
    make = torch.empty if matrices and rows and width else torch.zeros
    gram_out = make(matrices, order, order, dtype=acc_dtype, device=x.device)
    cross = make(matrices, order, targets, dtype=acc_dtype, device=x.device)
    if matrices and rows and width:
        if in_cuda:
            products = torch.ops.cfl_ops.exact_gram.default(x, None if weight is None else weight.double())
            gram_out[:, :width, :width] = products
        else:
            _launch_gram(x, weight, gram_out, acc_dtype)
        if a.bias_column or targets:
            if y is not None and acc_dtype == torch.float64 and y.dtype in HALVES:
                y = y.float()
            products = _launch_cross(x, y, weight, targets, a.bias_column, a.num_classes > 0, acc_dtype)
            cross[:, :width] = products[..., :targets]
            if a.bias_column:
                gram_out[:, width, :width] = gram_out[:, :width, width] = products[..., targets]
    if a.bias_column:
        gram_out[:, width, width] = count
        cross[:, width] = target_sum

    if acc_dtype == torch.float64 and a.x.dtype != torch.float64:
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


def _sums(
    a: GramArguments, matrices: int, y: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums over the rows that need no kernel: count, target_sum, target_sq; and info of bad classes."""
    rows, device, acc_dtype = a.x.shape[-2], a.x.device, a.acc_dtype
    count = (
        torch.full((matrices,), rows, dtype=torch.float64, device=device)
        if weight is None
        else weight.sum(-1, dtype=torch.float64)
    )
    info = torch.zeros(matrices, dtype=torch.int32, device=device)
    target_sum = torch.zeros(matrices, a.targets, dtype=acc_dtype, device=device)
    if y is None:
        return count, target_sum, torch.zeros_like(target_sum), info
    ones = torch.ones((), dtype=acc_dtype, device=device) if weight is None else weight.to(acc_dtype)
    ones = ones.expand(matrices, rows)
    if a.num_classes:
        outside = (y < 0) | (y >= a.num_classes)
        info = torch.where(outside.any(-1), BAD_CLASS, info)
        target_sum = target_sum.scatter_add(-1, torch.where(outside, 0, y), ones)
        return count, target_sum, target_sum.clone(), info
    target = y.to(acc_dtype)
    weighted = target if weight is None else target * ones.unsqueeze(-1)
    return count, weighted.sum(-2), (target * weighted).sum(-2), info


def gram_(a: GramInPlaceArguments) -> Tensor:
    """The launcher of ``cfl_ops::gram_``: the new rows' moments, then one pass that adds them."""
    return a.add(gram(a.new_rows))


def _kind(x: Tensor, weight: Tensor | None, acc_dtype: torch.dtype) -> str:
    """What the tensor cores multiply: ``float64``, ``half``, ``tf32`` or ``tf32x3``."""
    if acc_dtype == torch.float64:
        return "float64"
    # A weight must multiply half inputs exactly, and the interpreter cannot multiply bfloat16.
    if x.dtype in HALVES and weight is None and not INTERPRETED:
        return "half"
    full = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if full else "tf32"


def _arithmetic(kind: str) -> dict[str, object]:
    return {
        "ACC": tl.float64 if kind == "float64" else tl.float32,
        "UPCAST": kind != "half",
        "PRECISION": kind if kind.startswith("tf32") else "ieee",
    }


def _launch_gram(x: Tensor, weight: Tensor | None, out: Tensor, acc_dtype: torch.dtype) -> None:
    """X^T S X into the first rows and columns of ``out``."""
    kind = _kind(x, weight, acc_dtype)
    rows, width = x.shape[1:]
    planes = _planes_serve(x, kind)
    use = dict(tuning.choose("gram", x.device, kind=kind, order=width, rows=rows, planes=planes))
    how = use.pop("how")
    if how == "planes" and planes:
        _by_planes(x, weight, out, kind, use)
    elif how == "library" and kind.startswith("tf32"):
        _by_library(x, weight, out)
    else:
        _by_pointers(x, weight, out, kind, use)


def _by_pointers(x: Tensor, weight: Tensor | None, out: Tensor, kind: str, use: dict[str, int]) -> None:
    matrices, rows, width = x.shape
    size = 2 if kind == "half" else 8 if kind == "float64" else 4
    triangle, whole, rest, split_k, per_split = _share(x, matrices, size, use)
    # Where no tile is split, each is written to its place at once.
    workspace = out.new_empty(whole + rest * split_k, use["TILE"], use["TILE_N"]) if rest else None
    _gram_kernel[(whole + rest * split_k,)](
        x, x if weight is None else weight, out if workspace is None else workspace, *x.stride(),
        *(weight.stride() if weight is not None else (0, 0)), out.stride(0), rows, width, out.shape[-1],
        triangle, whole, max(1, rest), per_split,
        WEIGHTED=weight is not None, MIRROR=workspace is None, **_arithmetic(kind), **use,
    )  # fmt: skip
    if workspace is not None:
        _sum(workspace, None, out, width, triangle, whole, rest, split_k)


def _by_planes(x: Tensor, weight: Tensor | None, out: Tensor, kind: str, use: dict[str, int]) -> None:
    rows, width = x.shape[1:]
    most = max(1, ELEMENTS_AT_ONCE // (width * use["DEPTH"])) * use["DEPTH"]
    if kind != "half" and rows > most:
        for begin in range(0, rows, most):
            stretch = out if begin == 0 else torch.empty_like(out)
            some = None if weight is None else weight[:, begin : begin + most]
            _by_planes(x[:, begin : begin + most], some, stretch, kind, dict(use))
            if begin:
                out += stretch
        return
    # What is multiplied: three bf16 splits, one scaled float16 matrix, or half inputs as they are.
    count = 3 if kind == "tf32x3" else 1
    scale, copies, copy_rows = None, x[0], rows
    if kind != "half":
        copy_rows = divide_up(rows, use["DEPTH"]) * use["DEPTH"]
        dtype = torch.float16 if count == 1 else torch.float32 if INTERPRETED else torch.bfloat16
        # Rows of 16 bytes' multiples, which the copy engine asks for.
        copies = torch.empty(count * copy_rows, divide_up(width, 8) * 8, dtype=dtype, device=x.device)
        scale = _column_scales(x[0], weight) if count == 1 else None
        _planes_kernel[(divide_up(copy_rows, 16), divide_up(copies.shape[1], 128))](
            x, x if weight is None else weight, x if scale is None else scale, copies, *x.stride()[1:],
            0 if weight is None else weight.stride(1), copy_rows * copies.stride(0), copies.stride(0), rows, width,
            WEIGHTED=weight is not None, SCALED=scale is not None, TILE=16, TILE_N=128, num_warps=4,
        )  # fmt: skip
    triangle, whole, rest, split_k, per_split = _share(x, 1, 2 * count, use)
    workspace = out.new_empty(whole + rest * split_k, use["TILE"], use["TILE_N"])
    left, right = (
        TensorDescriptor(copies, [*copies.shape], [*copies.stride()], [use["DEPTH"], tile])
        for tile in (use["TILE"], use["TILE_N"])
    )
    _plane_kernel[(whole + rest * split_k,)](
        left, right, workspace, rows, copy_rows, triangle, whole, max(1, rest), per_split, PLANES=count, **use
    )
    _sum(workspace, scale, out, width, triangle, whole, rest, split_k)


def _column_scales(x: Tensor, weight: Tensor | None) -> Tensor:
    """A power of two for each column that takes its largest value to [2^14, 2^15), and 1 where that is no number."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=0)
    if weight is not None:
        largest = largest * weight.amax().sqrt()
    _, exponent = torch.frexp(largest.float())
    usual = largest.isfinite() & (largest > 0)
    return torch.where(usual, torch.ldexp(torch.ones_like(largest), (15 - exponent).clamp(-126, 126)), 1.0)


def _by_library(x: Tensor, weight: Tensor | None, out: Tensor) -> None:
    right, width = x.float(), x.shape[-1]
    left = right if weight is None else right * weight.float().unsqueeze(-1)
    _sum(left.mT @ right, None, out, width, 1, len(x), 0, 1)


def _sum(
    workspace: Tensor, scale: Tensor | None, out: Tensor, width: int, triangle: int, whole: int, rest: int, split_k: int
) -> None:  # fmt: skip
    """The tiles' splits, added up, into both halves of ``out``."""
    tile_rows, tile_cols = workspace.shape[1:]
    squares = divide_up(tile_rows, MIRRORED) * divide_up(tile_cols, MIRRORED)
    _sum_kernel[((whole + rest) * squares,)](
        workspace, workspace if scale is None else scale, out, workspace.stride(0), rest * workspace.stride(0),
        out.stride(0), whole, split_k, triangle, width, out.shape[-1], tile_rows, tile_cols,
        SCALED=scale is not None, SIDE=MIRRORED, ACC=tl.float64 if workspace.dtype == torch.float64 else tl.float32,
    )  # fmt: skip


def _planes_serve(x: Tensor, kind: str) -> bool:
    """Whether x, or 16-bit copies of it, can be read by the copy engine: one matrix, in steps of 16 bytes if x."""
    if len(x) != 1 or x.shape[1] >= 1 << 29:
        return False
    aligned = x.data_ptr() % 16 == 0 and x.stride(2) == 1 and x.stride(1) % 8 == 0 and x.stride(1) > 0
    return kind.startswith("tf32") or (kind == "half" and aligned)


def _share(x: Tensor, matrices: int, size: int, use: dict[str, int]) -> tuple[int, int, int, int, int]:
    """How the tiles are shared out: those of a matrix, those not split, the others, their splits and a split's rows.

    As many rounds as the multiprocessors can fill with whole tiles, then the rest, split so that all take part. The
    programs of a round walk the same rows at the same time, so that memory is read once. A split costs what it takes
    to write and read it, in units of a step through DEPTH rows of elements of ``size`` bytes.
    """
    slots = use.pop("resident") * device_of(x.device).multiprocessors
    rows, width = x.shape[-2:]
    return _shares(rows, width, matrices, size, slots, use["TILE"], use["TILE_N"], use["DEPTH"])


@functools.lru_cache(maxsize=4096)
def _shares(
    rows: int, width: int, matrices: int, size: int, slots: int, tile: int, tile_n: int, depth: int
) -> tuple[int, int, int, int, int]:
    """The search of :func:`_share`, which takes longer than a small Gram matrix on a GPU: remembered."""
    side = divide_up(width, tile_n)
    triangle = side * (side + 1) // 2 * (tile_n // tile)
    rest = triangle * matrices % slots
    steps = divide_up(rows, depth)
    written = divide_up(8 * tile * tile_n, (tile + tile_n) * depth * size)

    def cost(split_k: int) -> int:
        return divide_up(rest * split_k, slots) * (divide_up(steps, split_k) + written)

    split_k = min(range(1, min(MAX_SPLITS, max(1, steps // 4)) + 1), key=cost)
    if split_k == 1:
        return triangle, triangle * matrices, 0, 1, steps * depth
    per_split = divide_up(steps, split_k)
    return triangle, triangle * matrices - rest, rest, divide_up(steps, per_split), per_split * depth


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
    columns = targets + int(ones)
    use = dict(tuning.choose("gram_cross", x.device, kind=kind, order=width, targets=columns, rows=rows))
    programs = divide_up(width, use["TILE"]) * divide_up(columns, use["TILE_K"])
    split_k, per_split = _split(x, rows, programs * matrices, use)
    workspace = x.new_empty(split_k, matrices, width, columns, dtype=acc_dtype)
    # Without targets y is never read.
    y_strides: tuple[int, ...] = (0, 0, 0) if y is None else (*y.stride(), 0) if classes else y.stride()
    weight_strides = weight.stride() if weight is not None else (0, 0)
    _cross_kernel[(programs * matrices, split_k)](
        x, x if y is None else y, weight, workspace, *x.stride(), *y_strides, *weight_strides,
        workspace.stride(1), workspace.stride(0), rows, width, targets, per_split, ONES=int(ones),
        WEIGHTED=weight is not None, CLASSES=classes, TARGETS=targets > 0, **_arithmetic(kind), **use,
    )  # fmt: skip
    return workspace.sum(0) if split_k > 1 else workspace[0]


def _float64_in_cuda(x: Tensor) -> bool:
    """Whether float64 accumulation is the CUDA C++ kernel's: it can be had, and the rule says so."""
    if not x.is_cuda or dispatch.overrides.serving["exact_gram", "cuda"] not in ("native", "nvrtc"):
        return False
    order, rows = x.shape[-1], x.shape[-2]
    use = tuning.choose("gram", x.device, kind="float64", order=order, rows=rows, planes=False)
    return bool(use["how"] == "exact")


def _split(x: Tensor, rows: int, programs: int, use: dict[str, int]) -> tuple[int, int]:
    """In how many splits the rows are cut, so that each multiprocessor has ``waves`` programs, and their rows."""
    wanted_programs = use.pop("waves") * device_of(x.device).multiprocessors
    depth = use["DEPTH"]
    wanted = max(1, min(wanted_programs // max(1, programs), MAX_SPLITS, rows // (4 * depth)))
    per_split = divide_up(divide_up(rows, wanted), depth) * depth
    return divide_up(rows, per_split), per_split
