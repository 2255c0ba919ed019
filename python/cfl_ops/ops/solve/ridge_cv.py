"""ridge_cv: ridge regression with its penalty chosen by cross-validation, over rows or over folds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import same_dtype, within
from cfl_ops._core.failures import check_info, error_message
from cfl_ops._core.op import define_op
from cfl_ops._core.results import result_type
from cfl_ops.ops.gram.gram import plain_gram
from cfl_ops.ops.solve.eigen_ridge import EigenRidge, eigh, shrinkage
from cfl_ops.ops.solve.regression import (
    centred,
    check_data,
    check_penalties,
    intercept,
    regression_error,
    result_dtype,
)

__all__ = ["RidgeCVResult", "ridge_cv"]

# Targets are worked off in runs, whatever their number: runs of moments in float64, and within each of them runs
# of predictions, which pass through the second-level cache several times.
MOMENT_BYTES = 32 << 20
PREDICTION_BYTES = 4 << 20


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

    One eigendecomposition serves all penalties and targets ("loo" and "gcv"), or one for each fold, whose
    Gram matrix is the whole one less the fold's own. Targets are worked off in runs, so that memory beyond
    inputs, weights and scores stays bounded for any number of them.

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
        (L, K)``. Of equal scores the first of ``lams`` wins; a row that fits itself alone (leverage 1) makes
        leave-one-out infinite there.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or an option is not known.
        torch.linalg.LinAlgError: x or y has NaN or Inf.

    Not differentiable (a choice has no gradient): use :func:`ridge` at the chosen penalty. Costs ``B D^2 / 2 +
    9 D^3`` once and ``B D K`` multiply-adds for each penalty.

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
    xc, x_mean = centred(x, bias)
    # Squares of the residuals shall neither overflow nor vanish.
    largest = max(map(abs, torch.stack(torch.aminmax(y)).tolist())) if y.numel() else 1.0
    unit = 1.0 if largest == 0 or 1e-12 < largest < 1e12 else 2.0 ** min(math.frexp(largest)[1], 1023)
    scores = lams.new_empty(lams.numel(), targets)
    weight = x.new_empty(width, targets)
    intercepts = x.new_empty(targets if bias else 0)
    lam = lams.new_empty(targets if per_target else 0)
    whole = EigenRidge(xc)
    validation = KFold(whole, lams, bias, folds) if folds else LeaveOneOut(whole, lams, bias, kind)

    def scaled_targets(run: slice) -> tuple[Tensor, Tensor]:
        yc, y_mean = centred(y[:, run], bias)
        return (yc if unit == 1.0 else (yc.double() / unit).to(yc.dtype)), y_mean

    def fit(run: slice, target: Tensor, y_mean: Tensor, cross: Tensor | None, penalty: Tensor) -> None:
        own = whole.weight(target, cross, penalty) * unit
        weight[:, run] = own.to(x.dtype)
        if bias:
            intercepts[run] = intercept(own, x_mean, y_mean).to(x.dtype)

    runs = _runs(min(rows, width), targets, 8, MOMENT_BYTES)
    for run in runs:
        target, y_mean = scaled_targets(run)
        cross = validation.score(target, scores[:, run])
        if per_target:
            lam[run] = lams[scores[:, run].nan_to_num(nan=torch.inf).argmin(0)]
            fit(run, target, y_mean, cross, lam[run])
    if not per_target:
        lam = lams[validation.shared(scores).nan_to_num(nan=torch.inf).argmin(0)]
        for run in runs:
            if len(runs) > 1:
                target, y_mean = scaled_targets(run)
                cross = whole.moments(target)
            fit(run, target, y_mean, cross, lam)
    info = torch.zeros((), dtype=torch.int32, device=x.device)
    return weight, intercepts, lam, scores * (unit * unit), info


def _all_finite(*tensors: Tensor) -> bool:
    """One pass over each: NaN and Inf show in the extremes."""
    ends = [end for value in tensors if value.numel() for end in torch.aminmax(value)]
    return bool(torch.stack(ends).isfinite().all()) if ends else True


def _runs(length: int, targets: int, itemsize: int, limit: int) -> list[slice]:
    """Runs of targets of which ``length`` numbers each stay within ``limit`` bytes."""
    size = max(64, limit // max(1, length * itemsize))
    return [slice(begin, begin + size) for begin in range(0, targets, size)]


class LeaveOneOut:
    """Leave-one-out or generalised cross-validation from one eigendecomposition.

    With U = X V Lambda^-1/2 and h_i(lam) = sum_j U_ij^2 Lambda_j / (Lambda_j + lam), the row left out has
    the residual r_i / (1 - h_i); a free intercept adds 1 / B to h_i.
    """

    def __init__(self, whole: EigenRidge, lams: Tensor, bias: bool, kind: str) -> None:
        self.whole, self.lams, self.bias, self.kind = whole, lams, bias, kind
        self.left: Tensor | None = None

    def _prepare(self) -> Tensor:
        """U, and for each penalty the factors of its columns and the weights of the squared residuals."""
        x, rows, dtype = self.whole.x, self.whole.x.shape[-2], self.whole.x.dtype
        values, vectors, _ = self.whole.eigen()
        weight_of = torch.ones_like(values)
        if self.whole.dual:
            self.to_left, left = weight_of, vectors.to(dtype)
        else:
            singular = values.sqrt()
            self.to_left = torch.where(singular > 0, 1 / torch.where(singular > 0, singular, 1.0), 0.0)
            left, weight_of = x @ (vectors * self.to_left).to(dtype), (values > 0).double()
        squares = left.double().square() * weight_of
        self.keep = [values * shrinkage(values, lam) for lam in self.lams.unbind()]
        self.scales = []
        for factor in self.keep:
            leverage = squares @ factor + (1 / rows if self.bias else 0.0)
            if self.kind == "gcv":
                leverage = leverage.mean().expand(rows)
            # Leave-one-out is infinite where a row fits itself alone (leverage 1).
            room = 1 - leverage
            scale = torch.where(room > rows * torch.finfo(dtype).eps, 1 / room, torch.inf)
            self.scales.append(scale.square().to(dtype))
        return left

    def score(self, y: Tensor, scores: Tensor) -> Tensor | None:
        """Writes the scores (L, K) of the targets y and returns X^T Y, if the columns are the smaller side."""
        cross = self.whole.moments(y)
        if self.left is None:
            self.left = self._prepare()
        left_cross = self.to_left.unsqueeze(-1) * self.whole.rotate(y, cross)
        for run in _runs(y.shape[0], y.shape[-1], y.element_size(), PREDICTION_BYTES):
            own, target = left_cross[:, run], y[:, run]
            for index, (factor, scale) in enumerate(zip(self.keep, self.scales, strict=True)):
                residual = torch.addmm(target, self.left, (factor.unsqueeze(-1) * own).to(y.dtype), alpha=-1)
                scores[index, run] = _weighted_mean(residual.square_(), scale)
        return cross

    def shared(self, scores: Tensor) -> Tensor:
        """(L), by which one penalty for all targets is chosen."""
        return scores.mean(1)


def _weighted_mean(squares: Tensor, weight: Tensor) -> Tensor:
    """The mean over rows of squares times weight, where no weight counts on a square of 0."""
    total = weight @ squares
    if bool(weight.isinf().any()):
        total = torch.where(squares == 0, 0.0, squares * weight.unsqueeze(-1)).sum(0)
    return total.double() / squares.shape[0]


class KFold:
    """K folds of consecutive rows: the moments of the others are all moments less the fold's own."""

    def __init__(self, whole: EigenRidge, lams: Tensor, bias: bool, folds: int) -> None:
        self.whole, self.lams, self.bias = whole, lams, bias
        self.pieces = list(pairwise(_fold_bounds(whole.x.shape[-2], folds)))
        self.eigen: list[tuple[Tensor, Tensor]] = []
        # For each penalty the sum over targets of the error relative to each fold's variance, that is 1 - R^2.
        self.relative = torch.zeros(lams.numel(), dtype=torch.float64, device=whole.x.device)

    def shared(self, scores: Tensor) -> Tensor:
        """(L), by which one penalty for all targets is chosen: by the mean R^2, as scikit-learn does."""
        return self.relative

    def score(self, y: Tensor, scores: Tensor) -> Tensor | None:
        """Writes the scores (L, K) of the targets y and returns X^T Y, if the columns are the smaller side."""
        x, bias = self.whole.x, self.bias
        rows, dtype = x.shape[-2], x.dtype
        moments = []
        for begin, end in self.pieces:
            gram, cross, y_sum, squares, *_ = plain_gram(x[begin:end], y[begin:end], torch.float64)
            x_sum = x[begin:end].sum(-2, dtype=torch.float64) if bias else y_sum.new_zeros(())
            moments.append((gram, cross, squares, x_sum, y_sum))
        gram, cross, _, x_sum, y_sum = (torch.stack(values).sum(0) for values in zip(*moments, strict=True))
        scores.zero_()
        for fold, ((begin, end), own) in enumerate(zip(self.pieces, moments, strict=True)):
            own_gram, own_cross, own_squares, own_x_sum, own_y_sum = own
            count, held = rows - (end - begin), end - begin
            train_cross = cross - own_cross
            means = None
            if bias:
                means = (x_sum - own_x_sum) / count, (y_sum - own_y_sum) / count
                train_cross -= count * torch.outer(*means)
            if fold == len(self.eigen):
                train_gram = gram - own_gram
                if means is not None:
                    train_gram -= count * torch.outer(means[0], means[0])
                self.eigen.append(eigh(train_gram))
            values, vectors = self.eigen[fold]
            left_out = _held(x[begin:end], y[begin:end], vectors, own, means)
            # In the working precision, scaled so that nothing overflows that the weights would not.
            top = (
                values[-1:].sum().clamp_min(torch.finfo(torch.float64).tiny)
            )  # without columns there is none
            scaled_cross = (vectors.mT @ train_cross / top).to(dtype)
            factors = [(top * shrinkage(values, lam)).to(dtype).unsqueeze(-1) for lam in self.lams.unbind()]
            variance = (own_squares / held - (own_y_sum / held).square()).clamp_min(0)
            # What rounding leaves of the variance of a constant target is none.
            variance = torch.where(variance > 1e-14 * (own_squares / held), variance, 0.0)
            length = left_out.design.shape[0]
            one = torch.ones(length, dtype=dtype, device=x.device)
            for run in _runs(length, y.shape[-1], y.element_size(), PREDICTION_BYTES):
                target, rest = left_out.target[:, run], left_out.rest[run]
                residual = torch.empty_like(target)
                for index, factor in enumerate(factors):
                    torch.mm(left_out.design, factor * scaled_cross[:, run], out=residual)
                    residual.sub_(target).square_()
                    error = ((one @ residual).double() + rest) / held
                    scores[index, run] += error * (held / rows)
                    # As in scikit-learn's r2_score, a constant target scores 0 (or 1, if it is met).
                    share = torch.where(variance[run] > 0, error / variance[run], (error > 0).double())
                    self.relative[index] += share.sum()
        if self.whole.dual:
            return self.whole.moments(y)
        self.whole.gram = gram
        return cross


def _fold_bounds(rows: int, folds: int) -> list[int]:
    """The first rows % folds folds take one row more, as in scikit-learn's KFold."""
    bounds = [0]
    for fold in range(folds):
        bounds.append(bounds[-1] + rows // folds + (fold < rows % folds))
    return bounds


class _Held(NamedTuple):
    """A fold left out, as the regression of ``target`` on ``design`` plus what no design reaches.

    With ``own = H^T H`` of the fold's rows H factored as ``C^T C``, ``|y - H w|^2 = |z - C w|^2 + |y|^2 - |z|^2``
    where ``z = C^-T H^T y``: D rows instead of the fold's. The last terms do not depend on w.
    """

    design: Tensor
    target: Tensor
    rest: Tensor
    """(K) float64"""


def _held(
    rows: Tensor, y: Tensor, vectors: Tensor, moments: tuple[Tensor, ...], means: tuple[Tensor, Tensor] | None
) -> _Held:
    """The fold in the coordinates of ``vectors``, less the means of the training rows."""
    gram, cross, squares, x_sum, y_sum = moments
    count, width, dtype = rows.shape[0], rows.shape[1], rows.dtype
    zero = torch.zeros(y.shape[-1], dtype=torch.float64, device=y.device)
    if count > width + width // 4 and width:
        if means is not None:
            x_mean, y_mean = means
            gram = gram - torch.outer(x_sum, x_mean) - torch.outer(x_mean, x_sum - count * x_mean)
            cross = cross - torch.outer(x_sum, y_mean) - torch.outer(x_mean, y_sum - count * y_mean)
            squares = squares - 2 * y_mean * y_sum + count * y_mean.square()
        factor, info = torch.linalg.cholesky_ex(gram)
        pivots = factor.diagonal()
        # A factor of an ill-conditioned matrix would lose the digits of z.
        if int(info) == 0 and float(pivots.min()) > 1e-5 * float(pivots.max()):
            z = torch.linalg.solve_triangular(factor, cross, upper=False)
            rest = (squares - z.square().sum(0)).clamp_min(0)
            return _Held((factor.mT @ vectors).to(dtype), z.to(dtype), rest)
    if means is None:
        return _Held(rows @ vectors.to(dtype), y, zero)
    rotated = (rows.double() - means[0]) @ vectors
    return _Held(rotated.to(dtype), (y.double() - means[1]).to(dtype), zero)


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
