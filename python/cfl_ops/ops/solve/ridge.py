"""ridge: ridge regression from data, its path, its cross-validation, and class-weighted systems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op
from cfl_ops._core.results import result_type
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.gram.gram import GRAM
from cfl_ops.ops.solve.codes import BAD_PENALTY
from cfl_ops.ops.solve.least_squares import lstsq
from cfl_ops.ops.solve.ridge_solve import RIDGE_SOLVE, ridge_solve
from cfl_ops.ops.solve.system import on_device

__all__ = ["RidgeCVResult", "class_ridge", "ridge", "ridge_cv", "ridge_path"]

WIDE = torch.float64
# ridge_cv works off its targets in runs, whatever their number: runs of moments in float64, and within each
# of them runs of predictions, which pass through the second-level cache several times.
MOMENT_BYTES = 32 << 20
PREDICTION_BYTES = 4 << 20


# --- data ---------------------------------------------------------------------------------------------------


def _check_xy(op: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """X and y in their common dtype (at least float32) and with their common batch shape."""
    checks.floating(op, "x", x, 2)
    checks.floating(op, "y", y, 2)
    checks.size(op, "y", y, -2, x.shape[-2], "the rows of x")
    checks.same_device(op, "x", x, y=y)
    batch = checks.broadcastable(op, x=x.shape[:-2], y=y.shape[:-2])
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    return x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])


def _output_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, y.dtype)


def _moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """X^T X and X^T Y in float64."""
    moments = GRAM(x, y, None, False, 0, WIDE)
    return moments[0], moments[1]


def _centred(x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """X with its column means taken away, and the means in float64 (zero without a bias).

    What the rounded mean leaves behind is no larger than rounding of x - mean itself.
    """
    if not bias or x.shape[-2] == 0:
        return x, x.new_zeros(*x.shape[:-2], 1, x.shape[-1], dtype=WIDE)
    mean = x.mean(-2, keepdim=True, dtype=WIDE)
    return (x.to(WIDE) - mean).to(x.dtype), mean


def _intercept(weight: Tensor, x_mean: Tensor, y_mean: Tensor) -> Tensor:
    return (y_mean - x_mean @ weight.to(WIDE)).squeeze(-2)


def _penalties(op: str, lams: Any, device: torch.device) -> Tensor:
    """The penalties of a path as a 1-d float64 tensor."""
    values = torch.as_tensor(lams, dtype=WIDE, device=device)
    if values.ndim != 1 or values.numel() == 0:
        raise ValueError(
            f"cfl_ops.{op}: lams must be a sequence of at least one number, but got shape {tuple(values.shape)}"
        )
    if not torch.compiler.is_compiling() and not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError(f"cfl_ops.{op}: lams must be finite and not negative, but got {values.tolist()}")
    return values


# --- ridge and ridge_path -----------------------------------------------------------------------------------


def _fit(x: Tensor, y: Tensor, lam: float | Tensor) -> Tensor:
    """(X^T X + lam I)^-1 X^T Y through the smaller side, in float64; the minimum-norm fit where lam is 0."""
    if not isinstance(lam, Tensor) and lam == 0:
        return lstsq(x, y).to(WIDE)
    if x.shape[-2] >= x.shape[-1]:
        gram, cross = _moments(x, y)
        return ridge_solve(gram, cross, lam)
    gram = GRAM(x.mT, None, None, False, 0, WIDE)[0]
    return x.mT.to(WIDE) @ ridge_solve(gram, y.to(WIDE), lam)


def ridge(x: Tensor, y: Tensor, lam: float | Tensor, *, bias: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    r"""Ridge regression from data, in scikit-learn's convention.

    .. math:: \min_W \|Y - X W\|_F^2 + \lambda \|W\|_F^2, \quad W = (X^T X + \lambda I)^{-1} X^T Y

    (Closed-Form Last Layer Optimization, Eq. 1-2, transposed and in sum convention.) The Gram matrix of the
    smaller side is accumulated and factored in float64, so that float32 data give float64's answer.

    Args:
        x: ``(..., B, D)``.
        y: ``(..., B, K)``.
        lam: a number, or a tensor that is 0-d or of the batch shape; not negative. The number 0 gives the
            minimum-norm least-squares fit (:func:`lstsq`); a tensor that holds 0 needs a full column rank.
        bias: also fit an intercept, which is not penalised.

    Returns:
        The weight ``(..., D, K)``, or ``(weight, intercept)`` with intercept ``(..., K)``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or lam is negative, NaN or Inf.
        torch.linalg.LinAlgError: ``x`` has NaN or Inf, or the system is singular; names the batch index.

    Differentiable (twice). Costs ``B D^2 / 2 + B D K + D^3 / 3`` multiply-adds for ``B >= D``.

    Example:
        >>> import torch, cfl_ops
        >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [3.0], [5.0]])
        >>> cfl_ops.ridge(x, y, 2.0, bias=True)
        (tensor([[1.]]), tensor([2.]))
    """
    wide_x, wide_y = _check_xy("ridge", x, y)
    penalty = (
        lam if not isinstance(lam, Tensor) and lam == 0 else checks.coefficient("ridge", "lam", lam, x.device)
    )
    xc, x_mean = _centred(wide_x, bias)
    yc, y_mean = _centred(wide_y, bias)
    weight = _fit(xc, yc, penalty)
    dtype = _output_dtype(x, y)
    if not bias:
        return weight.to(dtype)
    return weight.to(dtype), _intercept(weight, x_mean, y_mean).to(dtype)


def _check_finite(op: str, gram: Tensor) -> None:
    bad = ~gram.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    check_info(op, bad.to(torch.int32), [gram], [gram])


def _explain(op: str, info: Tensor) -> Exception:
    error: Exception = LinAlgError(f"cfl_ops.{op}: {first_failure(info)[2]}x or y has NaN or Inf")
    return error


@error_message("ridge_path")
def _explain_ridge_path(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return _explain("ridge_path", info)


@error_message("ridge_cv")
def _explain_ridge_cv(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return _explain("ridge_cv", info)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues without the negative ones of rounding, and eigenvectors."""
    values, vectors = torch.linalg.eigh(gram)
    floor = values[..., -1:].abs() * (gram.shape[-1] * torch.finfo(WIDE).eps)
    return torch.where(values > floor, values, 0.0), vectors


def _shrinkage(values: Tensor, lam: Tensor) -> Tensor:
    """1 / (values + lam), and 0 where both are: the minimum-norm limit."""
    total = values + lam
    return torch.where(total > 0, 1 / torch.where(total > 0, total, 1.0), 0.0)


class _Whole:
    """The fit to all rows, for any targets, from the eigenbasis of the smaller Gram matrix of X.

    The Gram matrix comes with the first :meth:`moments`, and is decomposed once, when that is first needed.
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.dual = x, x.shape[-2] < x.shape[-1]
        self.gram: Tensor | None = None
        self._eigen: tuple[Tensor, Tensor, Tensor] | None = None

    def moments(self, y: Tensor) -> Tensor | None:
        """X^T Y in float64; None where the rows are the smaller side. The Gram matrix is kept with it."""
        if self.dual:
            if self.gram is None:
                self.gram = GRAM(self.x.mT, None, None, False, 0, WIDE)[0]
            return None
        self.gram, cross = _moments(self.x, y)
        return cross

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues, eigenvectors of the smaller side, and the basis of the weights."""
        if self._eigen is None:
            assert self.gram is not None
            values, vectors = _eigh(self.gram)
            basis = vectors
            if self.dual:  # a direction without length in the rows has none in the columns
                basis = torch.where(values.unsqueeze(-2) > 0, self.x.mT.to(WIDE) @ vectors, 0.0)
            self._eigen = values, vectors, basis
        return self._eigen

    def rotate(self, y: Tensor, cross: Tensor | None) -> Tensor:
        """The right sides of the targets y in the eigenbasis."""
        return self.eigen()[1].mT @ (y.to(WIDE) if cross is None else cross)

    def weight(self, y: Tensor, cross: Tensor | None, lam: Tensor) -> Tensor:
        """(D, K) at one penalty, or one for each target."""
        if cross is not None and self.gram is not None and self._eigen is None and lam.ndim == 0 and lam > 0:
            return ridge_solve(self.gram, cross, lam)  # a tenth of the eigendecomposition's work
        values, _, basis = self.eigen()
        total, right = values.unsqueeze(-1) + lam, self.rotate(y, cross)
        inner = torch.where(total > 0, right / torch.where(total > 0, total, 1.0), 0.0)
        return (basis.to(y.dtype) @ inner.to(y.dtype)).to(WIDE)


def ridge_path(x: Tensor, y: Tensor, lams: Sequence[float] | Tensor, *, bias: bool = False) -> Any:
    r"""Ridge regression at many penalties for one eigendecomposition.

    .. math:: W_\lambda = V (\Lambda + \lambda I)^{-1} V^T X^T Y, \quad X^T X = V \Lambda V^T

    Args:
        x: ``(..., B, D)``.
        y: ``(..., B, K)``.
        lams: L numbers, or a 1-d tensor, not negative; 0 gives the minimum-norm fit.
        bias: also fit an intercept, which is not penalised.

    Returns:
        The weights ``(L, ..., D, K)``, or ``(weights, intercepts)`` with intercepts ``(L, ..., K)``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or one of lams is negative, NaN or Inf.
        torch.linalg.LinAlgError: ``x`` has NaN or Inf.

    Differentiable (twice) where the eigenvalues of ``X^T X`` are distinct. Costs ``B D^2 / 2`` and about
    ``9 D^3`` multiply-adds once and ``D^2 K`` for each penalty.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.ridge_path(torch.eye(2), torch.ones(2, 1), [0.0, 1.0]).squeeze(-1)
        tensor([[1.0000, 1.0000],
                [0.5000, 0.5000]])
    """
    wide_x, wide_y = _check_xy("ridge_path", x, y)
    penalties = _penalties("ridge_path", lams, x.device)
    xc, x_mean = _centred(wide_x, bias)
    yc, y_mean = _centred(wide_y, bias)
    whole = _Whole(xc)
    cross = whole.moments(yc)
    assert whole.gram is not None
    _check_finite("ridge_path", whole.gram)
    values, _, basis = whole.eigen()
    rotated = whole.rotate(yc, cross)
    weights = torch.stack(
        [basis @ (_shrinkage(values, lam).unsqueeze(-1) * rotated) for lam in penalties.unbind()]
    )
    dtype = _output_dtype(x, y)
    if not bias:
        return weights.to(dtype)
    return weights.to(dtype), _intercept(weights, x_mean, y_mean).to(dtype)


# --- ridge_cv -----------------------------------------------------------------------------------------------


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


def _chunks(length: int, targets: int, itemsize: int, limit: int) -> list[slice]:
    """Runs of targets of which ``length`` numbers each stay within ``limit`` bytes."""
    size = max(64, limit // max(1, length * itemsize))
    return [slice(begin, begin + size) for begin in range(0, targets, size)]


class _Rows:
    """Leave-one-out or generalised cross-validation from one eigendecomposition.

    With U = X V Lambda^-1/2 and h_i(lam) = sum_j U_ij^2 Lambda_j / (Lambda_j + lam), the row left out has
    the residual r_i / (1 - h_i); a free intercept adds 1 / B to h_i.
    """

    def __init__(self, whole: _Whole, lams: Tensor, bias: bool, kind: str) -> None:
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
            root = values.sqrt()
            self.to_left = torch.where(root > 0, 1 / torch.where(root > 0, root, 1.0), 0.0)
            left, weight_of = x @ (vectors * self.to_left).to(dtype), (values > 0).to(WIDE)
        squares = left.to(WIDE).square() * weight_of
        self.keep = [values * _shrinkage(values, lam) for lam in self.lams.unbind()]
        self.scales = []
        for factor in self.keep:
            leverage = squares @ factor + (1 / rows if self.bias else 0.0)
            if self.kind == "gcv":
                leverage = leverage.mean().expand(rows)
            # A row that fits itself alone tells nothing; its residual counts as it stands.
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
        for part in _chunks(y.shape[0], y.shape[-1], y.element_size(), PREDICTION_BYTES):
            own, target = left_cross[:, part], y[:, part]
            for index, (factor, scale) in enumerate(zip(self.keep, self.scales, strict=True)):
                residual = torch.addmm(target, self.left, (factor.unsqueeze(-1) * own).to(y.dtype), alpha=-1)
                scores[index, part] = _weighted_mean(residual.square_(), scale)
        return cross

    def shared(self, scores: Tensor) -> Tensor:
        """(L), by which one penalty for all targets is chosen."""
        return scores.mean(1)


def _weighted_mean(squares: Tensor, weight: Tensor) -> Tensor:
    """The mean over rows of squares times weight, where no weight counts on a square of 0."""
    total = weight @ squares
    if bool(weight.isinf().any()):
        total = torch.where(squares == 0, 0.0, squares * weight.unsqueeze(-1)).sum(0)
    return total.to(WIDE) / squares.shape[0]


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
    zero = torch.zeros(y.shape[-1], dtype=WIDE, device=y.device)
    if count > width + width // 4:
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
    rotated = (rows.to(WIDE) - means[0]) @ vectors
    return _Held(rotated.to(dtype), (y.to(WIDE) - means[1]).to(dtype), zero)


class _Folds:
    """K folds of consecutive rows: the moments of the others are all moments less the fold's own."""

    def __init__(self, whole: _Whole, lams: Tensor, bias: bool, folds: int) -> None:
        self.whole, self.lams, self.bias = whole, lams, bias
        self.pieces = list(pairwise(_fold_bounds(whole.x.shape[-2], folds)))
        self.eigen: list[tuple[Tensor, Tensor]] = []
        # For each penalty the sum over targets of the error relative to each fold's variance, that is 1 - R^2.
        self.relative = torch.zeros(lams.numel(), dtype=WIDE, device=whole.x.device)

    def shared(self, scores: Tensor) -> Tensor:
        """(L), by which one penalty for all targets is chosen: by the mean R^2, as scikit-learn does."""
        return self.relative

    def score(self, y: Tensor, scores: Tensor) -> Tensor | None:
        """Writes the scores (L, K) of the targets y and returns X^T Y, if the columns are the smaller side."""
        x, bias = self.whole.x, self.bias
        rows, dtype = x.shape[-2], x.dtype
        moments = []
        for begin, end in self.pieces:
            gram, cross, y_sum, squares, *_ = GRAM(x[begin:end], y[begin:end], None, False, 0, WIDE)
            x_sum = x[begin:end].sum(-2, dtype=WIDE) if bias else y_sum.new_zeros(())
            moments.append((gram, cross, squares, x_sum, y_sum))
        gram, cross, _, x_sum, y_sum = (torch.stack(parts).sum(0) for parts in zip(*moments, strict=True))
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
                self.eigen.append(_eigh(train_gram))
            values, vectors = self.eigen[fold]
            left_out = _held(x[begin:end], y[begin:end], vectors, own, means)
            # In the working precision, scaled so that nothing overflows that the weights would not.
            top = values[-1:].clamp_min(torch.finfo(WIDE).tiny)
            scaled_cross = (vectors.mT @ train_cross / top).to(dtype)
            shrinkage = [
                (top * _shrinkage(values, lam)).to(dtype).unsqueeze(-1) for lam in self.lams.unbind()
            ]
            variance = (own_squares / held - (own_y_sum / held).square()).clamp_min(0)
            # What rounding leaves of the variance of a constant target is none.
            variance = torch.where(variance > 1e-14 * (own_squares / held), variance, 0.0)
            length = left_out.design.shape[0]
            one = torch.ones(length, dtype=dtype, device=x.device)
            for part in _chunks(length, y.shape[-1], y.element_size(), PREDICTION_BYTES):
                target, rest = left_out.target[:, part], left_out.rest[part]
                residual = torch.empty_like(target)
                for index, factor in enumerate(shrinkage):
                    torch.mm(left_out.design, factor * scaled_cross[:, part], out=residual)
                    residual.sub_(target).square_()
                    error = ((one @ residual).to(WIDE) + rest) / held
                    scores[index, part] += error * (held / rows)
                    # As in scikit-learn's r2_score, a constant target scores 0 (or 1, if it is met).
                    share = torch.where(variance[part] > 0, error / variance[part], (error > 0).to(WIDE))
                    self.relative[index] += share.sum()
        if self.whole.dual:
            return self.whole.moments(y)
        self.whole.gram = gram
        return cross


def _all_finite(*tensors: Tensor) -> bool:
    """One pass over each: NaN and Inf show in the extremes."""
    ends = [end for value in tensors if value.numel() for end in torch.aminmax(value)]
    return bool(torch.stack(ends).isfinite().all()) if ends else True


def _fold_bounds(rows: int, folds: int) -> list[int]:
    """The first rows % folds folds take one row more, as in scikit-learn's KFold."""
    bounds = [0]
    for fold in range(folds):
        bounds.append(bounds[-1] + rows // folds + (fold < rows % folds))
    return bounds


def _ridge_cv_one(
    x: Tensor, y: Tensor, lams: Tensor, kind: str, folds: int, per_target: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight, intercept, the chosen penalties, scores, info."""
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
    xc, x_mean = _centred(x, bias)
    # Squares of the residuals shall neither overflow nor vanish.
    largest = max(map(abs, torch.stack(torch.aminmax(y)).tolist())) if y.numel() else 1.0
    unit = 1.0 if largest == 0 or 1e-12 < largest < 1e12 else 2.0 ** math.frexp(largest)[1]
    scores = lams.new_empty(lams.numel(), targets)
    weight = x.new_empty(width, targets)
    intercept = x.new_empty(targets if bias else 0)
    lam = lams.new_empty(targets if per_target else 0)
    whole = _Whole(xc)
    validation = _Folds(whole, lams, bias, folds) if folds else _Rows(whole, lams, bias, kind)

    def scaled_targets(part: slice) -> tuple[Tensor, Tensor]:
        yc, y_mean = _centred(y[:, part], bias)
        return (yc if unit == 1.0 else (yc.to(WIDE) / unit).to(yc.dtype)), y_mean

    def fit(part: slice, target: Tensor, y_mean: Tensor, cross: Tensor | None, penalty: Tensor) -> None:
        own = whole.weight(target, cross, penalty) * unit
        weight[:, part] = own.to(x.dtype)
        if bias:
            intercept[part] = _intercept(own, x_mean, y_mean).to(x.dtype)

    parts = _chunks(min(rows, width), targets, 8, MOMENT_BYTES)
    for part in parts:
        target, y_mean = scaled_targets(part)
        cross = validation.score(target, scores[:, part])
        if per_target:
            lam[part] = lams[scores[:, part].nan_to_num(nan=torch.inf).argmin(0)]
            fit(part, target, y_mean, cross, lam[part])
    if not per_target:
        lam = lams[validation.shared(scores).nan_to_num(nan=torch.inf).argmin(0)]
        for part in parts:
            if len(parts) > 1:
                target, y_mean = scaled_targets(part)
                cross = whole.moments(target)
            fit(part, target, y_mean, cross, lam)
    info = torch.zeros((), dtype=torch.int32, device=x.device)
    return weight, intercept, lam, scores * (unit * unit), info


def _ridge_cv_python(
    x: Tensor, y: Tensor, lams: Tensor, kind: str, folds: int, per_target: bool, bias: bool
) -> tuple[Tensor, ...]:
    batch = x.shape[:-2]
    if not batch:
        return tuple(value.clone() for value in _ridge_cv_one(x, y, lams, kind, folds, per_target, bias))
    pairs = zip(x.flatten(0, -3), y.flatten(0, -3), lams.flatten(0, -2), strict=True)
    each = [_ridge_cv_one(*pair, kind, folds, per_target, bias) for pair in pairs]
    return tuple(torch.stack(values).unflatten(0, batch) for values in zip(*each, strict=True))


def _ridge_cv_fake(
    x: Tensor, y: Tensor, lams: Tensor, kind: str, folds: int, per_target: bool, bias: bool
) -> tuple[Tensor, ...]:
    batch, targets = x.shape[:-2], y.shape[-1]
    return (
        x.new_empty(*batch, x.shape[-1], targets),
        x.new_empty(*batch, targets if bias else 0),
        lams.new_empty(*batch, targets) if per_target else lams.new_empty(batch),
        lams.new_empty(*batch, lams.shape[-1], targets),
        x.new_empty(batch, dtype=torch.int32),
    )


RIDGE_CV = define_op(
    "ridge_cv(Tensor x, Tensor y, Tensor lams, str kind, int folds, bool per_target, bool bias) -> "
    "(Tensor weight, Tensor intercept, Tensor lam, Tensor scores, Tensor info)",
    python=_ridge_cv_python,
    fake=_ridge_cv_fake,
    core_dims=(2, 2, 1, None, None, None, None),
    composite=True,
)


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
    checks.floating("ridge_cv", "x", x, 2)
    checks.floating("ridge_cv", "y", y, 2)
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(
            f"cfl_ops.ridge_cv: x and y must have 2 dimensions, but got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    wide_x, wide_y = (value.detach() for value in _check_xy("ridge_cv", x, y))
    rows = x.shape[-2]
    penalties = _penalties("ridge_cv", lams, x.device)
    folds = 0
    if isinstance(cv, int) and not isinstance(cv, bool):
        folds = cv
        if not 2 <= folds <= rows:
            raise ValueError(
                f"cfl_ops.ridge_cv: cv must be from 2 to the number of rows ({rows}), but got {cv}"
            )
    elif cv not in ("loo", "gcv"):
        raise ValueError(f"cfl_ops.ridge_cv: cv must be 'loo', 'gcv' or a number of folds, but got {cv!r}")
    if rows < 2:
        raise ValueError(f"cfl_ops.ridge_cv: x must have at least 2 rows, but got {rows}")
    weight, intercept, lam, scores, info = RIDGE_CV(
        wide_x, wide_y, penalties, "folds" if folds else str(cv), folds, per_target, bias
    )
    check_info("ridge_cv", info, [weight, scores], [wide_x])
    dtype = _output_dtype(x, y)
    return RidgeCVResult(weight.to(dtype), intercept.to(dtype) if bias else None, lam, scores)


# --- class_ridge --------------------------------------------------------------------------------------------


BAD_CLASS = -2


def _class_solve_one(x: Tensor, y: Tensor, cross: Tensor, lam: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    wide, (width, classes) = x.to(WIDE), cross.shape
    outside = (y < 0) | (y >= classes)
    if bool(outside.any()):
        info = torch.full((), BAD_CLASS, dtype=torch.int32, device=x.device)
        return wide.new_full((width, classes), torch.nan), info
    gram = GRAM(wide, None, None, False, 0, WIDE)[0]
    right = cross.to(WIDE)
    if kappa == 1.0:
        whole, info = RIDGE_SOLVE(gram, right, lam, None)
        return whole, info

    # G^-1 of all right sides and all rows of the small classes, in one solve.
    counts = torch.bincount(y, minlength=classes).tolist()
    members = wide[torch.argsort(y, stable=True)].split(counts)
    small = [k for k, count in enumerate(counts) if 0 < count <= width]
    stacked = [right, *(members[k].mT for k in small)]
    solved, info = RIDGE_SOLVE(gram, torch.cat(stacked, dim=-1), lam, None)
    base, *corrections = solved.split([classes, *(counts[k] for k in small)], dim=-1)
    columns, zero = list(base.unbind(-1)), torch.zeros((), dtype=WIDE)
    for k, u in zip(small, corrections, strict=True):
        rows, z = members[k], columns[k].unsqueeze(-1)
        # (G + c P^T P)^-1 q = z - U (I + c P U)^-1 c P z with c = kappa - 1. The inner system is positive
        # definite for kappa < 1 too: the eigenvalues of P G^-1 P^T are at most 1.
        inner = torch.eye(counts[k], dtype=WIDE, device=x.device) + (kappa - 1) * (rows @ u)
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


def _class_solve_python(
    x: Tensor, y: Tensor, cross: Tensor, lam: Tensor, kappa: float
) -> tuple[Tensor, Tensor]:
    """w_k = (X^T diag(m_k^2) X + lam I)^-1 q_k, m_k^2 = kappa in the rows of class k and 1 elsewhere."""
    batch = x.shape[:-2]
    lam = on_device(lam, x)
    if not batch:
        weight, info = _class_solve_one(x, y, cross, lam, kappa)
        return weight.to(cross.dtype), info
    lams = lam.expand(batch).reshape(-1)
    flat = zip(x.flatten(0, -3), y.flatten(0, -2), cross.flatten(0, -3), lams, strict=True)
    each = [_class_solve_one(*item, kappa) for item in flat]
    weights, infos = (torch.stack(values).unflatten(0, batch) for values in zip(*each, strict=True))
    return weights.to(cross.dtype), infos


def _class_solve_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], inputs[3], output[0])
    ctx.kappa, ctx.cross_dtype = inputs[4], inputs[2].dtype
    if isinstance(ctx, torch.autograd.function.FunctionCtx):
        ctx.mark_non_differentiable(output[1])


def _class_solve_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    """With z_k = S_k^-1 wbar_k: qbar = z, and from Sbar_k = -z_k w_k^T
    Xbar = -((M^2 * X Z) W^T + (M^2 * X W) Z^T), lambar = -<Z, W>.
    """
    if grad is None:
        return None, None, None, None, None
    x, y, lam, weight = ctx.saved_tensors
    z, _ = CLASS_SOLVE(x, y, grad.to(ctx.cross_dtype), lam, ctx.kappa)
    wide, w, wide_z = x.to(WIDE), weight.to(WIDE), z.to(WIDE)
    own = y.unsqueeze(-1) == torch.arange(weight.shape[-1], device=y.device)
    square = 1 + (ctx.kappa - 1) * own.to(WIDE)
    grad_x = -((square * (wide @ wide_z)) @ w.mT + (square * (wide @ w)) @ wide_z.mT)
    each = -(wide_z * w).sum((-2, -1))
    grad_lam = (each if lam.ndim else each.sum()).to(lam.device, lam.dtype)
    return grad_x.to(x.dtype), None, z, grad_lam, None


CLASS_SOLVE = define_op(
    "class_solve(Tensor x, Tensor y, Tensor cross, Tensor lam, float kappa) -> (Tensor weight, Tensor info)",
    python=_class_solve_python,
    fake=lambda x, y, cross, lam, kappa: (
        cross.new_empty(cross.shape),
        x.new_empty(x.shape[:-2], dtype=torch.int32),
    ),
    core_dims=(2, 1, 2, 0, None),
    derivative=Derivative(_class_solve_setup_context, _class_solve_backward),
    composite=True,
)


@error_message("class_ridge")
def _explain_class_ridge(info: Tensor, context: Sequence[Tensor]) -> Exception:
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
    op = "class_ridge"
    checks.floating(op, "x", x, 2)
    checks.tensor(op, "y", y, 1)
    if x.ndim != 2 or y.ndim != 1:
        raise ValueError(
            f"cfl_ops.{op}: x must be (B, D) and y (B), but got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if y.dtype != torch.int64:
        raise TypeError(f"cfl_ops.{op}: y must be int64 class indices, but got {y.dtype}")
    checks.size(op, "y", y, 0, x.shape[0], "the rows of x")
    checks.same_device(op, "x", x, y=y, weight=weight)
    for name, value in (("kappa", kappa), ("scale", scale)):
        if not 0 < value < float("inf"):
            raise ValueError(f"cfl_ops.{op}: {name} must be positive and finite, but got {value}")
    pulled = isinstance(prox, Tensor) or prox != 0
    if pulled and weight is None:
        raise ValueError(f"cfl_ops.{op}: weight must be given where prox is not 0")
    if weight is not None and tuple(weight.shape) != (x.shape[-1], num_classes):
        raise ValueError(
            f"cfl_ops.{op}: weight must have shape {(x.shape[-1], num_classes)}, but got {tuple(weight.shape)}"
        )
    penalty, pull = (
        checks.coefficient(op, name, value, x.device) for name, value in (("lam", lam), ("prox", prox))
    )
    wide = x.to(WIDE)
    own = (y.unsqueeze(-1) == torch.arange(num_classes, device=y.device)).to(WIDE)
    cross = (kappa * scale) * (wide.mT @ own)
    total = penalty.to(x.device, WIDE)
    if pulled and weight is not None:
        total = total + pull.to(x.device, WIDE)
        cross = cross + pull.to(x.device, WIDE) * weight.to(WIDE)
    solved, info = CLASS_SOLVE(wide, y, cross, total, float(kappa))
    result: Tensor = solved.to(x.dtype)
    check_info(op, info, [result], [y, result.detach()])
    return result
