"""cholesky: factors that follow a changing matrix, and factors of matrices that are barely definite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._library import Derivative, check_info, define_op, expand_batch, explains, first_failure
from .errors import LinAlgError

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

# What a negative info says; a positive one is the order of the first pivot that is not positive.
BAD_V, BAD_L = -1, -2

# A downdate fails where it leaves less than this many eps of a squared pivot: what is left is rounding.
LOST_PIVOT = 10


# --- rank-k update: fallback, fake, derivative ----------------------------------------------------------------


def _update_python(L: Tensor, V: Tensor, alpha: float, decay: float) -> tuple[Tensor, Tensor]:
    """Column by column, a reflector turns (L_jj, row j of W) into (r, 0) and acts on the rows below.

    W is V sqrt(|alpha|). For a downdate the reflector is hyperbolic; both are stable in this form.
    """
    order, eps = L.shape[-1], torch.finfo(L.dtype).eps
    old = L.tril()
    out = old * math.sqrt(decay)
    w = V * math.sqrt(abs(alpha))
    side = -1.0 if alpha < 0 else 1.0
    pivots = []
    for j in range(order):
        sign = torch.where(out[..., j, j] < 0, -1.0, 1.0).to(out.dtype)
        column = out[..., j:, j] * sign.unsqueeze(-1)
        l, v = column[..., 0], w[..., j, :]
        # Scaled by the largest entry, so that squares neither overflow nor underflow.
        unit = torch.maximum(l, v.abs().amax(-1)) if v.shape[-1] else l
        safe_unit = torch.where(unit > 0, unit, 1.0)
        l1, v1 = l / safe_unit, v / safe_unit.unsqueeze(-1)
        square = l1 * l1 + side * (v1 * v1).sum(-1)
        lost = ~(square > LOST_PIVOT * eps * l1 * l1) if alpha < 0 else ~(square >= 0)
        r1 = square.clamp(min=0).sqrt()
        r = r1 * safe_unit
        pivots.append(lost | ~r.isfinite())
        still = r1 == 0  # a zero column of a semi-definite factor stays one
        safe_r1 = torch.where(still, 1.0, r1)
        s = (v1 / safe_r1.unsqueeze(-1)).masked_fill(still.unsqueeze(-1), 0.0)
        g = v1 / torch.where(still, 1.0, l1 + r1).unsqueeze(-1)
        c = torch.where(still, 1.0, l1 / safe_r1)
        below = w[..., j:, :]
        new = c.unsqueeze(-1) * column + side * (below @ s.unsqueeze(-1)).squeeze(-1)
        w[..., j:, :] = below - (column + new).unsqueeze(-1) * g.unsqueeze(-2)
        out[..., j:, j] = new
        out[..., j, j] = r
    bad_v = ~V.isfinite().flatten(-2).all(-1)
    bad_l = ~old.isfinite().flatten(-2).all(-1)
    info = torch.zeros(L.shape[:-2], dtype=torch.int32, device=L.device)
    if order:
        failed = torch.stack(pivots, -1)
        first = (failed.to(torch.int32).argmax(-1) + 1).to(torch.int32)
        info = torch.where(failed.any(-1), first, info)
        info = torch.where(bad_l, BAD_L, info)
        info = torch.where(bad_v, BAD_V, info)
    return torch.where((info != 0)[..., None, None], old, out), info.to(torch.int32)


def _update_python_(L: Tensor, V: Tensor, alpha: float, decay: float) -> Tensor:
    out, info = _update_python(L, V, alpha, decay)
    L.copy_(out + L.triu(1))
    return info


def _update_fake(L: Tensor, V: Tensor, alpha: float, decay: float) -> tuple[Tensor, Tensor]:
    return L.new_empty(L.shape), L.new_empty(L.shape[:-2], dtype=torch.int32)


def _update_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    L, V, ctx.alpha, ctx.decay = inputs
    ctx.save_for_backward(L, V, output[0])
    if isinstance(ctx, torch.autograd.function.FunctionCtx):
        ctx.mark_non_differentiable(output[1])


def _factor_backward(factor: Tensor, grad: Tensor) -> Tensor:
    """The symmetric gradient with respect to A of a function of its Cholesky factor (Murray 2016, Eq. 10)."""
    inner = (factor.mT @ grad.tril()).tril()
    inner = inner - 0.5 * torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    left = torch.linalg.solve_triangular(factor.mT, inner, upper=True)
    both = torch.linalg.solve_triangular(factor, left, upper=False, left=False)
    return 0.5 * (both + both.mT)


def _update_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """Through A = decay L L^T + alpha V V^T; made of differentiable ops, so twice, too."""
    if grad is None:
        return None, None, None, None
    L, V, factor = ctx.saved_tensors
    of_matrix = _factor_backward(factor, grad)
    grad_l = (2 * ctx.decay * of_matrix @ L.tril()).tril() if ctx.needs_input_grad[0] else None
    grad_v = 2 * ctx.alpha * of_matrix @ V if ctx.needs_input_grad[1] else None
    return grad_l, grad_v, None, None


UPDATE = define_op(
    "cholesky_update(Tensor L, Tensor V, float alpha, float decay) -> (Tensor L, Tensor info)",
    python=_update_python,
    fake=_update_fake,
    core_dims=(2, 2, None, None),
    derivative=Derivative(_update_setup_context, _update_backward),
)
UPDATE_ = define_op(
    "cholesky_update_(Tensor(a!) L, Tensor V, float alpha, float decay) -> Tensor info",
    python=_update_python_,
    fake=lambda L, V, alpha, decay: L.new_empty(L.shape[:-2], dtype=torch.int32),
    core_dims=(2, 2, None, None),
)


@explains("cholesky_update")
def _explain(info: Tensor, context: Sequence[Tensor]) -> Exception:
    index, code, where = first_failure(info)
    prefix = f"cfl_ops.cholesky_update: {where}"
    if code == BAD_V:
        return ValueError(f"{prefix}V has NaN or Inf")
    if code == BAD_L:
        return ValueError(f"{prefix}L has NaN or Inf in its lower triangle")
    if float(context[0]) < 0:
        return LinAlgError(
            f"{prefix}the downdated matrix is not positive definite to working precision "
            f"(pivot {code}): V removes more than L holds"
        )
    return LinAlgError(f"{prefix}the updated factor is not finite (pivot {code}): the entries are too large")


# --- the public functions -------------------------------------------------------------------------------------


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
        decay: the weight >= 0 of the old matrix (forgetting).

    Returns:
        ``L' (..., D, D)``, lower triangular with a diagonal >= 0.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or NaN or Inf in ``V`` or ``L``.
        torch.linalg.LinAlgError: a downdate leaves a matrix that is not positive definite (a squared pivot
            falls to less than 10 eps of itself); names the batch index.

    Costs ``2 k D^2`` FLOPs, against ``D^3 / 3 + k D^2`` for forming and factoring the new matrix.
    Differentiable (twice) in L and V, at the cost of a few triangular solves, ``O(D^3)``.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.cholesky_update(torch.eye(2), torch.tensor([[0.0], [1.0]]), 3.0)
        tensor([[1., 0.],
                [0., 2.]])
    """
    out, info = _update("cholesky_update", L, V, alpha, decay)
    check_info("cholesky_update", info, [out], [_as_context(alpha)])
    return out


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

    Where it raises, ``L`` is unchanged (in a batch, the elements that did not fail are updated). Takes no
    part in autograd.

    Returns:
        ``L``.

    Example:
        >>> import torch, cfl_ops
        >>> L = torch.eye(2)
        >>> cfl_ops.cholesky_update_(L, torch.ones(2, 1), decay=0.5)
        tensor([[1.2247, 0.0000],
                [0.8165, 0.9129]])
    """
    info = _update_in_place("cholesky_update_", L, V, alpha, decay)
    check_info("cholesky_update", info, [L], [_as_context(alpha)])
    return L


def cholesky_update_ex_(L: Tensor, V: Tensor, alpha: float = 1.0, *, decay: float = 1.0) -> Tensor:
    """As :func:`cholesky_update_`, but returns ``info`` (see :func:`cholesky_update_ex`) instead of raising.

    Example:
        >>> import torch, cfl_ops
        >>> int(cfl_ops.cholesky_update_ex_(torch.eye(2), torch.ones(2, 1)))
        0
    """
    return _update_in_place("cholesky_update_ex_", L, V, alpha, decay)


def cholesky_downdate(L: Tensor, V: Tensor) -> Tensor:
    """The factor of ``L L^T - V V^T``: :func:`cholesky_update` with alpha = -1.

    Raises:
        torch.linalg.LinAlgError: that matrix is not positive definite to working precision.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.cholesky_downdate(2 * torch.eye(1), torch.tensor([[1.0]]))
        tensor([[1.7321]])
    """
    out, info = _update("cholesky_downdate", L, V, -1.0, 1.0)
    check_info("cholesky_update", info, [out], [_as_context(-1.0)])
    return out


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
    info = _update_in_place("cholesky_downdate_", L, V, -1.0, 1.0)
    check_info("cholesky_update", info, [L], [_as_context(-1.0)])
    return L


def cholesky_downdate_ex_(L: Tensor, V: Tensor) -> Tensor:
    """:func:`cholesky_update_ex_` with alpha = -1.

    Example:
        >>> import torch, cfl_ops
        >>> int(cfl_ops.cholesky_downdate_ex_(2 * torch.eye(1), torch.tensor([[1.0]])))
        0
    """
    return _update_in_place("cholesky_downdate_ex_", L, V, -1.0, 1.0)


_UPDATED, _DOWNDATED = torch.tensor(1.0), torch.tensor(-1.0)


def _as_context(alpha: float) -> Tensor:
    return _DOWNDATED if alpha < 0 else _UPDATED


def _update(op: str, L: Tensor, V: Tensor, alpha: float, decay: float) -> tuple[Tensor, Tensor]:
    V = _update_arguments(op, L, V, alpha, decay)
    if L.ndim != 2 or V.ndim != 2:
        batch = _checks.broadcastable(op, L=L.shape[:-2], V=V.shape[:-2])
        L, V = expand_batch((L, V), (2, 2), batch)
    out: tuple[Tensor, Tensor] = UPDATE(L, V, alpha, decay)
    return out


def _update_in_place(op: str, L: Tensor, V: Tensor, alpha: float, decay: float) -> Tensor:
    V = _update_arguments(op, L, V, alpha, decay)
    if L.ndim != 2 or V.ndim != 2:
        batch = _checks.broadcastable(op, L=L.shape[:-2], V=V.shape[:-2])
        if L.shape[:-2] != batch:
            raise ValueError(
                f"cfl_ops.{op}: L must have the batch shape {tuple(batch)} to be updated in place, "
                f"but got shape {tuple(L.shape)}"
            )
        V = expand_batch((V,), (2,), batch)[0]
    if L.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"cfl_ops.{op}: L must not require grad, for an update in place takes no part in autograd"
        )
    info: Tensor = UPDATE_(L, V, alpha, decay)
    return info


def _update_arguments(op: str, L: Tensor, V: Tensor, alpha: float, decay: float) -> Tensor:
    """Check the arguments; V in the dtype of L."""
    _factor_argument(op, "L", L)
    _checks.floating(op, "V", V, 2)
    if V.shape[-2] != L.shape[-1]:
        _checks.size(op, "V", V, -2, L.shape[-1], "the order of L")
    if V.device != L.device:
        _checks.same_device(op, "L", L, V=V)
    for name, value in (("alpha", alpha), ("decay", decay)):
        if type(value) is float or torch.compiler.is_compiling():
            pass
        elif isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
            raise TypeError(f"cfl_ops.{op}: {name} must be a number, but got {type(value).__name__}")
        if not torch.compiler.is_compiling() and not math.isfinite(value):
            raise ValueError(f"cfl_ops.{op}: {name} must be finite, but got {value}")
    if decay < 0:
        raise ValueError(f"cfl_ops.{op}: decay must not be negative, but got {decay}")
    if V.dtype != L.dtype:
        if torch.promote_types(V.dtype, L.dtype) != L.dtype:
            raise TypeError(f"cfl_ops.{op}: V must not be wider than L ({L.dtype}), but got {V.dtype}")
        V = V.to(L.dtype)
    return V


def _factor_argument(op: str, name: str, value: Any) -> None:
    """``value`` is a batch of square matrices, float32 or float64."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.ndim < 2:
        _checks.tensor(op, name, value, 2)
    if value.dtype != torch.float32 and value.dtype != torch.float64:
        raise TypeError(f"cfl_ops.{op}: {name} must be float32 or float64, but got {value.dtype}")
    if value.shape[-1] != value.shape[-2]:
        raise ValueError(f"cfl_ops.{op}: {name} must be square, but got shape {tuple(value.shape)}")
