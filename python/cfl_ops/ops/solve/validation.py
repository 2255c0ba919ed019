"""How ridge_cv scores penalties: by leave-one-out or generalised cross-validation, or by folds."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops.ops.gram.gram import plain_gram
from cfl_ops.ops.solve.eigen_ridge import EPS, GRAM_LIMIT, EigenRidge, shrinkage
from cfl_ops.ops.solve.regression import centred, column_means, promoted

PREDICTION_BYTES = 4 << 20
"""Runs of predictions, which pass through the second-level cache several times."""

ROOM = 2.0**-6
"""How near a row may come to fit itself alone (1 less its leverage) until float32, or a Gram matrix, is not enough."""
SEEN = 1e-8
"""Scores below this share of the targets' mean square may be rounding, of float32 or of moments."""


def runs_of(length: int, targets: int, itemsize: int, limit: int) -> list[slice]:
    """Runs of targets of which ``length`` numbers each stay within ``limit`` bytes."""
    size = max(64, limit // max(1, length * itemsize))
    return [slice(begin, begin + size) for begin in range(0, targets, size)]


class LeaveOneOut:
    """Leave-one-out or generalised cross-validation from one singular value decomposition."""

    def __init__(self, whole: EigenRidge, lams: Tensor, kind: str) -> None:
        self.whole, self.lams, self.kind = whole, lams, kind
        self._quick: Residuals | None = None
        self._exact: Residuals | None = None

    def score(self, y: Tensor, scores: Tensor) -> None:
        """Write the scores (L, K) of the centred targets y."""
        quick = self._quick = self._quick or self._choose(y)
        quick.score(y, scores)
        if quick.dtype == torch.float64:
            return
        squares = y.square().sum(0) if self.whole.squares is None else self.whole.squares
        if (again := _doubtful(squares / y.shape[0], scores)).numel():
            scores[:, again] = self.exact().score(y[:, again], scores[:, again])

    def _choose(self, y: Tensor) -> Residuals:
        """In the working precision, where every row has room enough."""
        dtype = torch.float64 if self.whole.x.dtype == torch.float64 else torch.float32
        self.whole.coordinates(y)
        quick = Residuals(self.whole, self.lams, self.kind, dtype)
        if quick.room < ROOM and quick.moments:
            quick = Residuals(self.whole.to_exact(), self.lams, self.kind, dtype)
        return quick if quick.room >= ROOM else self.exact()

    def exact(self) -> Residuals:
        """All in float64."""
        self._exact = self._exact or Residuals(self.whole.to_exact(), self.lams, self.kind, torch.float64)
        return self._exact

    def shared(self, scores: Tensor) -> Tensor:
        """(L), by which one penalty for all targets is chosen."""
        return scores.mean(1)


def _doubtful(squares: Tensor, scores: Tensor) -> Tensor:
    """The targets whose scores may be little more than rounding: their indices."""
    return ((scores.amin(0) < SEEN * squares) & (squares > 0)).nonzero().squeeze(-1)


class Residuals:
    """What a row's target differs by from the fit to the other rows, at each penalty.

    It is e_i / a_i with e = A y, a = diag A and A = I - X (X^T X + lam I)^-1 X^T = P + U diag(c) U^T, where
    X = U S V^T, P projects on what neither U nor the constant vector reaches, and c = lam / (S^2 + lam). All terms of
    a are positive: nothing cancels in it, nor in e where P y comes from the rows of P themselves. Where no row is near
    to fit itself alone, y - U (1 - c) U^T y and 1 - h_i, which take less, are as good.

    At lam 0 it is the limit, the minimum-norm fit to the other rows. Where P has no part in a row (its features are
    independent of all other rows'), that is the ratio of the parts of U, to which lam is a common factor.
    """

    def __init__(self, whole: EigenRidge, lams: Tensor, kind: str, dtype: torch.dtype) -> None:
        values = whole.parts()[0]
        self.whole, self.dtype = whole, dtype
        self.moments = whole.by_moments
        self.full = not self.moments and len(values) == whole.free
        """Whether U, with the constant vector, has all directions: then P is zero."""
        self.left = whole.left(dtype if self.moments else torch.float64)
        rows, squares = self.left.shape[0], self.left.double().square()
        self.own = torch.empty(0, dtype=torch.int64, device=squares.device)
        """The rows whose P y is made from their rows of P."""
        self.projected = squares[:, :0]
        outside = 1 - squares.sum(1) - (1 / rows if whole.bias else 0.0)
        if self.full:
            outside = torch.zeros_like(outside)
        elif not self.moments:
            outside = self._project(outside)
        self.factors, self.scales, self.masks = [], [], []
        self.room = math.inf
        for lam in lams.tolist():
            factor, mask = _complement(values, lam, self.full), None
            if self.moments:
                keep = values * shrinkage(values, lams.new_tensor(lam))
                room, factor = 1 - squares @ keep - (1 / rows if whole.bias else 0.0), -keep
            elif lam > 0 or self.full:
                room = outside + squares @ factor
            else:
                mask = (outside == 0).double()
                room = outside + mask * (squares @ factor)
            if kind == "gcv":
                room, mask = room.mean().expand(rows), None if mask is None else torch.zeros_like(mask)
                if mask is not None:
                    room = outside.mean().expand(rows)
            self.room = min(self.room, float(room.min()))
            self.factors.append(factor.to(dtype).unsqueeze(-1))
            self.scales.append(torch.where(room > 0, 1 / room, torch.inf).square().to(dtype))
            self.masks.append(None if mask is None else mask.to(dtype).unsqueeze(-1))
        self.work = self.left.to(dtype)

    def _project(self, outside: Tensor) -> Tensor:
        """The diagonal of P, for rows near 0 as the squared length of their rows of P."""
        rows = self.left.shape[0]
        self.own = (outside < ROOM).nonzero().squeeze(-1)
        span = self.left
        if self.whole.bias:
            span = torch.cat([span, span.new_full((rows, 1), rows**-0.5)], dim=1)
        projected = torch.zeros(rows, len(self.own), dtype=torch.float64, device=span.device)
        projected[self.own, torch.arange(len(self.own), device=span.device)] = 1
        for _ in range(2):  # the second pass takes away what rounding left of the first
            projected -= span @ (span.mT @ projected)
        length = projected.square().sum(0)
        length = torch.where(length > (64 * rows * EPS) ** 2, length, 0.0)
        self.projected = torch.where(length > 0, projected, 0.0)
        outside[self.own] = length
        return outside

    def score(self, y: Tensor, scores: Tensor) -> Tensor:
        """Write the scores (L, K) of the centred targets y, and return them."""
        inside = self.whole.coordinates(y)
        if self.moments:
            target = y.to(self.dtype)
        elif self.full:
            target = torch.zeros_like(y, dtype=self.dtype)
        else:
            exact = y.double() - self.left @ inside
            exact[self.own] = self.projected.mT @ y.double()
            target = exact.to(self.dtype)
        for run in runs_of(y.shape[0], y.shape[-1], target.element_size(), PREDICTION_BYTES):
            base, own = target[:, run], inside[:, run].to(self.dtype)
            for index, (factor, scale, mask) in enumerate(
                zip(self.factors, self.scales, self.masks, strict=True)
            ):
                if mask is None:
                    residual = torch.addmm(base, self.work, factor * own)
                else:
                    residual = base + mask * (self.work @ (factor * own))
                scores[index, run] = _weighted_mean(residual.square_(), scale)
        return scores


def _complement(values: Tensor, lam: float, full: bool) -> Tensor:
    """The factors lam / (values^2 + lam), or multiples where only ratios count: at lam 0, and where P is zero."""
    if values.numel() == 0:
        return values
    least = values.min()
    if lam == 0:
        return (least / values).square()
    factor = 1 / (1 + values * (values / lam))
    return factor / factor.max() if full else factor


def _weighted_mean(squares: Tensor, weight: Tensor) -> Tensor:
    """The mean over rows of squares times weight, where no weight counts on a square of 0."""
    total = weight @ squares
    if bool(weight.isinf().any()):
        total = torch.where(squares == 0, 0.0, squares * weight.unsqueeze(-1)).sum(0)
    return total.double() / squares.shape[0]


class KFold:
    """K folds of consecutive rows: the moments of the others are all moments less the fold's own.

    Where that difference or its condition loses digits, and where the columns outnumber the rows, the others' singular
    values take their place.
    """

    def __init__(self, whole: EigenRidge, lams: Tensor, folds: int) -> None:
        self.whole, self.lams = whole, lams
        self.pieces = list(pairwise(_fold_bounds(whole.x.shape[-2], folds)))
        self._eigen: dict[int, tuple[Tensor, Tensor] | None] = {}
        self._exact: dict[int, EigenRidge] = {}
        # For each penalty the sum over targets of the error relative to each fold's variance, that is 1 - R^2.
        self.relative = torch.zeros(lams.numel(), dtype=torch.float64, device=whole.x.device)

    def shared(self, scores: Tensor) -> Tensor:
        """(L), by which one penalty for all targets is chosen: by the mean R^2, as scikit-learn does."""
        return self.relative

    def score(self, y: Tensor, scores: Tensor) -> None:
        """Write the scores (L, K) of the centred targets y."""
        errors = scores.new_zeros(len(self.pieces), *scores.shape)
        moments = self._moments(y)
        if moments is not None:
            self.whole.give(y, *moments.total[:2])
        for fold in range(len(self.pieces)):
            if moments is None or not self._score_by_moments(fold, y, moments, errors[fold]):
                errors[fold] = self._score_exactly(fold, y)
        sizes = [end - begin for begin, end in self.pieces]
        share = scores.new_tensor(sizes)[:, None, None] / y.shape[0]
        scores.copy_((share * errors).sum(0))
        if moments is not None:
            again = _doubtful(moments.total[2] / y.shape[0], scores)
            if again.numel():
                for fold in range(len(self.pieces)):
                    errors[fold][:, again] = self._score_exactly(fold, y[:, again])
                scores.copy_((share * errors).sum(0))
        # As in scikit-learn's r2_score, a constant target scores 0 (or 1, if it is met).
        variance = torch.stack(
            [self._variance(fold, y, moments) for fold in range(len(self.pieces))]
        ).unsqueeze(1)
        relative = torch.where(
            variance > 0, errors / torch.where(variance > 0, variance, 1.0), (errors > 0).double()
        )
        self.relative += relative.sum((0, 2))

    def _variance(self, fold: int, y: Tensor, moments: _Moments | None) -> Tensor:
        """(K) float64: that of each target in a fold; of a constant one 0, whatever rounding its mean takes."""
        begin, end = self.pieces[fold]
        if moments is not None:
            squares, total = moments.each[fold][2] / (end - begin), moments.each[fold][4] / (end - begin)
            variance = squares - total.square()
            if bool((variance > 1e-6 * squares).all()):
                return variance
        held = y[begin:end].double()
        variance = held.var(0, correction=0)
        return torch.where(variance > 1e-28 * held.square().amax(0), variance, 0.0)

    def _moments(self, y: Tensor) -> _Moments | None:
        """Those of each fold, in float64; None where X^T X is the larger matrix."""
        x, bias = self.whole.rows, self.whole.bias
        held = max(end - begin for begin, end in self.pieces)
        if not x.shape[-2] - held - int(bias) >= x.shape[-1] > 0:
            return None
        each: list[tuple[Tensor, ...]] = []
        x, y = promoted(x, y)
        for begin, end in self.pieces:
            gram, cross, y_sum, squares, *_ = plain_gram(x[begin:end], y[begin:end], torch.float64)
            x_sum = x[begin:end].sum(-2, dtype=torch.float64) if bias else y_sum.new_zeros(())
            each.append((gram, cross, squares, x_sum, y_sum))
        total = tuple(torch.stack(values).sum(0) for values in zip(*each, strict=True))
        return _Moments(each, total)

    def _score_by_moments(self, fold: int, y: Tensor, moments: _Moments, errors: Tensor) -> bool:
        """Write the mean squared errors (L, K) of a fold, or say that its moments are not to be used."""
        x, bias, dtype = self.whole.rows, self.whole.bias, self.whole.x.dtype
        begin, end = self.pieces[fold]
        count, held = x.shape[-2] - (end - begin), end - begin
        gram, cross, _, x_sum, y_sum = moments.others(fold)
        means = None
        if bias:
            means = x_sum / count, y_sum / count
            cross = cross - count * torch.outer(*means)
        if fold not in self._eigen:
            self._eigen[fold] = _eigen(
                gram, None if means is None else means[0], count, self.whole.least, dtype
            )
        found = self._eigen[fold]
        if found is None:
            return False
        values, vectors = found
        left_out = _held(x[begin:end], y[begin:end], vectors, moments.each[fold], means, dtype)
        # In the working precision, scaled so that nothing overflows that the weights would not.
        top = values[-1].clamp_min(torch.finfo(torch.float64).tiny)
        scaled_cross = (vectors.mT @ cross / top).to(dtype)
        factors = [
            (top / (values + lam).clamp_min(top * EPS)).to(dtype).unsqueeze(-1) for lam in self.lams.unbind()
        ]
        length = left_out.design.shape[0]
        one = torch.ones(length, dtype=dtype, device=x.device)
        for run in runs_of(length, y.shape[-1], left_out.target.element_size(), PREDICTION_BYTES):
            target, rest = left_out.target[:, run], left_out.rest[run]
            residual = torch.empty_like(target)
            for index, factor in enumerate(factors):
                torch.mm(left_out.design, factor * scaled_cross[:, run], out=residual)
                residual.sub_(target).square_()
                errors[index, run] = ((one @ residual).double() + rest) / held
        return True

    def _score_exactly(self, fold: int, y: Tensor) -> Tensor:
        """The mean squared errors (L, K) of a fold, from the singular values of the other rows, in float64."""
        begin, end = self.pieces[fold]
        rows, bias = self.whole.rows, self.whole.bias
        if fold not in self._exact:
            others = torch.cat([rows[:begin], rows[end:]])
            self._exact[fold] = EigenRidge(others, bias, self.whole.least, exact=True)
        train = self._exact[fold]
        target = torch.cat([y[:begin], y[end:]]).double()
        mean = column_means(target, bias)
        inside = train.coordinates(centred(target, bias))
        values, basis = train.parts()
        design, wanted = (rows[begin:end].double() - train.mean) @ basis, y[begin:end].double() - mean
        return torch.stack(
            [
                (design @ (shrinkage(values, lam).unsqueeze(-1) * inside) - wanted).square().mean(0)
                for lam in self.lams.unbind()
            ]
        )


class _Moments(NamedTuple):
    """X^T X, X^T Y, the squares of Y and the sums of X and Y: of each fold, and of all."""

    each: list[tuple[Tensor, ...]]
    total: tuple[Tensor, ...]

    def others(self, fold: int) -> tuple[Tensor, ...]:
        """Of all folds but one."""
        own = self.each[fold]
        # What is left beside a fold of far larger numbers has lost its digits: then it is summed anew.
        pairs = ((own[0].diagonal(), self.total[0].diagonal()), (own[2], self.total[2]))
        if all(bool((part <= 0.99 * whole).all()) for part, whole in pairs):
            return tuple(whole - part for part, whole in zip(own, self.total, strict=True))
        rest = self.each[:fold] + self.each[fold + 1 :]
        return tuple(torch.stack(values).sum(0) for values in zip(*rest, strict=True))


def _eigen(
    gram: Tensor, mean: Tensor | None, count: int, least: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """The eigenvectors of X^T X less the mean, or None where rounding may have changed what a penalty leaves of it."""
    size = float(torch.linalg.matrix_norm(gram))
    if not 0 < size < math.inf:
        return None
    system = gram if mean is None else gram - count * torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(system)
    return (
        (values, vectors)
        if size + least <= GRAM_LIMIT[dtype] * (max(float(values[0]), 0.0) + least)
        else None
    )


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
    rows: Tensor,
    y: Tensor,
    vectors: Tensor,
    moments: tuple[Tensor, ...],
    means: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> _Held:
    """The fold in the coordinates of ``vectors``, less the means of the training rows."""
    gram, cross, squares, x_sum, y_sum = moments
    count, width = rows.shape
    size, length = gram.trace(), squares
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
        kept = bool((squares >= 1e-6 * length).all())  # else the means take the digits
        if int(info) == 0 and kept and float(pivots.min()) > 1e-5 * float(size.sqrt()):
            z = torch.linalg.solve_triangular(factor, cross, upper=False)
            rest = (squares - z.square().sum(0)).clamp_min(0)
            return _Held((factor.mT @ vectors).to(dtype), z.to(dtype), rest)
    if means is None:
        return _Held(rows.to(dtype) @ vectors.to(dtype), y.to(dtype), zero)
    rotated = (rows.double() - means[0]) @ vectors
    return _Held(rotated.to(dtype), (y.double() - means[1]).to(dtype), zero)
