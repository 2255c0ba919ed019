"""cholesky: factors that follow a changing matrix, and factors of matrices that are barely definite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.batching import expand_batch
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op
from cfl_ops._core.results import result_type
from cfl_ops._gpu.launch import cuda_cpp, triton
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.cholesky import cuda
from cfl_ops.ops.cholesky.codes import BAD_L, BAD_V, INDEFINITE, LOST_PIVOT, NOT_FINITE

__all__ = [
    "SafeCholesky",
    "cholesky_append",
    "cholesky_append_ex",
    "cholesky_delete",
    "cholesky_downdate",
    "cholesky_downdate_",
    "cholesky_downdate_ex",
    "cholesky_downdate_ex_",
    "cholesky_update",
    "cholesky_update_",
    "cholesky_update_ex",
    "cholesky_update_ex_",
    "safe_cholesky",
    "safe_cholesky_ex",
    "spd_inverse",
    "spd_inverse_ex",
]

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
        length, v = column[..., 0], w[..., j, :]
        # Scaled by the largest entry, so that squares neither overflow nor underflow.
        unit = torch.maximum(length, v.abs().amax(-1)) if v.shape[-1] else length
        safe_unit = torch.where(unit > 0, unit, 1.0)
        l1, v1 = length / safe_unit, v / safe_unit.unsqueeze(-1)
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
    lower = torch.ones(L.shape[-2:], dtype=torch.bool, device=L.device).tril()
    L.copy_(torch.where(lower & (info == 0)[..., None, None], out, L))
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
    both: Tensor = torch.linalg.solve_triangular(factor, left, upper=False, left=False)
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
    cuda=(*cuda_cpp(cuda.cholesky_update), triton("cfl_ops.triton_kernels.cholesky:cholesky_update")),
)
UPDATE_ = define_op(
    "cholesky_update_(Tensor(a!) L, Tensor V, float alpha, float decay) -> Tensor info",
    python=_update_python_,
    fake=lambda L, V, alpha, decay: L.new_empty(L.shape[:-2], dtype=torch.int32),
    core_dims=(2, 2, None, None),
    cuda=(*cuda_cpp(cuda.cholesky_update_), triton("cfl_ops.triton_kernels.cholesky:cholesky_update_")),
)


@error_message("cholesky_update")
def _explain(info: Tensor, context: Sequence[Tensor]) -> Exception:
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
    if L.shape[:-2] != V.shape[:-2]:
        batch = checks.broadcastable(op, L=L.shape[:-2], V=V.shape[:-2])
        L, V = expand_batch((L, V), (2, 2), batch)
    out: tuple[Tensor, Tensor] = UPDATE(L, V, alpha, decay)
    return out


def _update_in_place(op: str, L: Tensor, V: Tensor, alpha: float, decay: float) -> Tensor:
    V = _update_arguments(op, L, V, alpha, decay)
    if L.shape[:-2] != V.shape[:-2]:
        batch = checks.broadcastable(op, L=L.shape[:-2], V=V.shape[:-2])
        if L.shape[:-2] != batch:
            raise ValueError(
                f"cfl_ops.{op}: L must have the batch shape {tuple(batch)} to be updated in place, "
                f"but got shape {tuple(L.shape)}"
            )
        V = expand_batch((V,), (2,), batch)[0]
    if any(stride == 0 and size > 1 for stride, size in zip(L.stride(), L.shape, strict=True)):
        raise ValueError(
            f"cfl_ops.{op}: L must not share memory between its elements to be updated in place (it is expanded)"
        )
    if L.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"cfl_ops.{op}: L must not require grad, for an update in place takes no part in autograd"
        )
    info: Tensor = UPDATE_(L, V, alpha, decay)
    return info


def _update_arguments(op: str, L: Tensor, V: Tensor, alpha: float, decay: float) -> Tensor:
    """Check the arguments; V in the dtype of L."""
    _factor_argument(op, "L", L)
    checks.floating(op, "V", V, 2)
    if V.shape[-2] != L.shape[-1]:
        checks.size(op, "V", V, -2, L.shape[-1], "the order of L")
    if V.device != L.device:
        checks.same_device(op, "L", L, V=V)
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
        checks.tensor(op, name, value, 2)
    if value.dtype != torch.float32 and value.dtype != torch.float64:
        raise TypeError(f"cfl_ops.{op}: {name} must be float32 or float64, but got {value.dtype}")
    if value.shape[-1] != value.shape[-2]:
        raise ValueError(f"cfl_ops.{op}: {name} must be square, but got shape {tuple(value.shape)}")


# --- rows and columns come and go -----------------------------------------------------------------------------


def cholesky_append(L: Tensor, rows: Tensor, corner: Tensor) -> Tensor:
    r"""The factor of a matrix that grew by m rows and columns.

    .. math:: \begin{pmatrix} A & R^T \\ R & C \end{pmatrix}
              = L' L'^T, \quad
              L' = \begin{pmatrix} L & 0 \\ R L^{-T} & \mathrm{chol}(C - R A^{-1} R^T) \end{pmatrix}

    (Golub and Van Loan, Matrix Computations, section 6.5.)

    Args:
        L: the factor ``(..., D, D)`` of A, float32 or float64; only the lower triangle is read.
        rows: R ``(..., m, D)``, the new rows against the old columns.
        corner: C ``(..., m, m)``, symmetric; only its lower triangle is read.

    Returns:
        ``(..., D + m, D + m)``, lower triangular.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
        torch.linalg.LinAlgError: the grown matrix is not positive definite; names the batch index and pivot.

    Costs ``m D^2 + m^2 D + m^3 / 3`` FLOPs, and the copy. Differentiable in all three.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.cholesky_append(torch.eye(1), torch.tensor([[2.0]]), torch.tensor([[5.0]]))
        tensor([[1., 0.],
                [2., 1.]])

    """
    out, info = _append("cholesky_append", L, rows, corner)
    check_info("cholesky_append", info, [out], [])
    return out


def cholesky_append_ex(L: Tensor, rows: Tensor, corner: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`cholesky_append`, but returns ``(L', info)`` instead of raising for what the data holds.

    ``info (...)`` int32: 0, or the order of the first leading minor of the grown matrix that is not positive
    definite (NaN included); the block of the new corner is then undefined.

    Example:
        >>> import torch, cfl_ops
        >>> L, info = cfl_ops.cholesky_append_ex(torch.eye(1), torch.tensor([[2.0]]), torch.tensor([[4.0]]))
        >>> int(info)
        2

    """
    return _append("cholesky_append_ex", L, rows, corner)


@error_message("cholesky_append")
def _explain_append(info: Tensor, context: Sequence[Tensor]) -> Exception:
    _, code, where = first_failure(info)
    error: Exception = LinAlgError(
        f"cfl_ops.cholesky_append: {where}the grown matrix is not positive definite "
        f"(the leading minor of order {code})"
    )
    return error


def _append(op: str, L: Tensor, rows: Tensor, corner: Tensor) -> tuple[Tensor, Tensor]:
    _factor_argument(op, "L", L)
    _factor_argument(op, "corner", corner)
    checks.floating(op, "rows", rows, 2)
    checks.size(op, "rows", rows, -1, L.shape[-1], "the order of L")
    checks.size(op, "rows", rows, -2, corner.shape[-1], "the order of corner")
    for name, value in (("rows", rows), ("corner", corner)):
        if value.dtype != L.dtype:
            raise TypeError(
                f"cfl_ops.{op}: {name} must have the dtype of L ({L.dtype}), but got {value.dtype}"
            )
    checks.same_device(op, "L", L, rows=rows, corner=corner)
    batch = checks.broadcastable(op, L=L.shape[:-2], rows=rows.shape[:-2], corner=corner.shape[:-2])
    L, rows, corner = expand_batch((L.tril(), rows, corner), (2, 2, 2), batch)
    order, new = L.shape[-1], corner.shape[-1]
    left = torch.linalg.solve_triangular(L.mT, rows, upper=True, left=False)
    lower = corner.tril()
    symmetric = lower + lower.tril(-1).mT
    right, info = torch.linalg.cholesky_ex(symmetric - left @ left.mT)
    top = torch.cat((L, L.new_zeros(*batch, order, new)), -1)
    out = torch.cat((top, torch.cat((left, right), -1)), -2)
    return out, torch.where(info != 0, info + order, info)


def cholesky_delete(L: Tensor, index: int | Sequence[int]) -> Tensor:
    r"""The factor of a matrix that lost rows and columns.

    Deleting row and column i of A deletes row i of L; what is left of L to the right of column i is repaired
    by the rank-one update with the part of column i below it (Golub and Van Loan, section 6.5).

    Args:
        L: the factor ``(..., D, D)``, float32 or float64; only the lower triangle is read.
        index: what to delete: an integer in ``[-D, D)``, or a sequence of different ones.

    Returns:
        ``(..., D - m, D - m)``, lower triangular.

    Raises:
        TypeError, ValueError: L does not fit, or has NaN or Inf behind what is deleted; an index repeats.
        IndexError: an index is out of range.

    Costs ``2 m (D - i)^2`` FLOPs, i being the first index. Differentiable in L.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.cholesky_delete(torch.tensor([[1.0, 0.0], [2.0, 1.0]]), 0)
        tensor([[2.2361]])

    """
    _factor_argument("cholesky_delete", "L", L)
    order = L.shape[-1]
    given = [index] if isinstance(index, int) else list(index)
    for i in given:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(
                f"cfl_ops.cholesky_delete: index must be an integer or a sequence of them, but got {index!r}"
            )
        if not -order <= i < order:
            raise IndexError(f"cfl_ops.cholesky_delete: index must be in [{-order}, {order}), but got {i}")
    wanted = sorted(i % order for i in given)
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"cfl_ops.cholesky_delete: index must not repeat, but got {index!r}")
    out = L.tril()
    while wanted:  # runs of neighbours, the last one first, each in one update
        end = wanted[-1] + 1
        begin = end - 1
        while wanted and wanted[-1] == begin:
            wanted.pop()
            begin -= 1
        begin += 1
        rest = out[..., end:, end:]
        if rest.shape[-1]:
            rest = cholesky_update(rest, out[..., end:, begin:end])
        kept = out[..., :begin, :begin]
        beside = torch.cat((kept, kept.new_zeros(*kept.shape[:-1], rest.shape[-1])), -1)
        out = torch.cat((beside, torch.cat((out[..., end:, :begin], rest), -1)), -2)
    return out


# --- matrices that are barely definite --------------------------------------------------------------------------


@result_type("cholesky")
class SafeCholesky(NamedTuple):
    """A factor of a positive semi-definite matrix, and what had to be added to get it."""

    L: Tensor
    """``(..., D, D)``: lower triangular, with a positive diagonal."""
    jitter: Tensor
    """``(...)``: ``L L^T`` is ``a + jitter diag(a)``, plus 1 on the diagonal for each dead column."""


def _first_jitter(order: int, eps: float) -> float:
    """Below this the pivots of a matrix with unit diagonal are rounding errors."""
    return 4 * eps * math.sqrt(max(order, 1))


def _safe_python(a: Tensor, max_jitter: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factor S a S + jitter I, S = diag(a)^-1/2, with the jitter growing eightfold until that succeeds."""
    order, batch, gpu = a.shape[-1], a.shape[:-2], not a.is_cpu
    jitter = torch.zeros(batch, dtype=a.dtype, device=a.device)
    if a.numel() == 0:
        return a.new_empty(a.shape), jitter, jitter.to(torch.int32)
    scaled = a.tril()  # a fresh matrix, of which cholesky_ex reads this triangle
    least, most = scaled.flatten(-2).aminmax(dim=-1)
    finite = least.isfinite() & most.isfinite()
    diagonal = scaled.diagonal(dim1=-2, dim2=-1).clone()
    dead = ~(diagonal > 0)
    # On a CPU a look at the data is free, and most matrices need neither of the next two.
    if gpu or not bool(finite.all()):
        scaled = torch.where(finite[..., None, None], scaled, 0.0)
        dead = dead | ~finite.unsqueeze(-1)
    stray = torch.zeros_like(finite)
    if gpu or bool(dead.any()):
        # In a semi-definite matrix the rest of a dead row is zero; what is there has no business there.
        of_dead = dead.unsqueeze(-1) | dead.unsqueeze(-2)
        scale = torch.where(dead, 0.0, diagonal).amax(-1)
        stray = torch.where(of_dead, scaled, 0.0).abs().amax((-2, -1)) > max_jitter * scale
        scaled = scaled.masked_fill(of_dead, 0.0)
    root = torch.where(dead, 1.0, diagonal).sqrt()
    inverse = 1 / root
    scaled.mul_(inverse.unsqueeze(-1)).mul_(inverse.unsqueeze(-2))
    scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0)

    first = _first_jitter(order, torch.finfo(a.dtype).eps)
    step = 0.0
    factor, info = torch.linalg.cholesky_ex(scaled)
    while True:
        lost = ~(factor.diagonal(dim1=-2, dim2=-1).square() > first * 0.5).all(-1)
        failed = (info != 0) | (lost & (jitter == 0))
        step = 2 * first if step == 0.0 else 8 * step
        if step > max_jitter or (not gpu and not bool(failed.any())):
            break
        shifted = scaled.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_((~dead).to(a.dtype), alpha=step)
        again, info_again = torch.linalg.cholesky_ex(shifted)
        factor = torch.where(failed[..., None, None], again, factor)
        info = torch.where(failed, info_again, info)
        jitter = torch.where(failed, step, jitter)
    code = torch.where((info != 0) | stray, INDEFINITE, 0)
    code = torch.where(finite, code, NOT_FINITE).to(torch.int32)
    return (root.unsqueeze(-1) * factor).contiguous(), jitter, code


def _safe_fake(a: Tensor, max_jitter: float) -> tuple[Tensor, Tensor, Tensor]:
    batch = a.shape[:-2]
    return a.new_empty(a.shape), a.new_empty(batch), a.new_empty(batch, dtype=torch.int32)


def _safe_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[0], output[1])
    if isinstance(ctx, torch.autograd.function.FunctionCtx):
        ctx.mark_non_differentiable(output[1], output[2])


def _safe_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Through L L^T = a + jitter diag(a), the jitter held fixed; nothing reaches a dead column."""
    if grad is None:
        return None, None
    a, factor, jitter = ctx.saved_tensors
    of_matrix = _factor_backward(factor, grad)
    dead = ~(a.diagonal(dim1=-2, dim2=-1) > 0)
    of_matrix = of_matrix.masked_fill(dead.unsqueeze(-1) | dead.unsqueeze(-2), 0.0)
    # Only the lower triangle is read: an entry below the diagonal stands for two.
    of_diagonal = (1 + jitter.detach()).unsqueeze(-1) * of_matrix.diagonal(dim1=-2, dim2=-1)
    return 2 * of_matrix.tril(-1) + torch.diag_embed(of_diagonal), None


SAFE = define_op(
    "safe_cholesky(Tensor a, float max_jitter) -> (Tensor L, Tensor jitter, Tensor info)",
    python=_safe_python,
    fake=_safe_fake,
    core_dims=(2, None),
    derivative=Derivative(_safe_setup_context, _safe_backward),
)


@error_message("safe_cholesky")
def _explain_safe(info: Tensor, context: Sequence[Tensor]) -> Exception:
    _, code, where = first_failure(info)
    prefix = f"cfl_ops.safe_cholesky: {where}"
    if code == NOT_FINITE:
        return ValueError(f"{prefix}a has NaN or Inf in its lower triangle")
    error: Exception = LinAlgError(
        f"{prefix}a is not positive semi-definite: even a jitter of max_jitter times its diagonal is not enough"
    )
    return error


def safe_cholesky(a: Tensor, *, max_jitter: float = 0.5) -> SafeCholesky:
    r"""A Cholesky factor of any positive semi-definite matrix, with what had to be added to get it.

    .. math:: L L^T = a + \tau \, \mathrm{diag}(a) + \mathrm{diag}(\text{dead})

    The matrix is scaled to a unit diagonal, so that columns of very different size do not need (or hide) a
    jitter. Where its pivots are above rounding, tau is exactly 0; else tau starts at the size of the rounding
    errors, ``8 eps sqrt(D)``, and grows eightfold until the factorisation succeeds. A column whose diagonal
    entry is 0 is *dead*: its row and column of L are those of the identity.

    Args:
        a: ``(..., D, D)``, float32 or float64, symmetric; only the lower triangle is read.
        max_jitter: where to give up. No semi-definite matrix, rounding included, comes near.

    Returns:
        :class:`SafeCholesky` ``(L, jitter)``: the factor and tau ``(...)``, 0 where none was needed.

    Raises:
        TypeError, ValueError: a does not fit, or has NaN or Inf.
        torch.linalg.LinAlgError: a has a negative eigenvalue far beyond rounding (never for a semi-definite
            matrix); names the batch index.

    Costs ``D^3 / 3`` FLOPs per attempt. Differentiable in a, tau held fixed.

    Example:
        >>> import torch, cfl_ops
        >>> L, jitter = cfl_ops.safe_cholesky(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
        >>> L, float(jitter)
        (tensor([[2., 0.],
                [0., 1.]]), 0.0)
        >>> bool(cfl_ops.safe_cholesky(torch.ones(2, 2)).jitter > 0)
        True

    """
    result, info = _safe("safe_cholesky", a, max_jitter)
    check_info("safe_cholesky", info, list(result), [])
    return result


def safe_cholesky_ex(a: Tensor, *, max_jitter: float = 0.5) -> tuple[SafeCholesky, Tensor]:
    """As :func:`safe_cholesky`, but returns ``info`` too instead of raising, and never synchronises a GPU.

    ``info (...)`` int32. 0: success. 1: a is indefinite. -1: NaN or Inf in a. Where it is not 0, the factor
    is undefined. (Without a synchronisation all jitters are tried, so a GPU always pays for all attempts.)

    Example:
        >>> import torch, cfl_ops
        >>> result, info = cfl_ops.safe_cholesky_ex(-torch.eye(2))
        >>> int(info)
        1

    """
    return _safe("safe_cholesky_ex", a, max_jitter)


def _safe(op: str, a: Tensor, max_jitter: float) -> tuple[SafeCholesky, Tensor]:
    _factor_argument(op, "a", a)
    if not 0 <= max_jitter < math.inf:
        raise ValueError(f"cfl_ops.{op}: max_jitter must be finite and not negative, but got {max_jitter}")
    factor, jitter, info = SAFE(a, float(max_jitter))
    return SafeCholesky(factor, jitter), info


def spd_inverse(a: Tensor) -> Tensor:
    r"""The inverse of a positive definite matrix, also of one that only just is, or is not quite.

    .. math:: (a + \tau \, \mathrm{diag}(a) + \mathrm{diag}(\text{dead}))^{-1}

    with tau from :func:`safe_cholesky`: exactly 0 where none is needed. The row and column of a dead column
    (a zero on the diagonal) are those of the identity.

    Args:
        a: ``(..., D, D)``, float32 or float64, symmetric; only the lower triangle is read.

    Returns:
        ``(..., D, D)``, symmetric.

    Raises:
        TypeError, ValueError: a does not fit, or has NaN or Inf.
        torch.linalg.LinAlgError: a has a negative eigenvalue far beyond rounding.

    Costs ``D^3`` FLOPs. Differentiable (twice).

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.spd_inverse(torch.tensor([[4.0, 0.0], [0.0, 0.0]])).diagonal()
        tensor([0.2500, 1.0000])

    """
    return _inverse(safe_cholesky(a).L)


def _inverse(factor: Tensor) -> Tensor:
    """(L L^T)^-1. On a GPU torch's batched one may be MAGMA's, which no CUDA graph can capture."""
    if factor.is_cpu:
        return torch.cholesky_inverse(factor)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand(factor.shape)
    half: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return half.mT @ half


def spd_inverse_ex(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`spd_inverse`, but never raises for what the data holds: returns ``(inverse, jitter, info)``.

    ``jitter`` and ``info`` are those of :func:`safe_cholesky_ex`.

    Example:
        >>> import torch, cfl_ops
        >>> inverse, jitter, info = cfl_ops.spd_inverse_ex(torch.eye(2))
        >>> int(info), float(jitter)
        (0, 0.0)

    """
    (factor, jitter), info = _safe("spd_inverse_ex", a, 0.5)
    return _inverse(factor), jitter, info
