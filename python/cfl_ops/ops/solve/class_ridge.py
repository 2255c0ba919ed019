"""class_ridge: the per-class weighted ridge systems of the rescaled squared loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op, gradients
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.solve.codes import BAD_CLASS, BAD_PENALTY, NOT_FINITE
from cfl_ops.ops.solve.eigen_ridge import GRAM_LIMIT, EigenRidge
from cfl_ops.ops.solve.narrow_ridge import Equilibrated
from cfl_ops.ops.solve.regression import gram_of_rows, moments
from cfl_ops.ops.solve.ridge_fit import RIDGE_FIT, of_fewer_rows, through_rows
from cfl_ops.ops.solve.ridge_solve import RIDGE_SOLVE
from cfl_ops.ops.solve.system import on_device
from cfl_ops.ops.solve.tall import identity

__all__ = ["class_ridge"]

SYSTEMS = 1 << 22
"""How many numbers the systems may have that are solved side by side."""


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
    rows than ``x`` has columns; where the rows are the smaller side, the same for ``X X^T``. Where the condition of G
    and kappa leave too few digits for that, and where the classes' penalties differ, each class is a ridge regression
    of its own on weighted rows.

    Args:
        x: ``(B, D)``.
        y: int64 class indices ``(B)``.
        lam: rho, in sum convention: a number, a 0-d tensor, or ``(K)``, one for each class; not negative.
            ``lam + prox`` must make the systems positive definite.
        num_classes: K.
        kappa: the weight of a row in the system of its own class; positive.
        scale: M, the target of the own class.
        prox: mu, the pull towards ``weight``; of the same forms as ``lam``.
        weight: ``(D, K)``, where ``prox`` is not 0.

    Returns:
        ``(D, K)``, of the dtype of ``x``, computed in float64.

    Raises:
        TypeError, ValueError: shapes, dtypes or options do not fit.
        IndexError: a class index is out of range.
        torch.linalg.LinAlgError: a system is not positive definite, or x has NaN or Inf.

    Differentiable (twice) in x, lam, prox and weight. Costs ``B D^2 + D^3 / 3`` multiply-adds and, for a class
    of n_k rows, ``n_k^2 D`` or ``D^3 / 3``; for ``B < D`` ``B^2 D + B^3`` and ``n_k^3 / 3``; and where each class goes
    by itself what :func:`ridge` does, for each.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.class_ridge(torch.eye(2), torch.tensor([0, 1]), 1.0, num_classes=2, kappa=3.0)
        tensor([[0.7500, 0.0000],
                [0.0000, 0.7500]])
    """
    args, start = _arguments("class_ridge", x, y, lam, num_classes, kappa, scale, prox, weight)
    solved, info = CLASS_SOLVE(*args)
    result: Tensor = (solved if start is None else solved + start).to(x.dtype)
    check_info("class_ridge", info, [result], [y, result.detach()])
    return result


class ClassSolveArguments(NamedTuple):
    """What the op takes."""

    x: Tensor
    y: Tensor
    target: Tensor | None
    """``(..., B, K)`` in float64, of each class's regression."""
    cross: Tensor | None
    """``(..., D, K)`` in float64, added to the right sides: the gradients, in a derivative."""
    lam: Tensor
    """``(..., K)`` in float64: the whole penalty of each class's system."""
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
) -> tuple[ClassSolveArguments, Tensor | None]:
    """What the op takes, and where its solution starts from."""
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
        _or_nan(_class_penalty(op, name, value, num_classes, x))
        for name, value in (("lam", lam), ("prox", prox))
    )
    own = _own_class(y, num_classes)
    scale = checks.scalar(op, "scale", scale, checks.POSITIVE, [own])
    target, total = scale * own, penalty
    start = None
    if pulled and weight is not None:
        # With W = c W_t + V and c = mu / (rho + mu), V is fitted to what c W_t leaves of the targets: the pull is gone.
        total = penalty + pull
        start = (pull / torch.where(total > 0, total, 1.0)) * weight.double()
        target = target - x.double() @ start
    return ClassSolveArguments(x, y, target, None, total, float(kappa)), start


def _class_penalty(op: str, name: str, value: float | Tensor, classes: int, x: Tensor) -> Tensor:
    """``(K)`` in float64."""
    given = checks.coefficient(op, name, value, x.device)
    if given.ndim and tuple(given.shape) not in ((1,), (classes,)):
        raise ValueError(
            f"cfl_ops.{op}: {name} must be a number, or have shape ({classes},) (a penalty for each class), but got "
            f"shape {tuple(given.shape)}"
        )
    return on_device(given, x).expand(classes)


def _or_nan(penalty: Tensor) -> Tensor:
    """NaN where a tensor's penalty is negative, which the other's might hide in their sum."""
    return torch.where(penalty >= 0, penalty, torch.nan)


def _own_class(y: Tensor, classes: int) -> Tensor:
    """1 where a row is of the class, else 0: ``(..., B, K)`` in float64."""
    return (y.unsqueeze(-1) == torch.arange(classes, device=y.device)).double()


def _class_solve_python(args: ClassSolveArguments) -> tuple[Tensor, Tensor]:
    """w_k = (X^T M_k^2 X + lam_k I)^-1 (X^T M_k^2 t_k + q_k), M_k^2 = diag(kappa in the rows of class k, else 1)."""
    batch = args.x.shape[:-2]
    if not batch:
        return _class_solve_one(args)
    weights, infos = (torch.zeros_like(value) for value in _class_solve_fake(args))
    for index in itertools.product(*map(range, batch)):
        target = None if args.target is None else args.target[index]
        cross = None if args.cross is None else args.cross[index]
        one = ClassSolveArguments(args.x[index], args.y[index], target, cross, args.lam[index], args.kappa)
        weights[index], infos[index] = _class_solve_one(one)
    return weights, infos


def _class_solve_one(args: ClassSolveArguments) -> tuple[Tensor, Tensor]:
    x, y, _, _, lam, _ = args
    width, classes = x.shape[1], len(lam)
    outside, code = (y < 0) | (y >= classes), 0
    if bool(outside.any()):
        code = BAD_CLASS
    elif not bool(((lam >= 0) & lam.isfinite()).all()):
        code = BAD_PENALTY
    elif not bool(x.isfinite().all()):
        code = NOT_FINITE
    if code:
        info = torch.full((), code, dtype=torch.int32, device=x.device)
        return x.new_full((width, classes), torch.nan, dtype=torch.float64), info
    if classes and x.numel() and bool((lam == lam[0]).all()):
        weight = (_through_rows if len(x) < width else _through_columns)(args)
        if weight is not None:
            return weight, torch.zeros((), dtype=torch.int32, device=x.device)
    return _class_by_class(args)


def _limit(x: Tensor, kappa: float) -> float:
    """The condition of the system that all classes share up to which a change by kappa keeps the digits."""
    limit = GRAM_LIMIT[torch.float64 if x.dtype == torch.float64 else torch.float32]
    return limit / max(kappa, 1 / kappa) if kappa else 0.0


def _members(y: Tensor, classes: int) -> list[Tensor]:
    """The rows of each class."""
    return list(torch.argsort(y, stable=True).split(torch.bincount(y, minlength=classes).tolist()))


def _through_columns(args: ClassSolveArguments) -> Tensor | None:
    """By G = X^T X + lam I, which each class changes by its rows; None where that would lose digits."""
    x, y, target, cross, lam, kappa = args
    rows, width = x.double(), x.shape[1]
    if target is None:
        gram, right = moments(rows, rows[:, :0])[0], cross
    else:
        gram, right = moments(rows, target)
        right = right if cross is None else right + cross
    assert right is not None
    system = Equilibrated(gram, lam[:1])
    members = [] if kappa == 1.0 else _members(y, len(lam))
    small = [k for k, own in enumerate(members) if 0 < len(own) <= width]
    # G^-1 of all right sides and all rows of the small classes, in one solve.
    solved = system.solve(torch.cat([right, *(rows[members[k]].mT for k in small)], dim=-1))
    if not float(system.condition) <= _limit(x, kappa):
        return None
    base, *reaches = solved.split([len(lam), *(len(members[k]) for k in small)], dim=-1)
    columns = list(base.unbind(-1))
    for k, reach in zip(small, reaches, strict=True):
        # With c = kappa - 1, P the rows of the class and t their targets, the change is c U (I + c P U)^-1 (t - P w),
        # U = G^-1 P^T. The matrix is positive definite for kappa < 1 too: the eigenvalues of P U are at most 1.
        own = rows[members[k]]
        inner = identity(len(own), x) + (kappa - 1) * (own @ reach)
        missing = -(own @ columns[k])
        if target is not None:
            missing = missing + target[members[k], k]
        change, failed = RIDGE_SOLVE(inner, (kappa - 1) * missing.unsqueeze(-1), _zero(), None)
        if int(failed):
            return None
        columns[k] = columns[k] + (reach @ change).squeeze(-1)
    large = [k for k, own in enumerate(members) if len(own) > width]
    at_once = max(1, SYSTEMS // width**2)
    for begin in range(0, len(large), at_once):
        some = large[begin : begin + at_once]
        systems, rights = [], []
        for k in some:
            own, whole = rows[members[k]], right[:, k]
            if target is not None:
                whole = whole + (kappa - 1) * (own.mT @ target[members[k], k])
            systems.append(gram + (kappa - 1) * (own.mT @ own))
            rights.append(whole)
        changed = Equilibrated(torch.stack(systems), lam[:1])
        solutions = changed.solve(torch.stack(rights).unsqueeze(-1))
        if not bool((changed.condition <= _limit(x, 1.0)).all()):
            return None
        for k, solution in zip(some, solutions.squeeze(-1), strict=True):
            columns[k] = solution
    return torch.stack(columns, dim=-1)


def _through_rows(args: ClassSolveArguments) -> Tensor | None:
    """By X X^T + lam I, the same: w_k = X^T a_k with (X X^T + lam diag(m_k^-2)) a_k = t_k."""
    x, y, target, cross, lam, kappa = args
    rows, count, penalty = x.double(), len(x), float(lam[0])
    if penalty == 0:
        return None
    right = rows.new_zeros(count, len(lam)) if target is None else target
    if cross is not None:  # (X^T M^2 X + lam I)^-1 q = (q - X^T (X X^T + lam M^-2)^-1 X q) / lam
        cross = cross / penalty
        right = right - rows @ cross
    system = Equilibrated(gram_of_rows(rows), lam[:1])
    # The lines of the inverse are needed one by one where kappa changes them.
    solved = system.solve(right if kappa == 1.0 else torch.cat([right, identity(count, x)], dim=-1))
    if not float(system.condition) <= _limit(x, kappa):
        return None
    alpha, inverse = solved[:, : len(lam)], solved[:, len(lam) :]
    if kappa != 1.0:
        change = penalty * (1 / kappa - 1)
        columns = list(alpha.unbind(-1))
        for k, own in enumerate(_members(y, len(lam))):
            inner = identity(len(own), x) + change * inverse[own][:, own]
            part, failed = RIDGE_SOLVE(inner, change * columns[k][own].unsqueeze(-1), _zero(), None)
            if int(failed):
                return None
            columns[k] = columns[k] - (inverse[:, own] @ part).squeeze(-1)
        alpha = torch.stack(columns, dim=-1)
    weight = rows.mT @ alpha
    return weight if cross is None else weight + cross


def _class_by_class(args: ClassSolveArguments) -> tuple[Tensor, Tensor]:
    """Each class as the ridge regression on its weighted rows."""
    x, y, target, cross, lam, kappa = args
    weight = x.new_zeros(x.shape[1], len(lam), dtype=torch.float64)
    info = torch.zeros((), dtype=torch.int32, device=x.device)
    for k in range(len(lam)):
        root = 1 + (math.sqrt(kappa) - 1) * (y == k).double().unsqueeze(-1)
        rows = root * x
        if float(lam[k]) == 0 and len(EigenRidge(rows, False, 0.0, exact=True).parts()[0]) < x.shape[1]:
            weight[:, k], info = torch.nan, torch.ones_like(info)
            continue
        wanted = None if target is None else root * target[:, k : k + 1]
        right = None if cross is None else cross[:, k : k + 1].unsqueeze(0)
        solved, failed = RIDGE_FIT(rows, wanted, right, lam[k].reshape(1, 1), False)
        weight[:, k] = solved[0, :, 0]
        info = torch.where(info == 0, failed, info)
    return weight, info


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def _class_solve_fake(args: ClassSolveArguments) -> tuple[Tensor, Tensor]:
    x, batch = args.x, args.x.shape[:-2]
    weight = x.new_empty(*batch, x.shape[-1], args.lam.shape[-1], dtype=torch.float64)
    return weight, x.new_empty(batch, dtype=torch.int32)


def _class_solve_setup_context(ctx: Any, inputs: ClassSolveArguments, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs.x, inputs.y, inputs.target, inputs.cross, inputs.lam, output[0])
    ctx.kappa = inputs.kappa


def _class_solve_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    """With z_k = S_k^-1 wbar_k and R = M^2 * (T - X W): Tbar = M^2 * X Z, Qbar = Z, Xbar = R Z^T - (M^2 * X Z) W^T,
    lambar_k = -<z_k, w_k>. For fewer rows than columns each class as ridge_fit's derivative.
    """
    if grad is None:
        return gradients(ClassSolveArguments)
    x, y, target, cross, lam, weight = ctx.saved_tensors
    z, _ = CLASS_SOLVE(x, y, None, grad, lam, ctx.kappa)
    square = 1 + (ctx.kappa - 1) * _own_class(y, weight.shape[-1])
    if x.shape[-2] < x.shape[-1]:
        root, penalties = square.sqrt(), lam.unsqueeze(-1).unsqueeze(-1)
        rows = root.mT.unsqueeze(-1) * x.double().unsqueeze(-3)  # (..., K, B, D): M_k X

        def each(value: Tensor) -> Tensor:
            """Columns (..., n, K) as (..., K, 1, n, 1), one fit for each class."""
            return value.mT.unsqueeze(-2).unsqueeze(-1)

        own = through_rows(rows, each(grad), penalties)
        change, of_lam = of_fewer_rows(
            rows, None if target is None else each(root * target), None if cross is None else each(cross),
            penalties, each(grad), own, each(z), each(weight),
        )  # fmt: skip
        grad_x = (root.mT.unsqueeze(-1) * change.squeeze(-3)).sum(-3)
        reach, pull = root * own.squeeze(-1).squeeze(-2).mT, of_lam.squeeze(-1).squeeze(-1)
    else:
        reach, residual = square * (x.double() @ z), -(x.double() @ weight)
        residual = square * (residual if target is None else residual + target)
        grad_x, pull = residual @ z.mT - reach @ weight.mT, (z * weight).sum(-2)
    return gradients(
        ClassSolveArguments,
        x=grad_x.to(x.dtype),
        target=None if target is None else reach,
        cross=None if cross is None else z,
        lam=-pull,
    )


def _check(args: ClassSolveArguments) -> None:
    checks.number("class_solve", "kappa", args.kappa, checks.NOT_NEGATIVE)
    if args.target is None and args.cross is None:
        raise ValueError("cfl_ops.class_solve: target or cross must be given")


CLASS_SOLVE = define_op(
    "class_solve(Tensor x, Tensor y, Tensor? target, Tensor? cross, Tensor lam, float kappa) -> "
    "(Tensor weight, Tensor info)",
    arguments=ClassSolveArguments,
    python=_class_solve_python,
    fake=_class_solve_fake,
    shapes={"x": "B D", "y": "int64 B", "target": "float64 B K", "cross": "float64 D K", "lam": "float64 K"},
    check=_check,
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
