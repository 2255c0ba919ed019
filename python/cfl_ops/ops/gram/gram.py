"""gram and gram_: the moments of features and targets that every closed-form learner starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import DTYPES, same_dtype, trailing, within
from cfl_ops._core.batching import expand_batch
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op, gradients
from cfl_ops._gpu.launch import triton
from cfl_ops.ops.gram.codes import BAD_CLASS, BAD_WEIGHT, NOT_FINITE
from cfl_ops.ops.gram.moments import GramMoments, check_decay

__all__ = ["gram", "gram_"]


HALVES = (torch.float16, torch.bfloat16)


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
            inputs, else the dtype of ``x``. float64 for narrower inputs is called *float64 accumulation*. Sums in
            float32 are infinite past 3e38, and have few digits or are 0 below 1e-38 (features of 1e-19).

    Returns:
        :class:`GramMoments`: ``gram (..., D', D')``, ``cross (..., D', K)``, ``target_sum (..., K)``,
        ``target_sq (..., K)`` (the three of them None without ``y``) and ``count (...)`` in float64.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or a weight is negative.
        IndexError: a class index is out of range.
        ValueError: under float64 accumulation, ``x`` has NaN or Inf (with their number); they propagate
            otherwise.

    Differentiable (twice) in x, y and sample_weight. Costs ``B D (D + 1) + 2 B D K`` FLOPs.

    Example:
        >>> import torch, cfl_ops
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> cfl_ops.gram(x, bias_column=True).gram
        tensor([[10., 14.,  4.],
                [14., 20.,  6.],
                [ 4.,  6.,  2.]])

    """
    a = gram_arguments("gram", x, y, bias_column, sample_weight, num_classes, acc_dtype)
    out = GRAM(*a)
    refuse_bad_rows(out[5], out[:5], a, out[2])
    return as_moments(out, y)


def gram_(
    m: GramMoments,
    x: Tensor,
    y: Tensor | None = None,
    *,
    bias_column: bool = False,
    sample_weight: Tensor | None = None,
    decay: float = 1.0,
) -> GramMoments:
    r"""Add the moments of new rows to ``m`` in place: ``m <- decay * m + gram(x, y)``.

    No D x D temporary is made on the CPU. How many classes there are is read off ``m``; half inputs add to
    float32 moments, and narrower inputs to float64 moments (float64 accumulation).

    Args:
        m: moments from :func:`gram`, updated in place.
        x: ``(..., B, D)`` in the batch shape of ``m``.
        y: targets as in :func:`gram`, where ``m`` has them.
        bias_column: whether ``m`` has one, as it was said to :func:`gram`: moments do not show it.
        sample_weight: ``(..., B)`` weights of the rows.
        decay: what the old rows' weights are multiplied by: exponential forgetting below 1; 0 starts anew. In
            float32 it is 1, or differs from 1 by 1e-6 or more: what is closer would be rounded.

    Returns:
        ``m``.

    Raises:
        What :func:`gram` raises; ``m`` is then unchanged, all of a batch.

    Example:
        >>> import torch, cfl_ops
        >>> m = cfl_ops.gram(torch.ones(2, 2))
        >>> cfl_ops.gram_(m, torch.ones(1, 2), decay=0.5).gram
        tensor([[2., 2.],
                [2., 2.]])

    """
    decay = checks.number("gram_", "decay", decay, checks.NOT_NEGATIVE)
    new = _new_rows(m, x, y, bias_column, sample_weight)
    check_decay("gram_", "decay", decay, m.gram.dtype)
    a = in_place(_moments(m), new, decay)
    info = GRAM_(*a)
    refuse_bad_rows(info, [field for field in m if field is not None], new, a.target_sum)
    return m


def as_moments(out: Sequence[Tensor], y: Tensor | None) -> GramMoments:
    """The op's results, without the zero-width ones where there are no targets."""
    return GramMoments._make((out[0], None, None, None, out[4]) if y is None else out[:5])


def plain_gram(x: Tensor, y: Tensor | None, acc_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The op without any option, for what is made of it."""
    out: tuple[Tensor, ...] = GRAM(
        *GramArguments(x=x, y=y, sample_weight=None, bias_column=False, num_classes=0, acc_dtype=acc_dtype)
    )
    return out


class GramArguments(NamedTuple):
    """The arguments of the op ``gram``."""

    x: Tensor
    y: Tensor | None
    sample_weight: Tensor | None
    bias_column: bool
    num_classes: int
    """K where y holds class indices, 0 where it is dense."""
    acc_dtype: torch.dtype

    @property
    def order(self) -> int:
        """D', the features with the bias column."""
        return self.x.shape[-1] + int(self.bias_column)  # a symbolic size takes no bool (torch 2.11)

    @property
    def targets(self) -> int:
        """K, of dense targets or classes; 0 without targets."""
        return 0 if self.y is None else self.num_classes or self.y.shape[-1]


class GramInPlaceArguments(NamedTuple):
    """The arguments of the op ``gram_``: the moments that it writes to, and the new rows."""

    gram: Tensor
    cross: Tensor
    target_sum: Tensor
    target_sq: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    x: Tensor
    y: Tensor | None
    sample_weight: Tensor | None
    num_classes: int
    decay: float

    @property
    def new_rows(self) -> GramArguments:
        """What the op ``gram`` would be given."""
        bias_column = self.gram.shape[-1] > self.x.shape[-1]
        return GramArguments(
            self.x, self.y, self.sample_weight, bias_column, self.num_classes, self.gram.dtype
        )

    def add(self, new: Sequence[Tensor]) -> Tensor:
        """Moments <- decay * moments + the results of ``gram`` for the new rows, all of the batch or, if their info
        says that some are bad, none; returns that info.
        """
        info = new[5]
        good = (info == 0).all()
        for old, fresh in zip(self[:5], new, strict=False):
            # 0 forgets, whatever was there.
            kept = old * self.decay if self.decay != 0 else torch.zeros_like(old)
            old.copy_(torch.where(good, kept + fresh, old))
        return info


def in_place(moments: Sequence[Tensor], new: GramArguments, decay: float) -> GramInPlaceArguments:
    """The arguments that add new rows to five moments."""
    x, y, sample_weight, _, num_classes, _ = new
    return GramInPlaceArguments._make((*moments, x, y, sample_weight, num_classes, decay))


MOMENT_SHAPES = {
    "gram": "full D' D'", "cross": "full D' K", "target_sum": "full K", "target_sq": "full K", "count": "float64",
}  # fmt: skip


_DENSE = {"x": "B D", "y": "B K", "sample_weight": "B"}
_CLASSES = _DENSE | {"y": "int64 B"}
_DENSE_DIMS, _CLASS_DIMS = trailing(_DENSE), trailing(_CLASSES)
_ADD_DENSE, _ADD_CLASSES = MOMENT_SHAPES | _DENSE, MOMENT_SHAPES | _CLASSES


def row_shapes(num_classes: int) -> dict[str, str]:
    """What each tensor that has the rows' dimension must be, as the ops take it."""
    return _CLASSES if num_classes else _DENSE


def row_dims(num_classes: int) -> dict[str, int]:
    """How many of their trailing dimensions the ops work on."""
    return _CLASS_DIMS if num_classes else _DENSE_DIMS


def check_rows(a: GramArguments, op: str = "gram") -> None:
    """Raise for what is wrong with the options of the rows."""
    within(op, "num_classes", a.num_classes, 0)
    if a.num_classes and a.y is None:
        raise ValueError(f"cfl_ops.{op}: num_classes is {a.num_classes}, but y is not given")
    if a.y is not None and not a.num_classes:
        same_dtype(op, "y", a.y, "x", a.x.dtype)
    checks.one_of(op, "acc_dtype", a.acc_dtype, DTYPES["full"])
    if a.x.dtype == torch.float64:
        checks.one_of(op, "acc_dtype", a.acc_dtype, (torch.float64,))


def _check_moments(a: GramInPlaceArguments) -> None:
    """Raise for what is wrong with the moments and the decay."""
    checks.number("gram_", "decay", a.decay, checks.NOT_NEGATIVE)
    check_rows(a.new_rows, "gram_")
    for name, value in zip(MOMENT_SHAPES, a[:4], strict=False):
        same_dtype("gram_", name, value, "gram", a.gram.dtype)
    order, width, targets = a.gram.shape[-1], a.x.shape[-1], a.new_rows.targets
    if order != width and order != width + 1:
        raise ValueError(f"cfl_ops.gram_: gram must be of order {width} or {width + 1}, but it is of {order}")
    if a.cross.shape[-1] != targets:
        raise ValueError(
            f"cfl_ops.gram_: cross must have {targets} columns as y has, but it has {a.cross.shape[-1]}"
        )


def gram_arguments(
    op: str,
    x: Tensor,
    y: Tensor | None,
    bias_column: bool,
    sample_weight: Tensor | None,
    num_classes: int | None,
    acc_dtype: torch.dtype | None,
) -> GramArguments:
    """Check the rows that ``gram``, ``gram_`` and ``linear_gram`` take, and bring them to the form of the op."""
    checks.floating(op, "x", x, 2)
    bias_column = checks.flag(op, "bias_column", bias_column)
    if acc_dtype is None:
        acc_dtype = x.dtype
        if acc_dtype in HALVES:
            acc_dtype = torch.float32
    elif acc_dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"cfl_ops.{op}: acc_dtype must be torch.float32 or torch.float64, but got {acc_dtype}"
        )
    elif acc_dtype == torch.float32 and x.dtype == torch.float64:
        raise TypeError(f"cfl_ops.{op}: acc_dtype must be torch.float64 for float64 x, but got {acc_dtype}")
    if y is None and sample_weight is None and num_classes is None:
        return GramArguments(x, None, None, bias_column, 0, acc_dtype)  # the short way for small calls

    classes = 0
    batches = {"x": x.shape[:-2]}
    if num_classes is not None:
        if y is None:
            raise ValueError(f"cfl_ops.{op}: num_classes is given, but y is not")
        num_classes = checks.integer(op, "num_classes", num_classes, 1)
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
    mine = batches.pop("x")
    if any(shape != mine for shape in batches.values()):
        batch = checks.broadcastable(op, x=mine, **batches)
        x, y, sample_weight = expand_batch((x, y, sample_weight), (*row_dims(classes).values(),), batch)
    return GramArguments(x, y, sample_weight, bias_column, classes, acc_dtype)


def _new_rows(
    m: GramMoments, x: Tensor, y: Tensor | None, bias_column: bool, sample_weight: Tensor | None
) -> GramArguments:
    """Check what :func:`gram_` takes: the new rows as in :func:`gram`, and that they fit ``m``."""
    if not isinstance(m, GramMoments):
        raise TypeError(f"cfl_ops.gram_: m must be GramMoments, but got {type(m).__name__}")
    bias_column = checks.flag("gram_", "bias_column", bias_column)
    for name, value in zip(m._fields, m, strict=True):
        if not isinstance(value, Tensor) and (value is not None or name in ("gram", "count")):
            raise TypeError(f"cfl_ops.gram_: m.{name} must be a tensor, but got {type(value).__name__}")
    # The sizes that are read here; the op checks the rest.
    checks.tensor("gram_", "m.gram", m.gram, 2)
    if m.cross is not None:
        checks.tensor("gram_", "m.cross", m.cross, 2)
    checks.floating("gram_", "x", x, 2)
    order = m.gram.shape[-1]
    if x.shape[-1] + int(bias_column) != order:
        raise ValueError(
            f"cfl_ops.gram_: x must have width {order - int(bias_column)}, for m is of order {order} "
            f"and bias_column is {bias_column}, but got shape {tuple(x.shape)}"
        )
    if (m.cross is None) != (y is None):
        raise ValueError(f"cfl_ops.gram_: m has {'no ' * (m.cross is None)}targets, so y must be as well")
    classes = None
    if y is not None and isinstance(y, Tensor) and y.dtype == torch.int64 and m.cross is not None:
        classes = m.cross.shape[-1]
    acc_dtype = m.gram.dtype if m.gram.dtype in (torch.float32, torch.float64) else None
    new = gram_arguments("gram_", x, y, bias_column, sample_weight, classes, acc_dtype)
    if new.acc_dtype != m.gram.dtype:
        raise TypeError(
            f"cfl_ops.gram_: m must be {new.acc_dtype} for {new.x.dtype} x, but it is {m.gram.dtype}"
        )
    checks.same_device("gram_", "m", m.gram, x=new.x)
    if new.x.shape[:-2] != m.gram.shape[:-2]:
        raise ValueError(
            f"cfl_ops.gram_: x must have the batch shape {tuple(m.gram.shape[:-2])} of m, "
            f"but got shape {tuple(new.x.shape)}"
        )
    if new.y is not None and m.cross is not None and not classes and new.y.shape[-1] != m.cross.shape[-1]:
        raise ValueError(
            f"cfl_ops.gram_: y must have {m.cross.shape[-1]} columns as before, but got shape {tuple(new.y.shape)}"
        )
    return new


def _moments(m: GramMoments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op writes to: of zero width where there are no targets."""
    gram, cross, target_sum, target_sq, count = m
    if cross is None or target_sum is None or target_sq is None:
        cross = gram.new_empty(*gram.shape[:-1], 0)
        target_sum, target_sq = cross[..., 0, :].clone(), cross[..., 0, :].clone()
    return gram, cross, target_sum, target_sq, count


def gram_fallback(a: GramArguments) -> tuple[Tensor, ...]:
    """G = X^T S X, C = X^T S Y, with X widened by a column of ones if ``bias_column``."""
    y, batch, rows = a.y, a.x.shape[:-2], a.x.shape[-2]
    info = torch.zeros(batch, dtype=torch.int32, device=a.x.device)
    x = a.x.to(a.acc_dtype)
    if a.bias_column:
        x = torch.cat([x, x.new_ones(*batch, rows, 1)], dim=-1)
    weighted = weighted_rows(x, a.sample_weight)
    gram = symmetric(weighted.mT @ x)
    if a.acc_dtype == torch.float64 and a.x.dtype != torch.float64:
        finite = gram.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        info = torch.where(finite, info, NOT_FINITE)
    if a.sample_weight is None:
        count = torch.full(batch, rows, dtype=torch.float64, device=x.device)
    else:
        count = a.sample_weight.sum(-1, dtype=torch.float64)
        info = torch.where((a.sample_weight >= 0).all(-1), info, BAD_WEIGHT)

    if y is None:
        cross, target_sum = x.new_zeros(*batch, a.order, 0), x.new_zeros(*batch, 0)
        return gram, cross, target_sum, target_sum.clone(), count, info
    if a.num_classes:
        outside = (y < 0) | (y >= a.num_classes)
        info = torch.where(outside.any(-1), BAD_CLASS, info)
        label = torch.where(outside, 0, y).unsqueeze(-1)
        ones = weighted_rows(x.new_ones(*batch, rows, 1), a.sample_weight)
        one_hot_sum = x.new_zeros(*batch, a.num_classes, a.order)
        cross = one_hot_sum.scatter_add(-2, label.expand_as(weighted), weighted).mT.contiguous()
        target_sum = x.new_zeros(*batch, a.num_classes).scatter_add(-1, label.squeeze(-1), ones.squeeze(-1))
        return gram, cross, target_sum, target_sum.clone(), count, info
    target = y.to(a.acc_dtype)
    cross = weighted.mT @ target
    weighted_target = weighted_rows(target, a.sample_weight)
    return gram, cross, weighted_target.sum(-2), (weighted_target * target).sum(-2), count, info


def weighted_rows(rows: Tensor, sample_weight: Tensor | None) -> Tensor:
    return rows if sample_weight is None else rows * sample_weight.to(rows.dtype).unsqueeze(-1)


def symmetric(lower: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    return lower.tril() + lower.tril(-1).mT


def gram_results(a: GramArguments, make: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """Tensors of the shapes of the op's results, by ``x.new_empty`` or the like."""
    batch = a.x.shape[:-2]
    return (
        make((*batch, a.order, a.order), dtype=a.acc_dtype),
        make((*batch, a.order, a.targets), dtype=a.acc_dtype),
        make((*batch, a.targets), dtype=a.acc_dtype),
        make((*batch, a.targets), dtype=a.acc_dtype),
        make(batch, dtype=torch.float64),
        make(batch, dtype=torch.int32),
    )


def _setup_context(ctx: Any, a: GramArguments, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*a[:3])
    ctx.options = a[3:]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Dx = s ([x 1] (Gbar + Gbar^T) + y Cbar^T), and likewise for y and s."""
    a = GramArguments(*ctx.saved_tensors, *ctx.options)
    acc, width = a.acc_dtype, a.x.shape[-1]
    g_gram, g_cross, g_sum, g_sq, g_count, _ = grads
    x, y = a.x.to(acc), a.y

    def times(matrix: Tensor) -> Tensor:  # [x 1] @ matrix, without the concatenation
        out = x @ matrix[..., :width, :]
        return out + matrix[..., width:, :] if a.bias_column else out

    grad_y = grad_weight = None
    row_x = torch.zeros_like(x)
    row_weight = x.new_zeros(x.shape[:-1])
    if g_count is not None:
        row_weight = row_weight + g_count.unsqueeze(-1).to(acc)
    if g_gram is not None:
        through = times(g_gram + g_gram.mT)
        row_x = row_x + through[..., :width]
        row_weight = row_weight + 0.5 * (through[..., :width] * x).sum(-1)
        if a.bias_column:
            row_weight = row_weight + 0.5 * through[..., width]
    if y is not None and not a.num_classes:
        target = y.to(acc)
        row_y = torch.zeros_like(target)
        if g_cross is not None:
            row_x = row_x + target @ g_cross[..., :width, :].mT
            through = times(g_cross)
            row_y = row_y + through
            row_weight = row_weight + (through * target).sum(-1)
        if g_sum is not None:
            row_y = row_y + g_sum.unsqueeze(-2)
            row_weight = row_weight + (target * g_sum.unsqueeze(-2)).sum(-1)
        if g_sq is not None:
            row_y = row_y + 2 * target * g_sq.unsqueeze(-2)
            row_weight = row_weight + (target * target * g_sq.unsqueeze(-2)).sum(-1)
        grad_y = weighted_rows(row_y, a.sample_weight).to(y.dtype)
    elif y is not None:
        if g_cross is not None:
            index = y.unsqueeze(-1).expand(*y.shape, g_cross.shape[-2])
            of_class = g_cross.mT.gather(-2, index)
            row_x = row_x + of_class[..., :width]
            row_weight = row_weight + (of_class[..., :width] * x).sum(-1)
            if a.bias_column:
                row_weight = row_weight + of_class[..., width]
        for grad in (g_sum, g_sq):
            if grad is not None:
                row_weight = row_weight + grad.gather(-1, y)
    grad_x = weighted_rows(row_x, a.sample_weight).to(a.x.dtype)
    if a.sample_weight is not None:
        grad_weight = row_weight.to(a.sample_weight.dtype)
    return gradients(GramArguments, x=grad_x, y=grad_y, sample_weight=grad_weight)


GRAM = define_op(
    "gram(Tensor x, Tensor? y, Tensor? sample_weight, bool bias_column, int num_classes, ScalarType acc_dtype) -> "
    "(Tensor gram, Tensor cross, Tensor target_sum, Tensor target_sq, Tensor count, Tensor info)",
    arguments=GramArguments,
    python=gram_fallback,
    fake=lambda a: gram_results(a, a.x.new_empty),
    shapes=lambda a: row_shapes(a.num_classes),
    check=check_rows,
    derivative=Derivative(_setup_context, _backward),
    cuda=(triton("cfl_ops.triton_kernels.gram:gram"),),
)

GRAM_ = define_op(
    "gram_(Tensor(a!) gram, Tensor(b!) cross, Tensor(c!) target_sum, Tensor(d!) target_sq, Tensor(e!) count, "
    "Tensor x, Tensor? y, Tensor? sample_weight, int num_classes, float decay) -> Tensor info",
    arguments=GramInPlaceArguments,
    python=lambda a: a.add(gram_fallback(a.new_rows)),
    fake=lambda a: a.gram.new_empty(a.gram.shape[:-2], dtype=torch.int32),
    shapes=lambda a: _ADD_CLASSES if a.num_classes else _ADD_DENSE,
    check=_check_moments,
    cuda=(triton("cfl_ops.triton_kernels.gram:gram_"),),
)


def refuse_bad_rows(info: Tensor, results: Sequence[Tensor], a: GramArguments, target_sum: Tensor) -> None:
    """Raise for what info says, wherever data can be refused at all: other calls need not synchronise."""
    x, y, sample_weight, _, num_classes, acc_dtype = a
    if num_classes or sample_weight is not None or (acc_dtype == torch.float64 and x.dtype != torch.float64):
        context = [item for item in (x, target_sum, y, sample_weight) if item is not None]
        check_info("gram", info, results, context)


@error_message("gram")
def _bad_rows(info: Tensor, context: Sequence[Tensor]) -> Exception:
    x, target_sum, *others = context
    index, code, where = first_failure(info)
    if code == NOT_FINITE:
        bad = int((~x[index].isfinite()).sum())
        if bad == 0:
            return ValueError(f"cfl_ops.gram: {where}the features of x, or their sums, overflow")
        return ValueError(
            f"cfl_ops.gram: {where}x has {bad} NaN or Inf value{'s' if bad > 1 else ''}, which float64 "
            "accumulation (acc_dtype=torch.float64) refuses"
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
