"""ridge_solve: batches of regularised normal equations, factored and solved in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.batching import expand_batch
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op
from cfl_ops._gpu.launch import cuda_cpp, triton
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.solve import cuda
from cfl_ops.ops.solve.codes import BAD_PENALTY
from cfl_ops.ops.solve.system import solve_system

__all__ = ["ridge_solve", "ridge_solve_ex"]


def ridge_solve(
    gram: Tensor, cross: Tensor, lam: float | Tensor = 0.0, *, lam_diag: Tensor | None = None
) -> Tensor:
    r"""Solve batches of regularised normal equations, factor and solve in one pass.

    .. math:: W = (G + \lambda I + \mathrm{diag}(\lambda_d))^{-1} C

    (Closed-Form Last Layer Optimization, Eq. 2, transposed: the solution is ``(D, K)``.)

    Args:
        gram: symmetric positive (semi-)definite ``(..., D, D)``, of any strides; its lower triangle is used.
        cross: right sides ``(..., D, K)``.
        lam: a number, or a tensor that is 0-d or broadcasts with the batch dimensions; not negative.
        lam_diag: ``(..., D)``: a further penalty for each unknown; not negative.

    Returns:
        ``(..., D, K)``, of the promoted dtype of ``gram`` and ``cross``. float16 and bfloat16 are computed in
        float32, and what float32 cannot solve in float64. A solution that is returned is known to be right: for each
        right side the norm of its error is at most a tenth of that of the exact solution of the numbers given, and
        far less where the condition allows it. Float64 systems are solved up to a condition of about 1e15, that of
        the system scaled to a diagonal of ones.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or a penalty is negative, NaN or Inf.
        torch.linalg.LinAlgError: a system is not positive definite, is too close to singular for that in float64,
            or holds NaN or Inf; the message names its batch index. A NaN in ``cross`` stays in its column of the
            solution.

    Differentiable (twice) in all tensors; the gradient with respect to ``gram`` is symmetric, as that of
    :func:`torch.linalg.cholesky`, and NaN where its own solution, of other right sides, is not known to be right.
    Costs ``D^3 / 3 + 2 D^2 K`` multiply-adds for each system.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.ridge_solve(torch.diag(torch.tensor([3.0, 8.0])), torch.tensor([[4.0], [18.0]]), 1.0)
        tensor([[1.],
                [2.]])
    """
    args = _arguments("ridge_solve", gram, cross, lam, lam_diag)
    solution: Tensor
    solution, info = RIDGE_SOLVE(*args)
    check_info("ridge_solve", info, [solution], [args[0]])
    return solution


def ridge_solve_ex(
    gram: Tensor, cross: Tensor, lam: float | Tensor = 0.0, *, lam_diag: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`ridge_solve`, but returns ``(solution, info)`` and never raises for data nor synchronises.

    ``info (...)`` int32 is 0 where the solution is known to be right (see there). Else it is the order of the first
    leading minor that is not positive definite; where all of them are within rounding, but not far enough for a right
    solution, that of the smallest pivot; or -1 where a penalty is negative, NaN or Inf. Where it is not 0 the
    solution is NaN; the other systems of the batch are not touched by it.

    Example:
        >>> import torch, cfl_ops
        >>> solution, info = cfl_ops.ridge_solve_ex(torch.zeros(2, 2), torch.ones(2, 1))
        >>> int(info)
        1
    """
    solution, info = RIDGE_SOLVE(*_arguments("ridge_solve_ex", gram, cross, lam, lam_diag))
    return solution, info


def _arguments(
    op: str, gram: Tensor, cross: Tensor, lam: float | Tensor, lam_diag: Tensor | None
) -> list[Any]:
    checks.floating(op, "gram", gram, 2)
    checks.floating(op, "cross", cross, 2)
    checks.size(op, "gram", gram, -2, gram.shape[-1], "its last dimension: square matrices")
    checks.size(op, "cross", cross, -2, gram.shape[-1], "the order of gram")
    if lam_diag is not None:
        checks.floating(op, "lam_diag", lam_diag, 1)
        checks.size(op, "lam_diag", lam_diag, -1, gram.shape[-1], "the order of gram")
    checks.same_device(op, "gram", gram, cross=cross, lam_diag=lam_diag)
    shift = checks.coefficient(op, "lam", lam, gram.device)
    args = [gram, cross, shift, lam_diag]
    batch = gram.shape[:-2]
    if cross.shape[:-2] == batch and shift.ndim == 0 and (lam_diag is None or lam_diag.shape[:-1] == batch):
        return args
    batches = {"gram": gram.shape[:-2], "cross": cross.shape[:-2], "lam": shift.shape}
    if lam_diag is not None:
        batches["lam_diag"] = lam_diag.shape[:-1]
    return expand_batch(args, (2, 2, 0, 1), checks.broadcastable(op, **batches))


def _ridge_solve_fake(
    gram: Tensor, cross: Tensor, lam: Tensor, lam_diag: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(gram.dtype, cross.dtype)
    return cross.new_empty(cross.shape, dtype=dtype), gram.new_empty(gram.shape[:-2], dtype=torch.int32)


def _ridge_solve_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gram, cross, lam, lam_diag = inputs
    ctx.save_for_backward(gram, lam, lam_diag, output[0])
    ctx.cross_dtype = cross.dtype


def _ridge_solve_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    """With Z = S^-1 Xbar: Cbar = Z, Sbar = -(Z X^T + X Z^T) / 2, and its diagonal for the penalties."""
    if grad is None:
        return None, None, None, None
    gram, lam, lam_diag, solution = ctx.saved_tensors
    z, _ = RIDGE_SOLVE(gram, grad, lam, lam_diag)  # NaN where its info is not 0, as a derivative cannot raise
    grad_gram = grad_lam = grad_diag = None
    if ctx.needs_input_grad[0]:
        outer = z @ solution.mT
        grad_gram = (-0.5 * (outer + outer.mT)).to(gram.dtype)
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        each = -(z * solution).sum(-1)
        if lam_diag is not None:
            grad_diag = each.to(lam_diag.dtype)
        total = each.sum(-1)
        grad_lam = (total if lam.ndim else total.sum()).to(lam.device, lam.dtype)
    return grad_gram, z.to(ctx.cross_dtype), grad_lam, grad_diag


RIDGE_SOLVE = define_op(
    "ridge_solve(Tensor gram, Tensor cross, Tensor lam, Tensor? lam_diag) -> (Tensor solution, Tensor info)",
    python=solve_system,
    fake=_ridge_solve_fake,
    shapes={"gram": "D D", "cross": "D K", "lam": "", "lam_diag": "D"},
    derivative=Derivative(_ridge_solve_setup_context, _ridge_solve_backward),
    cuda=(*cuda_cpp(cuda.ridge_solve), triton("cfl_ops.triton_kernels.solve:ridge_solve")),
)


@error_message("ridge_solve")
def _ridge_solve_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    index, code, where = first_failure(info)
    prefix = f"cfl_ops.ridge_solve: {where}"
    if code == BAD_PENALTY:
        return ValueError(f"{prefix}lam and lam_diag must be finite and not negative")
    gram = context[0][index]
    lower = gram.tril()
    if not bool(lower.isfinite().all()):
        row = int((~lower.isfinite().all(-1)).nonzero()[0])
        error: Exception = LinAlgError(f"{prefix}gram has NaN or Inf in row {row}")
        return error
    error = LinAlgError(
        f"{prefix}the system is not positive definite, or too close to singular for a right solution in float64 "
        f"(by its leading minor of order {code}): use a larger lam, or lstsq for the minimum-norm solution"
    )
    return error
