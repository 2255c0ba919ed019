"""class_ridge: the per-class weighted ridge systems of the rescaled squared loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op, gradients
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.gram.gram import plain_gram
from cfl_ops.ops.solve.codes import BAD_CLASS, BAD_PENALTY
from cfl_ops.ops.solve.ridge_solve import RIDGE_SOLVE
from cfl_ops.ops.solve.system import on_device

__all__ = ["class_ridge"]


def class_ridge(
    x: Tensor,
    y: Tensor,
    lam: float | Tensor,
    *,
    num_classes: int,
    kappa: float = 1.0,
    scale: float = 1.0,
    prox: float | Tensor = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""The per-class weighted ridge systems of the rescaled squared loss, without K factorisations.

    .. math:: w_k = \arg\min_w \sum_i m_{ik}^2 (x_i^T w - M y_{ik})^2 + \rho \|w\|^2 + \mu \|w - w_{k,t}\|^2

    with ``m_ik^2 = kappa`` where row i is of class k and 1 elsewhere, ``y`` one-hot (Hui and Belkin's loss as in
    Closed-Form Last Layer Optimization, Eq. 29-32). With ``G = X^T X + (rho + mu) I`` factored once and P_k the
    rows of class k, each system is a low-rank change of G (Woodbury), or solved whole where the class has more
    rows than ``x`` has columns.

    Args:
        x: ``(B, D)``.
        y: int64 class indices ``(B)``.
        lam: rho, in sum convention; not negative. ``lam + prox`` must make the systems positive definite.
        num_classes: K.
        kappa: the weight of a row in the system of its own class; positive.
        scale: M, the target of the own class.
        prox: mu, the pull towards ``weight``.
        weight: ``(D, K)``, where ``prox`` is not 0.

    Returns:
        ``(D, K)``, of the dtype of ``x``, computed in float64.

    Raises:
        TypeError, ValueError: shapes, dtypes or options do not fit.
        IndexError: a class index is out of range.
        torch.linalg.LinAlgError: a system is not positive definite, or x has NaN or Inf.

    Differentiable (twice) in x, lam, prox and weight. Costs ``B D^2 + D^3 / 3`` multiply-adds and, for a class
    of n_k rows, ``n_k^2 D`` or ``D^3 / 3``.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.class_ridge(torch.eye(2), torch.tensor([0, 1]), 1.0, num_classes=2, kappa=3.0)
        tensor([[0.7500, 0.0000],
                [0.0000, 0.7500]])
    """
    args = _arguments("class_ridge", x, y, lam, num_classes, kappa, scale, prox, weight)
    solved, info = CLASS_SOLVE(*args)
    result: Tensor = solved.to(x.dtype)
    check_info("class_ridge", info, [result], [y, result.detach()])
    return result


class ClassSolveArguments(NamedTuple):
    """What the op takes."""

    x: Tensor
    y: Tensor
    cross: Tensor
    """The right sides ``(..., D, K)``, one for each class's system."""
    lam: Tensor
    """The whole penalty of the systems."""
    kappa: float


def _arguments(
    op: str,
    x: Tensor,
    y: Tensor,
    lam: float | Tensor,
    num_classes: int,
    kappa: float,
    scale: float,
    prox: float | Tensor,
    weight: Tensor | None,
) -> ClassSolveArguments:
    checks.floating(op, "x", x, 2)
    checks.tensor(op, "y", y, 1)
    if x.ndim != 2 or y.ndim != 1:
        raise ValueError(
            f"cfl_ops.{op}: x must be (B, D) and y (B), but got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if y.dtype != torch.int64:
        raise TypeError(f"cfl_ops.{op}: y must be int64 class indices, but got {y.dtype}")
    checks.size(op, "y", y, 0, x.shape[0], "the rows of x")
    if weight is not None:
        checks.floating(op, "weight", weight, 2)
    checks.same_device(op, "x", x, y=y, weight=weight)
    num_classes = checks.integer(op, "num_classes", num_classes, 0)
    kappa = checks.number(op, "kappa", kappa, checks.POSITIVE)
    pulled = not checks.is_zero(prox)
    if pulled and weight is None:
        raise ValueError(f"cfl_ops.{op}: weight must be given where prox is not 0")
    if weight is not None and tuple(weight.shape) != (x.shape[-1], num_classes):
        raise ValueError(
            f"cfl_ops.{op}: weight must have shape {(x.shape[-1], num_classes)}, but got {tuple(weight.shape)}"
        )
    penalty, pull = (
        _or_nan(checks.one_coefficient(op, name, value, x.device).to(x.device, torch.float64))
        for name, value in (("lam", lam), ("prox", prox))
    )
    x64 = x.double()
    own = _own_class(y, num_classes)
    scale = checks.scalar(op, "scale", scale, checks.POSITIVE, [own])
    cross = (kappa * scale) * (x64.mT @ own)
    total = penalty
    if pulled and weight is not None:
        total, cross = total + pull, cross + pull * weight.double()
    return ClassSolveArguments(x64, y, cross, total, float(kappa))


def _or_nan(penalty: Tensor) -> Tensor:
    """NaN where a tensor's penalty is negative, which the other's might hide in their sum."""
    return torch.where(penalty >= 0, penalty, torch.nan)


def _own_class(y: Tensor, classes: int) -> Tensor:
    """1 where a row is of the class, else 0: ``(..., B, K)`` in float64."""
    return (y.unsqueeze(-1) == torch.arange(classes, device=y.device)).double()


def _class_solve_python(args: ClassSolveArguments) -> tuple[Tensor, Tensor]:
    """w_k = (X^T diag(m_k^2) X + lam I)^-1 q_k, m_k^2 = kappa in the rows of class k and 1 elsewhere."""
    x, y, cross, lam, _ = args
    batch = x.shape[:-2]
    lam = on_device(lam, x)
    if not batch:
        weight, info = _class_solve_one(args._replace(lam=lam))
        return weight.to(cross.dtype), info
    lams = lam.expand(batch).reshape(-1)
    flat = zip(x.flatten(0, -3), y.flatten(0, -2), cross.flatten(0, -3), lams, strict=True)
    each = [_class_solve_one(ClassSolveArguments(*item, args.kappa)) for item in flat]
    weights, infos = (torch.stack(values).unflatten(0, batch) for values in zip(*each, strict=True))
    return weights.to(cross.dtype), infos


def _class_solve_one(args: ClassSolveArguments) -> tuple[Tensor, Tensor]:
    x, y, cross, lam, kappa = args
    x64, (width, classes) = x.double(), cross.shape
    outside = (y < 0) | (y >= classes)
    if bool(outside.any()):
        info = torch.full((), BAD_CLASS, dtype=torch.int32, device=x.device)
        return x64.new_full((width, classes), torch.nan), info
    gram = plain_gram(x64, None, torch.float64)[0]
    right = cross.double()
    if kappa == 1.0:
        whole, info = RIDGE_SOLVE(gram, right, lam, None)
        return whole, info

    # G^-1 of all right sides and all rows of the small classes, in one solve.
    counts = torch.bincount(y, minlength=classes).tolist()
    members = x64[torch.argsort(y, stable=True)].split(counts)
    small = [k for k, count in enumerate(counts) if 0 < count <= width]
    stacked = [right, *(members[k].mT for k in small)]
    solved, info = RIDGE_SOLVE(gram, torch.cat(stacked, dim=-1), lam, None)
    base, *corrections = solved.split([classes, *(counts[k] for k in small)], dim=-1)
    columns, zero = list(base.unbind(-1)), torch.zeros((), dtype=torch.float64)
    for k, u in zip(small, corrections, strict=True):
        rows, z = members[k], columns[k].unsqueeze(-1)
        # (G + c P^T P)^-1 q = z - U (I + c P U)^-1 c P z with c = kappa - 1. The inner system is positive
        # definite for kappa < 1 too: the eigenvalues of P G^-1 P^T are at most 1.
        inner = torch.eye(counts[k], dtype=torch.float64, device=x.device) + (kappa - 1) * (rows @ u)
        change, failed = RIDGE_SOLVE(inner, (kappa - 1) * (rows @ z), zero, None)
        info = torch.where(info == 0, failed, info)
        columns[k] = (z - u @ change).squeeze(-1)
    for k, count in enumerate(counts):
        if count > width:
            system = gram + (kappa - 1) * (members[k].mT @ members[k])
            whole, failed = RIDGE_SOLVE(system, right[:, k : k + 1], lam, None)
            info = torch.where(info == 0, failed, info)
            columns[k] = whole.squeeze(-1)
    return torch.stack(columns, dim=-1), info


def _class_solve_fake(args: ClassSolveArguments) -> tuple[Tensor, Tensor]:
    return args.cross.new_empty(args.cross.shape), args.x.new_empty(args.x.shape[:-2], dtype=torch.int32)


def _class_solve_setup_context(ctx: Any, inputs: ClassSolveArguments, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs.x, inputs.y, inputs.lam, output[0])
    ctx.kappa, ctx.cross_dtype = inputs.kappa, inputs.cross.dtype


def _class_solve_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    """With z_k = S_k^-1 wbar_k: qbar = z, and from Sbar_k = -z_k w_k^T
    Xbar = -((M^2 * X Z) W^T + (M^2 * X W) Z^T), lambar = -<Z, W>.
    """
    if grad is None:
        return gradients(ClassSolveArguments)
    x, y, lam, weight = ctx.saved_tensors
    z, _ = CLASS_SOLVE(x, y, grad.to(ctx.cross_dtype), lam, ctx.kappa)
    x64, w, z64 = x.double(), weight.double(), z.double()
    square = 1 + (ctx.kappa - 1) * _own_class(y, weight.shape[-1])
    grad_x = -((square * (x64 @ z64)) @ w.mT + (square * (x64 @ w)) @ z64.mT)
    each = -(z64 * w).sum((-2, -1))
    grad_lam = (each if lam.ndim else each.sum()).to(lam.device, lam.dtype)
    return gradients(ClassSolveArguments, x=grad_x.to(x.dtype), cross=z, lam=grad_lam)


CLASS_SOLVE = define_op(
    "class_solve(Tensor x, Tensor y, Tensor cross, Tensor lam, float kappa) -> (Tensor weight, Tensor info)",
    arguments=ClassSolveArguments,
    python=_class_solve_python,
    fake=_class_solve_fake,
    shapes={"x": "B D", "y": "int64 B", "cross": "D K", "lam": ""},
    check=lambda args: checks.number("class_solve", "kappa", args.kappa, checks.NOT_NEGATIVE),
    derivative=Derivative(_class_solve_setup_context, _class_solve_backward),
    composite=True,
)


@error_message("class_ridge")
def _class_ridge_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    index, code, where = first_failure(info)
    if code == BAD_CLASS:
        y, classes = context[0][index], context[1].shape[-1]
        row = int(((y < 0) | (y >= classes)).nonzero()[0])
        return IndexError(
            f"cfl_ops.class_ridge: {where}y must hold class indices from 0 to {classes - 1}, "
            f"but got {int(y[row])} in row {row}"
        )
    if code == BAD_PENALTY:
        return ValueError(f"cfl_ops.class_ridge: {where}lam and prox must be finite and not negative")
    error: Exception = LinAlgError(
        f"cfl_ops.class_ridge: {where}a system is not positive definite (columns of x depend on one another, or x "
        "has NaN or Inf): use a larger lam"
    )
    return error
