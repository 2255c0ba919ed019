"""The Cholesky factor of a matrix that changes by a few outer products: updates and downdates of rank k."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import same_dtype
from cfl_ops._core.batching import expand_batch
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op
from cfl_ops._gpu.launch import cuda_cpp, triton
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.cholesky import cuda
from cfl_ops.ops.cholesky.codes import BAD_L, BAD_V, BREAKDOWN_EPS
from cfl_ops.ops.cholesky.factor import (
    check_factor,
    copy_good_,
    factor_backward,
    with_bad_arguments,
    with_lost_digits,
)

__all__ = [
    "cholesky_downdate",
    "cholesky_downdate_",
    "cholesky_downdate_ex",
    "cholesky_downdate_ex_",
    "cholesky_update",
    "cholesky_update_",
    "cholesky_update_ex",
    "cholesky_update_ex_",
]


def cholesky_update(L: Tensor, V: Tensor, alpha: float = 1.0, *, decay: float = 1.0) -> Tensor:
    r"""The Cholesky factor after a rank-k change, without factoring anew.

    .. math:: L' L'^T = \text{decay} \cdot L L^T + \alpha V V^T

    (Reflectors column by column: Gill, Golub, Murray and Saunders 1974; hyperbolic for alpha < 0: Bojanczyk,
    Brent, Van Dooren and de Hoog 1987.)

    Args:
        L: the factor ``(..., D, D)``, float32 or float64, row- or column-major. Only the lower triangle is
            read. Zero pivots (a semi-definite factor) and negative ones are allowed.
        V: ``(..., D, k)``, of the dtype of ``L`` or narrower. Batch dimensions broadcast.
        alpha: the weight of the change; negative for a downdate.
        decay: the weight >= 0 of the old matrix.

    Returns:
        ``L' (..., D, D)``, lower triangular with a diagonal >= 0.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or NaN or Inf in ``V`` or ``L``.
        torch.linalg.LinAlgError: a downdate leaves a matrix that is not positive definite to working precision: a
            squared pivot falls to less than 10 eps of itself, or rounding may have changed one by a tenth; names
            the batch index.

    ``L' L'^T`` is off by a few eps of the norm of the old and the new matrix, for each update of a stream. A pivot
    that is smaller than that, of a ``V`` far larger than ``L`` say, an update gives without its digits; a downdate
    raises. Costs ``2 k D^2`` FLOPs, against ``D^3 / 3 + k D^2`` for forming and factoring the new matrix.
    Differentiable (twice) in L and V, at the cost of a few triangular solves, ``O(D^3)``.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.cholesky_update(torch.eye(2), torch.tensor([[0.0], [1.0]]), 3.0)
        tensor([[1., 0.],
                [0., 2.]])

    """
    return _or_raise(_update("cholesky_update", L, V, alpha, decay), alpha)


def cholesky_update_ex(
    L: Tensor, V: Tensor, alpha: float = 1.0, *, decay: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As :func:`cholesky_update`, but never raises for what the data holds and never synchronises a GPU.

    Returns:
        ``(L', info)``, info ``(...)`` int32. 0: success. j > 0: pivot j of a downdate is not positive (or not
        finite). Negative: NaN or Inf in V (-1) or L (-2). Where info is not 0, L' is the old factor.

    Example:
        >>> import torch, cfl_ops
        >>> L, info = cfl_ops.cholesky_update_ex(torch.eye(2), torch.tensor([[0.0], [2.0]]), -1.0)
        >>> int(info), L
        (2, tensor([[1., 0.],
                [0., 1.]]))

    """
    return _update("cholesky_update_ex", L, V, alpha, decay)


def cholesky_update_(L: Tensor, V: Tensor, alpha: float = 1.0, *, decay: float = 1.0) -> Tensor:
    """As :func:`cholesky_update`, in place: only the lower triangle of ``L`` is read and written.

    Where it raises, ``L`` is unchanged; in a batch, the elements that did not fail are updated, and the
    exception's ``info`` is 0 for these (see :func:`cholesky_update_ex`). Takes no part in autograd: neither ``L`` nor
    ``V`` may require grad, but under ``torch.no_grad()``.

    Returns:
        ``L``.

    Example:
        >>> import torch, cfl_ops
        >>> L = torch.eye(2)
        >>> cfl_ops.cholesky_update_(L, torch.ones(2, 1), decay=0.5)
        tensor([[1.2247, 0.0000],
                [0.8165, 0.9129]])

    """
    return _or_raise(_update("cholesky_update_", L, V, alpha, decay, in_place=True), alpha)


def cholesky_update_ex_(L: Tensor, V: Tensor, alpha: float = 1.0, *, decay: float = 1.0) -> Tensor:
    """As :func:`cholesky_update_`, but returns ``info`` (see :func:`cholesky_update_ex`) instead of raising.

    Example:
        >>> import torch, cfl_ops
        >>> int(cfl_ops.cholesky_update_ex_(torch.eye(2), torch.ones(2, 1)))
        0

    """
    return _update("cholesky_update_ex_", L, V, alpha, decay, in_place=True)[1]


def cholesky_downdate(L: Tensor, V: Tensor) -> Tensor:
    """The factor of ``L L^T - V V^T``: :func:`cholesky_update` with alpha = -1.

    Raises:
        torch.linalg.LinAlgError: that matrix is not positive definite to working precision.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.cholesky_downdate(2 * torch.eye(1), torch.tensor([[1.0]]))
        tensor([[1.7321]])

    """
    return _or_raise(_update("cholesky_downdate", L, V, -1.0, 1.0), -1.0)


def cholesky_downdate_ex(L: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`cholesky_update_ex` with alpha = -1.

    Example:
        >>> import torch, cfl_ops
        >>> L, info = cfl_ops.cholesky_downdate_ex(torch.eye(1), torch.tensor([[1.0]]))
        >>> int(info)
        1

    """
    return _update("cholesky_downdate_ex", L, V, -1.0, 1.0)


def cholesky_downdate_(L: Tensor, V: Tensor) -> Tensor:
    """:func:`cholesky_update_` with alpha = -1.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.cholesky_downdate_(2 * torch.eye(1), torch.tensor([[1.0]]))
        tensor([[1.7321]])

    """
    return _or_raise(_update("cholesky_downdate_", L, V, -1.0, 1.0, in_place=True), -1.0)


def cholesky_downdate_ex_(L: Tensor, V: Tensor) -> Tensor:
    """:func:`cholesky_update_ex_` with alpha = -1.

    Example:
        >>> import torch, cfl_ops
        >>> int(cfl_ops.cholesky_downdate_ex_(2 * torch.eye(1), torch.tensor([[1.0]])))
        0

    """
    return _update("cholesky_downdate_ex_", L, V, -1.0, 1.0, in_place=True)[1]


_UPDATED, _DOWNDATED = torch.tensor(1.0), torch.tensor(-1.0)


def _update(
    op: str, L: Tensor, V: Tensor, alpha: float, decay: float, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """What all forms do: the new factor (in place: L itself) and info."""
    alpha = checks.number(op, "alpha", alpha)
    decay = checks.number(op, "decay", decay, checks.NOT_NEGATIVE)
    L, V = _arguments(op, L, V, in_place)
    if in_place:
        return L, UPDATE_(L, V, alpha, decay)
    out: tuple[Tensor, Tensor] = UPDATE(L, V, alpha, decay)
    return out


def _or_raise(result: tuple[Tensor, Tensor], alpha: float) -> Tensor:
    """The new factor, if info says that it is one."""
    out, info = result
    check_info("cholesky_update", info, [out], [_DOWNDATED if alpha < 0 else _UPDATED])
    return out


def _arguments(op: str, L: Tensor, V: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """Check the arguments; L and V with one batch shape and in one dtype."""
    check_factor(op, "L", L)
    checks.floating(op, "V", V, 2)
    if V.shape[-2] != L.shape[-1]:
        checks.size(op, "V", V, -2, L.shape[-1], "the order of L")
    if V.device != L.device:
        checks.same_device(op, "L", L, V=V)
    if V.dtype != L.dtype:
        if torch.promote_types(V.dtype, L.dtype) != L.dtype:
            raise TypeError(f"cfl_ops.{op}: V must not be wider than L ({L.dtype}), but got {V.dtype}")
        V = V.to(L.dtype)
    if L.shape[:-2] != V.shape[:-2]:
        batch = checks.broadcastable(op, L=L.shape[:-2], V=V.shape[:-2])
        if in_place and L.shape[:-2] != batch:
            raise ValueError(
                f"cfl_ops.{op}: L must have the batch shape {tuple(batch)} to be updated in place, "
                f"but got shape {tuple(L.shape)}"
            )
        L, V = expand_batch((L, V), (2, 2), batch)
    return L, V


def _update_python(L: Tensor, V: Tensor, alpha: float, decay: float) -> tuple[Tensor, Tensor]:
    """Column by column, a reflector turns (L_jj, row j of W) into (r, 0) and acts on the rows below.

    W is V sqrt(|alpha|). For a downdate the reflector is hyperbolic; both are stable in this form. Columns of V that
    are far longer than a pivot go one by one, for the small differences of large ones would be all that is left beside
    small pivots; where only a GPU could tell, they do not.
    """
    order, eps = L.shape[-1], torch.finfo(L.dtype).eps
    if alpha > 0 and V.shape[-1] > 1 and _far_longer(L, V * math.sqrt(alpha), decay):
        old, info = L.tril(), with_bad_arguments(torch.zeros(L.shape[:-2], dtype=torch.int32), L, V)
        out = old
        for p in range(V.shape[-1]):
            out, failed = _update_python(out, V[..., p : p + 1], alpha, decay if p == 0 else 1.0)
            info = torch.where(info == 0, failed, info)
        return torch.where((info != 0)[..., None, None], old, out), info
    old = L.tril()
    out = old * math.sqrt(decay)
    w = V * math.sqrt(abs(alpha))
    side = -1.0 if alpha < 0 else 1.0
    pivots = []
    for j in range(order):
        sign = torch.where(out[..., j, j] < 0, -1.0, 1.0).to(out.dtype)
        column = out[..., j:, j] * sign.unsqueeze(-1)
        length, v = column[..., 0], w[..., j, :]
        # Scaled by the largest entry, so that squares neither overflow nor underflow.
        unit = torch.maximum(length, v.abs().amax(-1)) if v.shape[-1] else length
        safe_unit = torch.where(unit > 0, unit, 1.0)
        l1, v1 = length / safe_unit, v / safe_unit.unsqueeze(-1)
        added = (v1 * v1).sum(-1)
        square = l1 * l1 + side * added
        breakdown = ~(square > BREAKDOWN_EPS * eps * l1 * l1) if alpha < 0 else ~(square >= 0)
        r1 = square.clamp(min=0).sqrt()
        zero_pivot = r1 == 0  # a zero column of a semi-definite factor stays one
        safe_r1 = torch.where(zero_pivot, 1.0, r1)
        # The change, 1 - l / r, not a cosine near 1: roundings of that one all go the same way.
        less = side * added / (safe_r1 * torch.where(zero_pivot, 1.0, l1 + r1))
        change = less * r1
        r2 = l1 + change
        r = r2 * safe_unit
        pivots.append(breakdown | ~r.isfinite())
        s = (v1 / safe_r1.unsqueeze(-1)).masked_fill(zero_pivot.unsqueeze(-1), 0.0)
        g = v1 / torch.where(zero_pivot, 1.0, l1 + r1).unsqueeze(-1)
        # What the rounding of the pivot added to it, as a share of it, is added to the whole column.
        rounded = ((r2 - l1) - change) / torch.where(r2 > 0, r2, 1.0)
        less = torch.where(zero_pivot, 0.0, less - l1 / safe_r1 * rounded)
        below, single = w[..., j:, :], alpha > 0 and w.shape[-1] == 1
        new = column + (side * (below @ s.unsqueeze(-1)).squeeze(-1) - less.unsqueeze(-1) * column)
        turned = below - (column + new).unsqueeze(-1) * g.unsqueeze(-2)
        if single:  # W less what is nearly W would leave rounding, where v is longer than l
            rotated = (l1 / safe_r1)[..., None, None] * below - column.unsqueeze(-1) * s.unsqueeze(-2)
            turned = torch.where((added > l1 * l1)[..., None, None], rotated, turned)
        w[..., j:, :] = turned
        out[..., j:, j] = new
        out[..., j, j] = r
    info = torch.zeros(L.shape[:-2], dtype=torch.int32, device=L.device)
    if order:
        failed = torch.stack(pivots, -1)
        first = failed.to(torch.int32).argmax(-1) + 1
        info = with_bad_arguments(torch.where(failed.any(-1), first, info), old, V)
        info = with_lost_digits(info, out, V, alpha)
    return torch.where((info != 0)[..., None, None], old, out), info


def _far_longer(L: Tensor, W: Tensor, decay: float) -> bool:
    """Whether a column of W is far longer than a pivot."""
    if not L.is_cpu or W.numel() == 0:
        return False
    pivots = L.diagonal(dim1=-2, dim2=-1).abs() * math.sqrt(decay)
    most = torch.finfo(L.dtype).eps ** -0.25
    return bool(((W.abs().amax(-1) > most * pivots) & (pivots > 0)).any())


def _update_python_(L: Tensor, V: Tensor, alpha: float, decay: float) -> Tensor:
    out, info = _update_python(L, V, alpha, decay)
    copy_good_(L, out, info)
    return info


def _update_fake(L: Tensor, V: Tensor, alpha: float, decay: float) -> tuple[Tensor, Tensor]:
    return L.new_empty(L.shape), L.new_empty(L.shape[:-2], dtype=torch.int32)


def _update_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    L, V, ctx.alpha, ctx.decay = inputs
    ctx.save_for_backward(L, V, output[0])


def _update_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """Through A = decay L L^T + alpha V V^T; made of differentiable ops, so twice, too."""
    if grad is None:
        return None, None, None, None
    L, V, factor = ctx.saved_tensors
    of_matrix = factor_backward(factor, grad)
    grad_l = (2 * ctx.decay * of_matrix @ L.tril()).tril() if ctx.needs_input_grad[0] else None
    grad_v = 2 * ctx.alpha * of_matrix @ V if ctx.needs_input_grad[1] else None
    return grad_l, grad_v, None, None


def _check(op: str, L: Tensor, V: Tensor, alpha: float, decay: float) -> None:
    same_dtype(op, "V", V, "L", L.dtype)
    checks.number(op, "alpha", alpha)
    checks.number(op, "decay", decay, checks.NOT_NEGATIVE)


UPDATE = define_op(
    "cholesky_update(Tensor L, Tensor V, float alpha, float decay) -> (Tensor L, Tensor info)",
    python=_update_python,
    fake=_update_fake,
    shapes={"L": "full D D", "V": "full D k"},
    check=functools.partial(_check, "cholesky_update"),
    derivative=Derivative(_update_setup_context, _update_backward),
    cuda=(*cuda_cpp(cuda.cholesky_update), triton("cfl_ops.triton_kernels.cholesky:cholesky_update")),
)
UPDATE_ = define_op(
    "cholesky_update_(Tensor(a!) L, Tensor V, float alpha, float decay) -> Tensor info",
    python=_update_python_,
    fake=lambda L, V, alpha, decay: L.new_empty(L.shape[:-2], dtype=torch.int32),
    shapes={"L": "full D D", "V": "full D k"},
    check=functools.partial(_check, "cholesky_update_"),
    cuda=(*cuda_cpp(cuda.cholesky_update_), triton("cfl_ops.triton_kernels.cholesky:cholesky_update_")),
)


@error_message("cholesky_update")
def _update_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    _, code, where = first_failure(info)
    prefix = f"cfl_ops.cholesky_update: {where}"
    if code == BAD_V:
        return ValueError(f"{prefix}V has NaN or Inf")
    if code == BAD_L:
        return ValueError(f"{prefix}L has NaN or Inf in its lower triangle")
    if float(context[0]) < 0:
        error: Exception = LinAlgError(
            f"{prefix}the downdated matrix is not positive definite to working precision "
            f"(pivot {code}): V removes more than L holds"
        )
        return error
    error = LinAlgError(f"{prefix}the updated factor is not finite (pivot {code}): the entries are too large")
    return error
