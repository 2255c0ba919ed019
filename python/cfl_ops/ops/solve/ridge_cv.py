"""ridge_cv: ridge regression with its penalty chosen by cross-validation, over rows or over folds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import same_dtype, within
from cfl_ops._core.failures import check_info, error_message
from cfl_ops._core.op import define_op
from cfl_ops._core.results import result_type
from cfl_ops.ops.solve.eigen_ridge import EigenRidge
from cfl_ops.ops.solve.regression import (
    centred,
    check_data,
    check_penalties,
    column_means,
    intercept,
    regression_error,
    result_dtype,
)
from cfl_ops.ops.solve.validation import KFold, LeaveOneOut, runs_of

__all__ = ["RidgeCVResult", "ridge_cv"]

MOMENT_BYTES = 32 << 20
"""Targets are worked off in runs, whatever their number: runs of moments in float64 of so many bytes."""


@result_type("ridge")
class RidgeCVResult(NamedTuple):
    """The fit at the chosen penalties, and how every penalty did."""

    weight: Tensor
    """``(D, K)``"""
    intercept: Tensor | None
    """``(K)``, or None without a bias."""
    lam: Tensor
    """The chosen penalties: ``(K)`` float64, or 0-d where one is shared by all targets."""
    scores: Tensor
    """``(L, K)`` float64: the mean squared error of each penalty and target (for gcv, its estimate)."""


def ridge_cv(
    x: Tensor,
    y: Tensor,
    lams: Sequence[float] | Tensor,
    *,
    cv: str | int = "loo",
    per_target: bool = True,
    bias: bool = False,
) -> RidgeCVResult:
    r"""Ridge regression with its penalty chosen by cross-validation.

    .. math:: \mathrm{loo}(\lambda) = \frac{1}{B} \sum_i
        \left( \frac{y_i - x_i^T W_\lambda}{1 - h_i(\lambda)} \right)^2, \quad
        h(\lambda) = \mathrm{diag}\, X (X^T X + \lambda I)^{-1} X^T

    One eigendecomposition serves all penalties and targets ("loo" and "gcv"), or one for each fold, of the moments
    of all other rows; where rounding of moments, or of float32, would show in a score, singular values in float64
    take its place (docs/formulas.md, 11): scores and choices are those of refits. Targets are worked off in runs, so
    that memory beyond inputs, weights and scores stays bounded for any number of them.

    Args:
        x: ``(B, D)``.
        y: ``(B, K)``.
        lams: L numbers, or a 1-d tensor, not negative.
        cv: "loo" (exact leave-one-out), "gcv" (the leverages replaced by their mean), or the number of folds
            of consecutive rows, as scikit-learn's ``KFold`` cuts them; shuffle the rows if they are ordered.
        per_target: choose a penalty for each target, or one for all: by the mean error over targets, or with
            folds by the mean R^2 over folds and targets, as scikit-learn does in either case.
        bias: also fit an intercept, which is not penalised.

    Returns:
        :class:`RidgeCVResult`: ``weight (D, K)``, ``intercept (K)`` or None, ``lam (K)`` or 0-d, and ``scores
        (L, K)``. Of equal scores the first of ``lams`` wins. At penalty 0 a fit is that of minimum norm, and so is
        each fit to the rows that are left.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or an option is not known.
        torch.linalg.LinAlgError: x or y has NaN or Inf.

    Not differentiable (a choice has no gradient): use :func:`ridge` at the chosen penalty. Costs ``B D^2 / 2 +
    9 D^3`` once (``4 B D^2 + 20 D^3`` of singular values) and ``B D K`` multiply-adds for each penalty.

    Example:
        >>> import torch, cfl_ops
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> cfl_ops.ridge_cv(x, 2 * x, [0.01, 100.0]).lam
        tensor([0.0100], dtype=torch.float64)
    """
    args = _arguments(x, y, lams, cv, per_target, bias)
    weight, intercepts, lam, scores, info = RIDGE_CV(*args)
    check_info("ridge_cv", info, [weight, intercepts, lam, scores], [args.x])
    dtype = result_dtype(x, y)
    return RidgeCVResult(weight.to(dtype), intercepts.to(dtype) if bias else None, lam, scores)


class RidgeCVArguments(NamedTuple):
    """What the op takes."""

    x: Tensor
    y: Tensor
    lams: Tensor
    kind: str
    """"loo", "gcv" or "folds"."""
    folds: int
    """0 where kind is not "folds"."""
    per_target: bool
    bias: bool


def _arguments(
    x: Tensor, y: Tensor, lams: Sequence[float] | Tensor, cv: str | int, per_target: bool, bias: bool
) -> RidgeCVArguments:
    checks.floating("ridge_cv", "x", x, 2)
    checks.floating("ridge_cv", "y", y, 2)
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(
            f"cfl_ops.ridge_cv: x and y must have 2 dimensions, but got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    data, targets = (value.detach() for value in check_data("ridge_cv", x, y))
    penalties = check_penalties("ridge_cv", lams, x.device)
    per_target = checks.flag("ridge_cv", "per_target", per_target)
    bias = checks.flag("ridge_cv", "bias", bias)
    rows, kind, folds = x.shape[-2], "folds", 0
    if not isinstance(cv, str):
        folds = checks.integer("ridge_cv", "cv", cv)
        if not 2 <= folds <= rows:
            raise ValueError(
                f"cfl_ops.ridge_cv: cv must be from 2 to the number of rows ({rows}), but got {cv}"
            )
    elif cv in ("loo", "gcv"):
        kind = cv
    else:
        raise ValueError(f"cfl_ops.ridge_cv: cv must be 'loo', 'gcv' or a number of folds, but got {cv!r}")
    if rows < 2:
        raise ValueError(f"cfl_ops.ridge_cv: x must have at least 2 rows, but got {rows}")
    return RidgeCVArguments(data, targets, penalties, kind, folds, per_target, bias)


def _ridge_cv_python(args: RidgeCVArguments) -> tuple[Tensor, ...]:
    batch = args.x.shape[:-2]
    if not batch:
        return tuple(value.clone() for value in _ridge_cv_one(args))
    flat = zip(args.x.flatten(0, -3), args.y.flatten(0, -3), args.lams.flatten(0, -2), strict=True)
    each = [_ridge_cv_one(args._replace(x=x, y=y, lams=lams)) for x, y, lams in flat]
    return tuple(torch.stack(values).unflatten(0, batch) for values in zip(*each, strict=True))


def _ridge_cv_one(args: RidgeCVArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight, intercept, the chosen penalties, scores, info."""
    x, y, lams, kind, folds, per_target, bias = args
    rows, width = x.shape
    targets = y.shape[-1]
    if not _all_finite(x, y):
        return (
            x.new_full((width, targets), torch.nan),
            x.new_full((targets if bias else 0,), torch.nan),
            lams.new_full((targets,) if per_target else (), torch.nan),
            lams.new_full((lams.numel(), targets), torch.nan),
            torch.ones((), dtype=torch.int32, device=x.device),
        )
    # Squares of the residuals shall neither overflow nor vanish.
    largest = max(map(abs, torch.stack(torch.aminmax(y)).tolist())) if y.numel() else 1.0
    unit = 1.0 if largest == 0 or 1e-12 < largest < 1e12 else 2.0 ** min(math.frexp(largest)[1], 1023)
    scores = lams.new_empty(lams.numel(), targets)
    weight = x.new_empty(width, targets)
    intercepts = x.new_empty(targets if bias else 0)
    lam = lams.new_empty(targets if per_target else 0)
    whole = EigenRidge(x, bias, float(lams.min()))
    validation = KFold(whole, lams, folds) if folds else LeaveOneOut(whole, lams, kind)

    def scaled_targets(run: slice) -> Tensor:
        target = centred(y[:, run], bias)
        return target if unit == 1.0 else target.double() / unit

    def fit(run: slice, target: Tensor, penalty: Tensor) -> None:
        weight[:, run] = whole.fit(target, penalty) * unit
        if bias:
            intercepts[run] = intercept(weight[:, run], whole.mean, column_means(y[:, run], bias))

    runs = runs_of(min(rows, width), targets, 8, MOMENT_BYTES)
    for run in runs:
        target = scaled_targets(run)
        validation.score(target, scores[:, run])
        if per_target:
            lam[run] = lams[scores[:, run].nan_to_num(nan=torch.inf).argmin(0)]
            fit(run, target, lam[run])
    if not per_target:
        lam = lams[validation.shared(scores).nan_to_num(nan=torch.inf).argmin(0)]
        for run in runs:
            fit(run, scaled_targets(run) if len(runs) > 1 else target, lam)
    info = torch.zeros((), dtype=torch.int32, device=x.device)
    return weight, intercepts, lam, scores * (unit * unit), info


def _all_finite(*tensors: Tensor) -> bool:
    """One pass over each: NaN and Inf show in the extremes."""
    ends = [end for value in tensors if value.numel() for end in torch.aminmax(value)]
    return bool(torch.stack(ends).isfinite().all()) if ends else True


def _ridge_cv_fake(args: RidgeCVArguments) -> tuple[Tensor, ...]:
    x, batch, targets, lams = args.x, args.x.shape[:-2], args.y.shape[-1], args.lams
    return (
        x.new_empty(*batch, x.shape[-1], targets),
        x.new_empty(*batch, targets if args.bias else 0),
        lams.new_empty(*batch, targets) if args.per_target else lams.new_empty(batch),
        lams.new_empty(*batch, lams.shape[-1], targets),
        x.new_empty(batch, dtype=torch.int32),
    )


def _check(args: RidgeCVArguments) -> None:
    rows, folded = args.x.shape[-2], args.kind == "folds"
    checks.one_of("ridge_cv", "kind", args.kind, ("loo", "gcv", "folds"))
    within("ridge_cv", "folds", args.folds, 2 if folded else 0, rows if folded else 0)
    within("ridge_cv", "the rows of x", rows, 2)
    within("ridge_cv", "the number of lams", args.lams.shape[-1], 1)
    same_dtype("ridge_cv", "y", args.y, "x", args.x.dtype)


RIDGE_CV = define_op(
    "ridge_cv(Tensor x, Tensor y, Tensor lams, str kind, int folds, bool per_target, bool bias) -> "
    "(Tensor weight, Tensor intercept, Tensor lam, Tensor scores, Tensor info)",
    arguments=RidgeCVArguments,
    python=_ridge_cv_python,
    fake=_ridge_cv_fake,
    shapes={"x": "full B D", "y": "full B K", "lams": "float64 L"},
    check=_check,
    composite=True,
)


@error_message("ridge_cv")
def _ridge_cv_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return regression_error("ridge_cv", info, context)
