"""gram: the moments of features and targets that every closed-form learner starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cfl_ops._core import checks
from cfl_ops._core.batching import expand_batch
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op
from cfl_ops._core.results import result_type
from cfl_ops._gpu.launch import cuda_cpp, triton
from cfl_ops.ops.gram import cuda
from cfl_ops.ops.gram.codes import BAD_CLASS, BAD_WEIGHT, NOT_FINITE

__all__ = ["GramMoments", "gram", "gram_", "linear_gram"]


@result_type("gram")
class GramMoments(NamedTuple):
    """The second moments of features ``x (..., B, D)`` and targets ``y (..., B, K)`` with row weights ``s``.

    With ``D' = D + 1`` where a bias column was asked for (a last feature that is 1), else ``D' = D``:
    """

    gram: Tensor
    """``(..., D', D')``: sum of s x x^T, exactly symmetric."""
    cross: Tensor | None
    """``(..., D', K)``: sum of s x y^T, or None without targets."""
    target_sum: Tensor | None
    """``(..., K)``: sum of s y."""
    target_sq: Tensor | None
    """``(..., K)``: sum of s y^2."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs of moments
    """``(...)`` float64: sum of s, the number of rows where no weights are given."""

    def __add__(self, other: object) -> GramMoments:
        """The moments of both sets of rows together."""
        if not isinstance(other, GramMoments):
            return NotImplemented
        return self._combine(other)

    def _combine(self, other: GramMoments) -> GramMoments:
        for name, mine, theirs in zip(self._fields, self, other, strict=True):
            if (mine is None) != (theirs is None):
                raise ValueError(
                    f"cfl_ops.GramMoments: cannot add moments with and without targets ({name} is None in one)"
                )
            if mine is not None and theirs is not None and mine.shape[-2:] != theirs.shape[-2:]:
                raise ValueError(
                    f"cfl_ops.GramMoments: cannot add {name} of shape {tuple(mine.shape)} "
                    f"and {tuple(theirs.shape)}"
                )
        return GramMoments(
            self.gram + other.gram,
            None if self.cross is None or other.cross is None else self.cross + other.cross,
            None
            if self.target_sum is None or other.target_sum is None
            else self.target_sum + other.target_sum,
            None if self.target_sq is None or other.target_sq is None else self.target_sq + other.target_sq,
            self.count + other.count,
        )

    def decay(self, rho: float | Tensor) -> GramMoments:
        """All moments times ``rho``: older rows count less (exponential forgetting)."""
        if not isinstance(rho, Tensor) and not 0 <= rho < float("inf"):
            raise ValueError(f"cfl_ops.GramMoments.decay: rho must be finite and not negative, but got {rho}")
        return GramMoments._make(None if field is None else field * rho for field in self)

    def to(self, *args: Any, **kwargs: Any) -> GramMoments:
        """As ``Tensor.to``, for every field; a dtype leaves ``count`` in float64."""
        moved = [None if field is None else field.to(*args, **kwargs) for field in self[:4]]
        assert moved[0] is not None
        return GramMoments._make([*moved, self.count.to(moved[0].device)])


# --- the op -------------------------------------------------------------------------------------------------


def _weighted(rows: Tensor, sample_weight: Tensor | None) -> Tensor:
    return rows if sample_weight is None else rows * sample_weight.to(rows.dtype).unsqueeze(-1)


def _symmetric(lower: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    return lower.tril() + lower.tril(-1).mT


def _gram_python(
    x: Tensor,
    y: Tensor | None,
    sample_weight: Tensor | None,
    bias_column: bool,
    num_classes: int,
    acc_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """G = X^T S X, C = X^T S Y, with X widened by a column of ones if ``bias_column``."""
    batch, rows = x.shape[:-2], x.shape[-2]
    info = torch.zeros(batch, dtype=torch.int32, device=x.device)
    wide = x.to(acc_dtype)
    if bias_column:
        wide = torch.cat([wide, wide.new_ones(*batch, rows, 1)], dim=-1)
    weighted = _weighted(wide, sample_weight)
    gram = _symmetric(weighted.mT @ wide)
    if acc_dtype == torch.float64 and x.dtype != torch.float64:
        finite = gram.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        info = torch.where(finite, info, NOT_FINITE)
    if sample_weight is None:
        count = torch.full(batch, rows, dtype=torch.float64, device=x.device)
    else:
        count = sample_weight.sum(-1, dtype=torch.float64)
        info = torch.where((sample_weight >= 0).all(-1), info, BAD_WEIGHT)

    if y is None:
        cross, target_sum = wide.new_zeros(*batch, wide.shape[-1], 0), wide.new_zeros(*batch, 0)
        return gram, cross, target_sum, target_sum.clone(), count, info
    if num_classes:
        outside = (y < 0) | (y >= num_classes)
        info = torch.where(outside.any(-1), BAD_CLASS, info)
        label = torch.where(outside, 0, y).unsqueeze(-1)
        ones = _weighted(wide.new_ones(*batch, rows, 1), sample_weight)
        one_hot_sum = wide.new_zeros(*batch, num_classes, wide.shape[-1])
        cross = one_hot_sum.scatter_add(-2, label.expand_as(weighted), weighted).mT.contiguous()
        target_sum = wide.new_zeros(*batch, num_classes).scatter_add(-1, label.squeeze(-1), ones.squeeze(-1))
        return gram, cross, target_sum, target_sum.clone(), count, info
    target = y.to(acc_dtype)
    cross = weighted.mT @ target
    weighted_target = _weighted(target, sample_weight)
    return gram, cross, weighted_target.sum(-2), (weighted_target * target).sum(-2), count, info


def _gram_fake(
    x: Tensor,
    y: Tensor | None,
    sample_weight: Tensor | None,
    bias_column: bool,
    num_classes: int,
    acc_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    batch = x.shape[:-2]
    features = x.shape[-1] + int(bias_column)  # a symbolic size takes no bool (torch 2.11)
    targets = 0 if y is None else num_classes or y.shape[-1]
    return (
        x.new_empty(*batch, features, features, dtype=acc_dtype),
        x.new_empty(*batch, features, targets, dtype=acc_dtype),
        x.new_empty(*batch, targets, dtype=acc_dtype),
        x.new_empty(*batch, targets, dtype=acc_dtype),
        x.new_empty(batch, dtype=torch.float64),
        x.new_empty(batch, dtype=torch.int32),
    )


def _gram_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, sample_weight, bias_column, num_classes, acc_dtype = inputs
    ctx.save_for_backward(x, y, sample_weight)
    ctx.bias_column, ctx.num_classes, ctx.acc_dtype = bias_column, num_classes, acc_dtype
    if isinstance(ctx, torch.autograd.function.FunctionCtx):
        ctx.mark_non_differentiable(output[5])


def _gram_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Dx = s ([x 1] (Gbar + Gbar^T) + y Cbar^T), and likewise for y and s."""
    x: Tensor
    x, y, sample_weight = ctx.saved_tensors
    acc, features = ctx.acc_dtype, x.shape[-1]
    g_gram, g_cross, g_sum, g_sq, g_count, _ = grads
    wide = x.to(acc)

    def apply(matrix: Tensor) -> Tensor:  # [x 1] @ matrix, without the concatenation
        out = wide @ matrix[..., :features, :]
        return out + matrix[..., features:, :] if ctx.bias_column else out

    grad_x = grad_y = grad_weight = None
    row_x = torch.zeros_like(wide)
    row_weight = wide.new_zeros(wide.shape[:-1])
    if g_count is not None:
        row_weight = row_weight + g_count.unsqueeze(-1).to(acc)
    if g_gram is not None:
        through = apply(g_gram + g_gram.mT)
        row_x = row_x + through[..., :features]
        row_weight = row_weight + 0.5 * (through[..., :features] * wide).sum(-1)
        if ctx.bias_column:
            row_weight = row_weight + 0.5 * through[..., features]
    if y is not None and not ctx.num_classes:
        target = y.to(acc)
        row_y = torch.zeros_like(target)
        if g_cross is not None:
            row_x = row_x + target @ g_cross[..., :features, :].mT
            through = apply(g_cross)
            row_y = row_y + through
            row_weight = row_weight + (through * target).sum(-1)
        if g_sum is not None:
            row_y = row_y + g_sum.unsqueeze(-2)
            row_weight = row_weight + (target * g_sum.unsqueeze(-2)).sum(-1)
        if g_sq is not None:
            row_y = row_y + 2 * target * g_sq.unsqueeze(-2)
            row_weight = row_weight + (target * target * g_sq.unsqueeze(-2)).sum(-1)
        grad_y = _weighted(row_y, sample_weight).to(y.dtype)
    elif y is not None:
        if g_cross is not None:
            index = y.unsqueeze(-1).expand(*y.shape, g_cross.shape[-2])
            of_class = g_cross.mT.gather(-2, index)
            row_x = row_x + of_class[..., :features]
            row_weight = row_weight + (of_class[..., :features] * wide).sum(-1)
            if ctx.bias_column:
                row_weight = row_weight + of_class[..., features]
        for grad in (g_sum, g_sq):
            if grad is not None:
                row_weight = row_weight + grad.gather(-1, y)
    grad_x = _weighted(row_x, sample_weight).to(x.dtype)
    if sample_weight is not None:
        grad_weight = row_weight.to(sample_weight.dtype)
    return grad_x, grad_y, grad_weight, None, None, None


_GRAM_SCHEMA = (
    "(Tensor x, Tensor? y, Tensor? sample_weight, bool bias_column, int num_classes, ScalarType acc_dtype)"
    " -> (Tensor gram, Tensor cross, Tensor target_sum, Tensor target_sq, Tensor count, Tensor info)"
)
_DERIVATIVE = Derivative(_gram_setup_context, _gram_backward)

GRAM = define_op(
    "gram" + _GRAM_SCHEMA,
    python=_gram_python,
    fake=_gram_fake,
    core_dims=lambda args: (2, 1 if args[4] else 2, 1, None, None, None),
    derivative=_DERIVATIVE,
    cuda=(triton("cfl_ops.triton_kernels.gram:gram"),),
)


@error_message("gram")
def _explain(info: Tensor, context: Sequence[Tensor]) -> Exception:
    x, target_sum, *others = context
    index, code, where = first_failure(info)
    if code == NOT_FINITE:
        bad = int((~x[index].isfinite()).sum())
        if bad == 0:
            return ValueError(f"cfl_ops.gram: {where}the features of x, or their sums, overflow")
        return ValueError(
            f"cfl_ops.gram: {where}x has {bad} NaN or Inf value{'s' if bad > 1 else ''}, which the exact mode "
            "(acc_dtype=torch.float64) refuses"
        )
    if code == BAD_WEIGHT:
        weight = others[-1][index]
        row = int((~(weight >= 0)).nonzero()[0])
        return ValueError(
            f"cfl_ops.gram: {where}sample_weight must not be negative or NaN, but got {float(weight[row])} "
            f"in row {row}"
        )
    y, num_classes = others[0][index], target_sum.shape[-1]
    row = int(((y < 0) | (y >= num_classes)).nonzero()[0])
    return IndexError(
        f"cfl_ops.gram: {where}y must hold class indices from 0 to {num_classes - 1}, but got {int(y[row])} "
        f"in row {row}"
    )


def gram(
    x: Tensor,
    y: Tensor | None = None,
    *,
    bias_column: bool = False,
    sample_weight: Tensor | None = None,
    num_classes: int | None = None,
    acc_dtype: torch.dtype | None = None,
) -> GramMoments:
    r"""The second moments of features and targets, with one triangle computed and mirrored.

    .. math:: G = X^T S X, \quad C = X^T S Y

    (Closed-Form Last Layer Optimization, the sums of Eq. 2 and Eq. 15.)

    Args:
        x: features ``(..., B, D)``, float16, bfloat16, float32 or float64, of any strides. ``B = 0`` gives
            zeros.
        y: targets ``(..., B, K)``, floating point, or class indices ``(..., B)``, int64, with
            ``num_classes``: the cross moments are then a segment sum; a one-hot matrix is never formed.
        bias_column: append a feature that is 1 (never stored): ``D' = D + 1``.
        sample_weight: ``(..., B)`` weights ``s >= 0`` of the rows.
        num_classes: K for class indices.
        acc_dtype: the dtype of accumulation and result: float32 or float64. By default float32 for half
            inputs, else the dtype of ``x``. float64 for narrower inputs is the *exact mode*.

    Returns:
        :class:`GramMoments`: ``gram (..., D', D')``, ``cross (..., D', K)``, ``target_sum (..., K)``,
        ``target_sq (..., K)`` (the three of them None without ``y``) and ``count (...)`` in float64.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or a weight is negative.
        IndexError: a class index is out of range.
        ValueError: in exact mode, ``x`` has NaN or Inf (with their number); they propagate otherwise.

    Differentiable (twice) in x, y and sample_weight. Costs ``B D (D + 1) + 2 B D K`` FLOPs.

    Example:
        >>> import torch, cfl_ops
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> cfl_ops.gram(x, bias_column=True).gram
        tensor([[10., 14.,  4.],
                [14., 20.,  6.],
                [ 4.,  6.,  2.]])

    """
    args = _gram_arguments("gram", x, y, bias_column, sample_weight, num_classes, acc_dtype)
    *out, info = GRAM(*args)
    x, y, sample_weight, _, classes, acc_dtype = args
    _check_data(info, out, x, y, sample_weight, classes, out[2], acc_dtype)
    return _as_moments(out, y)


def _check_data(
    info: Tensor,
    results: Sequence[Tensor],
    x: Tensor,
    y: Tensor | None,
    sample_weight: Tensor | None,
    classes: int,
    target_sum: Tensor,
    acc_dtype: torch.dtype,
) -> None:
    """Raise for what info says, wherever data can be refused at all: other calls need not synchronise."""
    exact = acc_dtype == torch.float64 and x.dtype != torch.float64
    if classes or exact or sample_weight is not None:
        context = [item for item in (x, target_sum, y, sample_weight) if item is not None]
        check_info("gram", info, results, context)


def _as_moments(out: Sequence[Tensor], y: Tensor | None) -> GramMoments:
    """The op's results, without the zero-width ones where there are no targets."""
    return GramMoments(out[0], None, None, None, out[4]) if y is None else GramMoments(*out)


def _gram_arguments(
    op: str,
    x: Tensor,
    y: Tensor | None,
    bias_column: bool,
    sample_weight: Tensor | None,
    num_classes: int | None,
    acc_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, bool, int, torch.dtype]:
    """Check the arguments, and bring them to the form the op takes."""
    checks.floating(op, "x", x, 2)
    if acc_dtype is None:
        acc_dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    elif acc_dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"cfl_ops.{op}: acc_dtype must be torch.float32 or torch.float64, but got {acc_dtype}"
        )
    elif acc_dtype == torch.float32 and x.dtype == torch.float64:
        raise TypeError(f"cfl_ops.{op}: acc_dtype must be torch.float64 for float64 x, but got {acc_dtype}")
    if y is None and sample_weight is None and num_classes is None:
        return x, None, None, bias_column, 0, acc_dtype  # the short way for small calls

    classes = 0
    batches = {"x": x.shape[:-2]}
    if num_classes is not None:
        if y is None:
            raise ValueError(f"cfl_ops.{op}: num_classes is given, but y is not")
        if num_classes < 1:
            raise ValueError(f"cfl_ops.{op}: num_classes must be at least 1, but got {num_classes}")
        checks.tensor(op, "y", y, 1)
        if y.dtype != torch.int64:
            raise TypeError(
                f"cfl_ops.{op}: y must be int64 class indices where num_classes is given, but got {y.dtype}"
            )
        checks.size(op, "y", y, -1, x.shape[-2], "the rows of x")
        batches["y"] = y.shape[:-1]
        classes = num_classes
    elif y is not None:
        checks.tensor(op, "y", y, 2 if y.dtype != torch.int64 else 1)
        if y.dtype == torch.int64:
            raise TypeError(f"cfl_ops.{op}: y of class indices (int64) needs num_classes")
        checks.floating(op, "y", y, 2)
        checks.size(op, "y", y, -2, x.shape[-2], "the rows of x")
        batches["y"] = y.shape[:-2]
        if y.dtype != x.dtype:  # under autocast features are half and targets float32
            common = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(common), y.to(common)
            acc_dtype = torch.promote_types(acc_dtype, common)
    if sample_weight is not None:
        checks.sample_weight(op, sample_weight, x.shape[-2], "the rows of x")
        batches["sample_weight"] = sample_weight.shape[:-1]
    checks.same_device(op, "x", x, y=y, sample_weight=sample_weight)
    batch = checks.broadcastable(op, **batches)
    core_dims = (2, 1 if classes else 2, 1)
    x, y, sample_weight = expand_batch((x, y, sample_weight), core_dims, batch)
    return x, y, sample_weight, bias_column, classes, acc_dtype


# --- the exact Gram matrix alone: what CUDA C++ serves where it is compiled in ----------------------------------


def _exact_gram_python(x: Tensor, sample_weight: Tensor | None) -> Tensor:
    """X^T S X in float64, of x (..., B, D) in any floating-point dtype and float64 weights (..., B)."""
    wide = x.double()
    return _symmetric(_weighted(wide, sample_weight).mT @ wide)


EXACT_GRAM = define_op(
    "exact_gram(Tensor x, Tensor? sample_weight) -> Tensor",
    python=_exact_gram_python,
    fake=lambda x, sample_weight: x.new_empty(*x.shape[:-2], x.shape[-1], x.shape[-1], dtype=torch.float64),
    core_dims=(2, 1),
    cuda=cuda_cpp(cuda.exact_gram),
    helper=True,
)


# --- streaming ----------------------------------------------------------------------------------------------


def _gram_python_(
    gram: Tensor,
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
    """Moments <- decay * moments + those of the new rows, unless info says that these are bad."""
    bias_column = gram.shape[-1] > x.shape[-1]
    *fresh, info = _gram_python(x, y, sample_weight, bias_column, num_classes, gram.dtype)
    good = info == 0
    for old, new, dims in zip(
        (gram, cross, target_sum, target_sq, count), fresh, (2, 2, 1, 1, 0), strict=True
    ):
        keep = good[(...,) + (None,) * dims]
        kept = old * decay if decay != 0 else torch.zeros_like(old)  # 0 forgets, whatever was there
        old.copy_(torch.where(keep, kept + new, old))
    return info


GRAM_ = define_op(
    "gram_(Tensor(a!) gram, Tensor(b!) cross, Tensor(c!) target_sum, Tensor(d!) target_sq, Tensor(e!) count, "
    "Tensor x, Tensor? y, Tensor? sample_weight, int num_classes, float decay) -> Tensor info",
    python=_gram_python_,
    fake=lambda gram, *args: gram.new_empty(gram.shape[:-2], dtype=torch.int32),
    core_dims=lambda args: (2, 2, 1, 1, 0, 2, 1 if args[8] else 2, 1, None, None),
    cuda=(triton("cfl_ops.triton_kernels.gram:gram_"),),
)


def gram_(
    m: GramMoments,
    x: Tensor,
    y: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    decay: float = 1.0,
) -> GramMoments:
    r"""Add the moments of new rows to ``m`` in place: ``m <- decay * m + gram(x, y)``.

    No D x D temporary is made on the CPU. Whether there is a bias column, and how many classes, is read off
    ``m``; half inputs add to float32 moments, and narrower inputs to float64 moments in exact mode.

    Args:
        m: moments from :func:`gram`, updated in place.
        x: ``(..., B, D)`` in the batch shape of ``m``.
        y: targets as in :func:`gram`, where ``m`` has them.
        sample_weight: ``(..., B)`` weights of the rows.
        decay: what the old rows' weights are multiplied by: exponential forgetting below 1; 0 starts anew.

    Returns:
        ``m``.

    Raises:
        What :func:`gram` raises; ``m`` is then unchanged.

    Example:
        >>> import torch, cfl_ops
        >>> m = cfl_ops.gram(torch.ones(2, 2))
        >>> cfl_ops.gram_(m, torch.ones(1, 2), decay=0.5).gram
        tensor([[2., 2.],
                [2., 2.]])

    """
    if not isinstance(m, GramMoments):
        raise TypeError(f"cfl_ops.gram_: m must be GramMoments, but got {type(m).__name__}")
    if not torch.compiler.is_compiling() and not 0 <= decay < float("inf"):
        raise ValueError(f"cfl_ops.gram_: decay must be finite and not negative, but got {decay}")
    checks.floating("gram_", "x", x, 2)
    order, width = m.gram.shape[-1], x.shape[-1]
    if order not in (width, width + 1):
        raise ValueError(
            f"cfl_ops.gram_: x must have width {order} (or {order - 1} where m has a bias column), "
            f"but got shape {tuple(x.shape)}"
        )
    if (m.cross is None) != (y is None):
        raise ValueError(f"cfl_ops.gram_: m has {'no ' * (m.cross is None)}targets, so y must be as well")
    classes = None
    if y is not None and isinstance(y, Tensor) and y.dtype == torch.int64 and m.cross is not None:
        classes = m.cross.shape[-1]
    acc_dtype = m.gram.dtype if m.gram.dtype in (torch.float32, torch.float64) else None
    x, y, sample_weight, _, num_classes, acc = _gram_arguments(
        "gram_", x, y, order > width, sample_weight, classes, acc_dtype
    )
    if acc != m.gram.dtype:
        raise TypeError(f"cfl_ops.gram_: m must be {acc} for {x.dtype} x, but it is {m.gram.dtype}")
    checks.same_device("gram_", "m", m.gram, x=x)
    if x.shape[:-2] != m.gram.shape[:-2]:
        raise ValueError(
            f"cfl_ops.gram_: x must have the batch shape {tuple(m.gram.shape[:-2])} of m, "
            f"but got shape {tuple(x.shape)}"
        )
    if m.cross is None or m.target_sum is None or m.target_sq is None:
        empty = m.gram.new_empty(*m.gram.shape[:-1], 0)
        moments = (m.gram, empty, empty[..., 0, :].clone(), empty[..., 0, :].clone(), m.count)
    else:
        moments = (m.gram, m.cross, m.target_sum, m.target_sq, m.count)
        if y is not None and not num_classes and y.shape[-1] != m.cross.shape[-1]:
            raise ValueError(
                f"cfl_ops.gram_: y must have {m.cross.shape[-1]} columns as in m, but got shape {tuple(y.shape)}"
            )
    info = GRAM_(*moments, x, y, sample_weight, num_classes, decay)
    _check_data(info, [m.gram, m.count], x, y, sample_weight, num_classes, moments[2], acc)
    return m


# --- moments of a layer's activations -------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "celu": F.celu,
}
BLOCK_BYTES = 8 << 20  # of features alive at a time: past the caches of a core nothing is gained
BLOCK_BYTES_CUDA = 32 << 20  # they fit the L2 cache, and keep a card busy for longer than their launches take


def _row_blocks(x: Tensor, width: int) -> list[slice]:
    """Blocks of the rows of x whose features have up to ``width`` columns."""
    rows, held = x.shape[-2], BLOCK_BYTES_CUDA if x.is_cuda else BLOCK_BYTES
    step = max(64, held // max(1, width * max(1, x.shape[:-2].numel()) * x.element_size()))
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    h = x @ weight.mT
    return ACTIVATIONS[activation](h if bias is None else h + bias.unsqueeze(-2))


def _linear_gram_python(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    sample_weight: Tensor | None,
    activation: str,
    bias_column: bool,
    num_classes: int,
    acc_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """A block of rows at a time: features, activation, and their moments added in place."""
    batch = x.shape[:-2]
    targets = 0 if y is None else num_classes or y.shape[-1]
    order = weight.shape[-2] + int(bias_column)
    moments = (
        x.new_zeros(*batch, order, order, dtype=acc_dtype),
        x.new_zeros(*batch, order, targets, dtype=acc_dtype),
        x.new_zeros(*batch, targets, dtype=acc_dtype),
        x.new_zeros(*batch, targets, dtype=acc_dtype),
        x.new_zeros(batch, dtype=torch.float64),
    )
    info = x.new_zeros(batch, dtype=torch.int32)
    blocks = _row_blocks(x, max(weight.shape[-2:]))
    for block in blocks:
        features = _layer(x[..., block, :], weight, bias, activation)
        part = GRAM_.overload(
            *moments,
            features,
            None if y is None else y[..., block] if num_classes else y[..., block, :],
            None if sample_weight is None else sample_weight[..., block],
            num_classes,
            1.0,
        )
        info = torch.where(info == 0, part, info)
    return (*moments, info)


def _linear_gram_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    sample_weight: Tensor | None,
    activation: str,
    bias_column: bool,
    num_classes: int,
    acc_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    features = x.new_empty(*x.shape[:-1], weight.shape[-2])
    return _gram_fake(features, y, sample_weight, bias_column, num_classes, acc_dtype)


def _linear_gram_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]
    if isinstance(ctx, torch.autograd.function.FunctionCtx):
        ctx.mark_non_differentiable(output[5])


def _linear_gram_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """The features of a block are computed again, and differentiated through its moments."""
    x, weight, bias, y, sample_weight = ctx.saved_tensors
    activation, bias_column, num_classes, acc_dtype = ctx.options
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[:5]) if needed]
    by_rows: dict[int, list[Tensor]] = {i: [] for i in wanted if i in (0, 3, 4)}
    summed: dict[int, Tensor] = {}
    blocks = _row_blocks(x, max(weight.shape[-2:]))
    for block in blocks or [slice(0, 0)]:
        inputs = [
            x[..., block, :],
            weight,
            bias,
            None if y is None else y[..., block] if num_classes else y[..., block, :],
            None if sample_weight is None else sample_weight[..., block],
        ]

        def outputs(*varied: Tensor, inputs: list[Any] = inputs) -> tuple[Tensor, ...]:
            given = list(inputs)
            for position, value in zip(wanted, varied, strict=True):
                given[position] = value
            features = _layer(given[0], given[1], given[2], activation)
            return _gram_python(features, given[3], given[4], bias_column, num_classes, acc_dtype)[:5]

        primals, pullback = torch.func.vjp(outputs, *(inputs[i] for i in wanted))  # type: ignore[misc]
        cotangents = tuple(
            torch.zeros_like(primal) if grad is None else grad
            for primal, grad in zip(primals, grads[:5], strict=True)
        )
        for position, grad in zip(wanted, pullback(cotangents), strict=True):
            if position in by_rows:
                by_rows[position].append(grad)
            else:
                summed[position] = grad + summed[position] if position in summed else grad
    result: list[Any] = [None] * 9
    for position in wanted:
        if position not in by_rows:
            result[position] = summed[position]
        else:
            rows_dim = -2 if position == 0 or (position == 3 and not num_classes) else -1
            result[position] = torch.cat(by_rows[position], dim=rows_dim)
    return tuple(result)


LINEAR_GRAM = define_op(
    "linear_gram(Tensor x, Tensor weight, Tensor? bias, Tensor? y, Tensor? sample_weight, str activation, "
    "bool bias_column, int num_classes, ScalarType acc_dtype) -> "
    "(Tensor gram, Tensor cross, Tensor target_sum, Tensor target_sq, Tensor count, Tensor info)",
    python=_linear_gram_python,
    fake=_linear_gram_fake,
    core_dims=lambda args: (2, 2, 1, 1 if args[7] else 2, 1, None, None, None, None),
    derivative=Derivative(_linear_gram_setup_context, _linear_gram_backward),
    composite=True,
)


def linear_gram(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    y: Tensor | None = None,
    *,
    bias_column: bool = False,
    sample_weight: Tensor | None = None,
    num_classes: int | None = None,
    acc_dtype: torch.dtype | None = None,
) -> GramMoments:
    r"""The moments of ``act(x W^T + b)`` without ever storing these features.

    A block of rows at a time goes through the layer and into the sums, so the memory beside the result does
    not depend on the number of rows (about 16 MB).

    Args:
        x: ``(..., B, C)`` inputs of the layer.
        weight: ``(..., D, C)``, in the dtype of ``x``.
        bias: ``(..., D)`` or None.
        activation: ``"relu"``, ``"gelu"`` (with erf), ``"gelu_tanh"``, ``"silu"``, ``"tanh"``, ``"celu"`` or
            ``"identity"``.
        y: targets, as in :func:`gram`.
        bias_column: append a feature that is 1.
        sample_weight: ``(..., B)`` weights of the rows.
        num_classes: K for class indices.
        acc_dtype: as in :func:`gram`.

    Returns:
        :class:`GramMoments` of the features ``(..., B, D)``.

    Raises:
        What :func:`gram` raises, and ``ValueError`` for an unknown activation.

    Differentiable (twice), in x, weight, bias, y and sample_weight. Costs ``2 B C D + B D (D + 1)`` FLOPs.

    Example:
        >>> import torch, cfl_ops
        >>> x, weight = torch.ones(3, 2), torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
        >>> cfl_ops.linear_gram(x, weight, activation="relu").gram
        tensor([[12.,  0.],
                [ 0.,  0.]])

    """
    op = "linear_gram"
    checks.choice(op, "activation", activation, tuple(ACTIVATIONS))
    checks.floating(op, "x", x, 2)
    checks.floating(op, "weight", weight, 2)
    checks.size(op, "weight", weight, -1, x.shape[-1], "the width of x")
    if bias is not None:
        checks.floating(op, "bias", bias, 1)
        checks.size(op, "bias", bias, -1, weight.shape[-2], "the rows of weight")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"cfl_ops.{op}: {name} must be {x.dtype} as x is, but got {value.dtype}")
    checks.same_device(op, "x", x, weight=weight, bias=bias)
    given = x.dtype
    x, y, sample_weight, _, classes, acc = _gram_arguments(
        op, x, y, bias_column, sample_weight, num_classes, acc_dtype
    )
    if x.dtype != given:  # promoted together with y
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    args = (x, weight, bias, y, sample_weight)
    core_dims = (2, 2, 1, 1 if classes else 2, 1)
    checks.broadcastable(op, x=x.shape[:-2], weight=weight.shape[:-2])
    x, weight, bias, y, sample_weight = expand_batch(args, core_dims)
    *out, info = LINEAR_GRAM(x, weight, bias, y, sample_weight, activation, bias_column, classes, acc)
    _check_data(info, out, x, y, sample_weight, classes, out[2], acc)
    return _as_moments(out, y)
