"""lstsq and pinv: minimum-norm least squares and pseudoinverses, for matrices of any shape and rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.batching import expand_batch
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.solve.codes import BAD_TOLERANCE, UNRESOLVED
from cfl_ops.ops.solve.small_pinv import SMALL_PINV, is_small_batch
from cfl_ops.ops.solve.tall import (
    WELL_CONDITIONED,
    Factors,
    factor_any,
    may_synchronise,
    minimum_norm,
    refined_pinv,
)

__all__ = ["lstsq", "lstsq_ex", "pinv", "pinv_ex"]


def lstsq(a: Tensor, b: Tensor, *, rtol: float | Tensor | None = None) -> Tensor:
    r"""The least-squares solution of minimum norm, for matrices of any shape and rank.

    .. math:: X = A^+ B

    (Efficient Deep Learning, section 7.3: the layer-local solve.)

    The columns of ``a`` (its rows where it is underdetermined) are equilibrated and their Gram matrix is accumulated in
    float64. Where it is well conditioned it is inverted; where not, a second pass on the orthogonalised
    columns (CholeskyQR2) tells the rank; what is cut is projected out, so that the solution is the one of
    minimum norm. float64 matrices whose Gram cannot be resolved take an orthogonal path (SVD).

    Args:
        a: ``(..., M, N)``, of any strides.
        b: ``(..., M, K)``.
        rtol: None for the rule above, which cuts only what the stored numbers cannot resolve: after
            equilibration, directions with a singular value under 3e-8 (float32 and narrower), or under
            ``min(M, N) * eps`` of the largest (float64). A number: as ``torch.linalg.pinv``'s, the singular
            values of ``a`` as it stands that are at most ``rtol`` times the largest count as zero.

    Returns:
        ``(..., N, K)`` of the promoted dtype. Without rows or columns it is zero.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or rtol is negative, NaN or Inf.
        torch.linalg.LinAlgError: ``a`` has NaN or Inf; the message names the batch index. A NaN in ``b``
            stays in its column of the solution.

    Differentiable (twice) in a and b; where ``a`` is rank-deficient, within the matrices of its rank. Costs
    ``M N^2`` (one triangle) or ``4 M N^2`` multiply-adds of float64 for ``M >= N``.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.lstsq(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[2.0], [4.0]]))
        tensor([[1.5000],
                [1.5000]])
    """
    args = _lstsq_arguments("lstsq", a, b, rtol)
    solution: Tensor
    solution, _, info = LSTSQ(*args)
    check_info("lstsq", info, [solution], [args[0]])
    return solution


def lstsq_ex(a: Tensor, b: Tensor, *, rtol: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As :func:`lstsq`, but returns ``(solution, info)`` and never raises for data.

    ``info (...)`` int32 is 1 where ``a`` has NaN or Inf, -1 where a tensor ``rtol`` is negative, NaN or Inf, and the
    solution NaN there; else 0. On a GPU the call
    synchronises once, to choose between the Gram matrix and the orthogonal path; where a CUDA graph is captured, it
    does not, and info is 2 (the solution NaN) where the orthogonal path would be needed. A given ``rtol`` always
    needs it.

    Example:
        >>> import torch, cfl_ops
        >>> solution, info = cfl_ops.lstsq_ex(torch.full((1, 1), torch.nan), torch.ones(1, 1))
        >>> int(info)
        1
    """
    solution, _, info = LSTSQ(*_lstsq_arguments("lstsq_ex", a, b, rtol))
    return solution, info


def pinv(a: Tensor, *, rtol: float | Tensor | None = None, atol: float | Tensor | None = None) -> Tensor:
    r"""The pseudoinverse, for matrices of any shape and rank.

    .. math:: A^+ = \lim_{\delta \to 0} (A^T A + \delta I)^{-1} A^T

    Computed as :func:`lstsq` is (Efficient Deep Learning, section 7.3).

    Args:
        a: ``(..., M, N)``, of any strides.
        rtol: the relative tolerance, ``torch.linalg.pinv``'s: singular values of ``a`` as it stands that are
            at most ``max(atol, rtol * the largest)`` count as zero.
        atol: the absolute tolerance. With neither, the rule of :func:`lstsq`.

    Returns:
        ``(..., N, M)``, of the dtype of ``a``. Without rows or columns it is zero.

    Raises:
        TypeError, ValueError: ``a`` is not a matrix, or a tolerance is negative, NaN or Inf.
        torch.linalg.LinAlgError: ``a`` has NaN or Inf; the message names the batch index.

    Differentiable (twice); where ``a`` is rank-deficient, within the matrices of its rank. Costs
    ``2 M N^2`` or ``5 M N^2`` multiply-adds of float64 for ``M >= N``.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.pinv(torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 4.0]]))
        tensor([[0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.2500]])
    """
    args = pinv_arguments("pinv", a, rtol, atol)
    result: Tensor
    result, _, info = PINV(*args)
    check_info("pinv", info, [result], [args[0]])
    return result


def pinv_ex(
    a: Tensor, *, rtol: float | Tensor | None = None, atol: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`pinv`, but returns ``(pinv, info)`` and never raises for data.

    ``info (...)`` int32 is 1 where ``a`` has NaN or Inf, -1 where a tensor tolerance is negative, NaN or Inf, and the
    pseudoinverse NaN there; else 0. On a GPU it synchronises as :func:`lstsq_ex` does, and not where a CUDA graph is
    captured: there info may be 2.

    Example:
        >>> import torch, cfl_ops
        >>> inverse, info = cfl_ops.pinv_ex(torch.full((1, 1), torch.inf))
        >>> int(info)
        1
    """
    result, _, info = PINV(*pinv_arguments("pinv_ex", a, rtol, atol))
    return result, info


def _tolerance(op: str, name: str, value: float | Tensor | None, a: Tensor) -> Tensor | None:
    return None if value is None else checks.coefficient(op, name, value, a.device)


def _lstsq_arguments(
    op: str, a: Tensor, b: Tensor, rtol: float | Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    checks.floating(op, "a", a, 2)
    checks.floating(op, "b", b, 2)
    checks.size(op, "b", b, -2, a.shape[-2], "the rows of a")
    checks.same_device(op, "a", a, b=b)
    relative = _tolerance(op, "rtol", rtol, a)
    if b.dtype == torch.float64:
        a = a.double()
    batches = {"a": a.shape[:-2], "b": b.shape[:-2]}
    if relative is None and batches["a"] == batches["b"]:
        return a, b, None
    if relative is not None:
        batches["rtol"] = relative.shape
    args = expand_batch((a, b, relative), (2, 2, 0), checks.broadcastable(op, **batches))
    return args[0], args[1], args[2]


def pinv_arguments(
    op: str, a: Tensor, rtol: float | Tensor | None, atol: float | Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What pinv takes, and factorize without an ``atol``."""
    checks.floating(op, "a", a, 2)
    relative, absolute = _tolerance(op, "rtol", rtol, a), _tolerance(op, "atol", atol, a)
    if relative is None and absolute is None:
        return a, None, None
    batches = {"a": a.shape[:-2]}
    for name, value in (("rtol", relative), ("atol", absolute)):
        if value is not None:
            batches[name] = value.shape
    args = expand_batch((a, relative, absolute), (2, 0, 0), checks.broadcastable(op, **batches))
    return args[0], args[1], args[2]


def factored(a: Tensor, rtol: Tensor | None, atol: Tensor | None, b: Tensor | None = None) -> Factors:
    """The factors of a; their info is BAD_TOLERANCE where a tolerance is negative, NaN or Inf."""
    factors = factor_any(a, _cutoff(a, rtol, atol), b)
    if rtol is None and atol is None:
        return factors
    return factors._replace(info=_with_bad_tolerances(factors.info, rtol, atol))


def _with_bad_tolerances(info: Tensor, rtol: Tensor | None, atol: Tensor | None) -> Tensor:
    for value in (rtol, atol):
        if value is not None:
            good = (value >= 0) & value.isfinite()
            info = torch.where(good.to(info.device), info, BAD_TOLERANCE)
    return info


def _cutoff(a: Tensor, rtol: Tensor | None, atol: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """torch.linalg.pinv's rule, or None for ours."""
    if rtol is None and atol is None:
        return None
    default = max(a.shape[-2:]) * torch.finfo(a.dtype).eps

    def cut(top: Tensor) -> Tensor:
        absolute = torch.zeros((), dtype=torch.float64) if atol is None else atol.double()
        if rtol is None:
            relative = torch.where(absolute > 0, 0.0, default)
        else:
            relative = rtol.double()
        absolute, relative = (v.unsqueeze(-1) if v.ndim else v for v in (absolute, relative))
        return torch.maximum(absolute.to(top.device), relative.to(top.device) * top)

    return cut


def _lstsq_python(a: Tensor, b: Tensor, rtol: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, cols = a.shape[:-2], a.shape[-1]
    dtype = torch.promote_types(a.dtype, b.dtype)
    if a.numel() == 0 or b.shape[-1] == 0:
        solution = torch.zeros(*batch, cols, b.shape[-1], dtype=dtype, device=a.device)
        if a.numel() == 0:
            zero = torch.zeros(batch, dtype=torch.int64, device=a.device)
            return solution, zero, _with_bad_tolerances(zero.to(torch.int32), rtol, None)
    factors = factored(a, rtol, None, b)
    solution = minimum_norm(a, b, factors)
    return _nan_where(factors.info != 0, solution, dtype), factors.rank, factors.info


def _nan_where(bad: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    if bad.is_cpu and bad.ndim == 0 and not bad.item():  # the usual case, and cheaper to ask
        return value.to(dtype)
    return torch.where(bad[..., None, None], torch.nan, value).to(dtype)


def _lstsq_fake(a: Tensor, b: Tensor, rtol: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch = a.shape[:-2]
    dtype = torch.promote_types(a.dtype, b.dtype)
    return (
        a.new_empty(*batch, a.shape[-1], b.shape[-1], dtype=dtype),
        a.new_empty(batch, dtype=torch.int64),
        a.new_empty(batch, dtype=torch.int32),
    )


def _lstsq_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _lstsq_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """With P = A^+, r = b - A x and u = P^T xbar: bbar = u and
    Abar = -u x^T + r (P u)^T + (P^T x) ((I - P A) xbar)^T.
    """
    if grad is None:
        return None, None, None
    a, b, rtol, solution = ctx.saved_tensors
    p = PINV(a, rtol, None)[0].double()
    a64, x, g = a.double(), solution.double(), grad.double()
    u = p.mT @ g
    grad_a = None
    if ctx.needs_input_grad[0]:
        residual = b.double() - a64 @ x
        off_rows = g - a64.mT @ u
        grad_a = residual @ (p @ u).mT - u @ x.mT + (p.mT @ x) @ off_rows.mT
        grad_a = grad_a.to(a.dtype)
    return grad_a, u.to(b.dtype), None


LSTSQ = define_op(
    "lstsq(Tensor a, Tensor b, Tensor? rtol) -> (Tensor solution, Tensor rank, Tensor info)",
    python=_lstsq_python,
    fake=_lstsq_fake,
    shapes={"a": "M N", "b": "M K", "rtol": ""},
    derivative=Derivative(_lstsq_setup_context, _lstsq_backward, ("rank", "info")),
    composite=True,
)


def _pinv_python(a: Tensor, rtol: Tensor | None, atol: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, (rows, cols) = a.shape[:-2], a.shape[-2:]
    if a.numel() == 0:
        zero = torch.zeros(batch, dtype=torch.int64, device=a.device)
        info = _with_bad_tolerances(zero.to(torch.int32), rtol, atol)
        return a.new_zeros(*batch, cols, rows), zero, info
    if rtol is None and atol is None and is_small_batch(a):
        result, code = SMALL_PINV(a, WELL_CONDITIONED)
        rank = torch.full(batch, min(rows, cols), dtype=torch.int64, device=a.device)
        info = torch.zeros(batch, dtype=torch.int32, device=a.device)
        hard = code != 0
        if not may_synchronise(a):
            result = _nan_where(hard, result, a.dtype)
            info = torch.where(hard, UNRESOLVED, info)
        elif bool(hard.any()):
            result[hard], rank[hard], info[hard] = _general_pinv(a[hard], None, None)
        return result, rank, info
    return _general_pinv(a, rtol, atol)


def _general_pinv(a: Tensor, rtol: Tensor | None, atol: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    factors = factored(a, rtol, atol)
    result = refined_pinv(a, factors)
    return _nan_where(factors.info != 0, result, a.dtype).contiguous(), factors.rank, factors.info


def _pinv_fake(a: Tensor, rtol: Tensor | None, atol: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch = a.shape[:-2]
    return (
        a.new_empty(*batch, a.shape[-1], a.shape[-2]),
        a.new_empty(batch, dtype=torch.int64),
        a.new_empty(batch, dtype=torch.int32),
    )


def _pinv_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _pinv_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """With P the pseudoinverse, from dP = -P dA P + P P^T dA^T (I - A P) + (I - P A) dA^T P^T P."""
    if grad is None:
        return None, None, None
    saved, inverse = ctx.saved_tensors
    a, p, g = saved.double(), inverse.double(), grad.double()
    pt, gt = p.mT, g.mT
    off_columns, off_rows = gt - a @ (p @ gt), gt - (gt @ p) @ a  # (I - A P) g^T and g^T (I - P A)
    result = (off_columns @ p) @ pt + pt @ (p @ off_rows) - pt @ (g @ pt)
    return result.to(saved.dtype), None, None


PINV = define_op(
    "pinv(Tensor a, Tensor? rtol, Tensor? atol) -> (Tensor pinv, Tensor rank, Tensor info)",
    python=_pinv_python,
    fake=_pinv_fake,
    shapes={"a": "M N", "rtol": "", "atol": ""},
    derivative=Derivative(_pinv_setup_context, _pinv_backward, ("rank", "info")),
    composite=True,
)


@error_message("lstsq")
def _lstsq_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return matrix_error("lstsq", info, context[0])


@error_message("pinv")
def _pinv_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return matrix_error("pinv", info, context[0])


def matrix_error(op: str, info: Tensor, a: Tensor) -> Exception:
    """The error where a is not finite, or a tolerance is refused."""
    index, code, where = first_failure(info)
    if code == BAD_TOLERANCE:
        return ValueError(f"cfl_ops.{op}: {where}rtol and atol must be finite and not negative")
    row = int((~a[index].isfinite().all(-1)).nonzero()[0])
    error: Exception = LinAlgError(f"cfl_ops.{op}: {where}a has NaN or Inf in row {row}")
    return error
