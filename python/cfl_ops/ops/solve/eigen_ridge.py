"""The ridge fits of one matrix at many penalties from its singular values: what ridge_path and ridge_cv share."""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops.ops.gram.gram import plain_gram
from cfl_ops.ops.solve.narrow_ridge import Equilibrated
from cfl_ops.ops.solve.regression import (
    centred,
    column_means,
    free_rows,
    gram_of_rows,
    moments,
    promoted,
    with_free_rows,
)

# Largest eigenvalue of X^T X + lam I over the smallest up to which a float64 Gram matrix is as good as X itself: its
# rounding errors, some eps times this, are below those of float32 data. float64 data ask for more.
GRAM_LIMIT = {torch.float32: 1e8, torch.float64: 1e6}
EPS = torch.finfo(torch.float64).eps


class EigenRidge:
    """The fits to all rows of ``x (n, D)``, for any targets: X = U S V^T of the centred rows, in float64.

    By the eigenvectors of the smaller Gram matrix where ``least``, the least penalty, and the condition allow it
    (GRAM_LIMIT), else by QR and SVD, which do not square the condition. Without :attr:`exact` columns of U that belong
    to the least singular values are noise; their share of a fit is within rounding.
    """

    def __init__(self, x: Tensor, bias: bool, least: float, *, exact: bool = False) -> None:
        bias = bias and x.shape[-2] > 0  # no rows have no mean
        self.x, self.bias, self.least = x, bias, least
        self.rows = centred(x, bias)
        self.mean = column_means(x, bias)
        self.free = x.shape[-2] - int(bias)
        """How many rows are free to differ: centred ones sum to zero."""
        self.dual = self.free < x.shape[-1]
        self.exact = exact
        self.gram: Tensor | None = None
        self._parts: tuple[Tensor, Tensor] | None = None
        self._left: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._moments: tuple[Tensor, Tensor] | None = None
        self.squares: Tensor | None = None

    def coordinates(self, y: Tensor) -> Tensor:
        """U^T Y in float64 for centred targets ``y (n, K)``; those of the last ones are kept."""
        if self._last is None or self._last[0] is not y:
            self._last = y, self._coordinates(y)
        return self._last[1]

    def _coordinates(self, y: Tensor) -> Tensor:
        cross = self._cross(y) if self.by_moments else None
        values, basis = self.parts()
        if self.by_moments and cross is not None:
            return basis.mT @ cross * _inverse(values).unsqueeze(-1)
        return self.left().mT @ y.double()

    def _cross(self, y: Tensor) -> Tensor:
        """X^T Y in float64; X^T X and the squares of Y are kept with it."""
        if self._moments is None or self._moments[0] is not y:
            rows, targets = promoted(self.rows, y)
            self.gram, cross, _, self.squares, *_ = plain_gram(rows, targets, torch.float64)
            self._moments = y, cross
        return self._moments[1]

    def give(self, y: Tensor, gram: Tensor, cross: Tensor) -> None:
        """Its moments with the centred targets y, from one who has made them."""
        self.gram, self._moments = gram, (y, cross)

    @property
    def by_moments(self) -> bool:
        """Whether X^T X and X^T Y are all that is needed of the rows."""
        return not self.exact and not self.dual

    def parts(self) -> tuple[Tensor, Tensor]:
        """The singular values (r), none of which is 0 where they are exact, and V (D, r)."""
        if self._parts is None:
            if not self.exact:
                self._parts = self._by_gram()
            if self._parts is None:
                self.exact = True
                self._parts = self._by_svd()
        return self._parts

    def left(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """U (n, r)."""
        values, basis = self.parts()
        if self._left is None:
            return self.rows.to(dtype) @ (basis * _inverse(values)).to(dtype)
        return self._left.to(dtype)

    def to_exact(self) -> EigenRidge:
        """The same fits from QR and SVD."""
        return self if self.exact else EigenRidge(self.x, self.bias, self.least, exact=True)

    def _by_gram(self) -> tuple[Tensor, Tensor] | None:
        """By eigenvectors; None where that would lose what the rows hold."""
        if min(self.free, self.x.shape[-1]) <= 0:
            return None
        reduced = free_rows(self.x, self.bias) if self.dual else self.rows
        if self.gram is None:
            self.gram = gram_of_rows(reduced) if self.dual else moments(self.rows, self.rows[..., :0])[0]
        if not bool(self.gram.isfinite().all()):
            return None
        values, vectors = torch.linalg.eigh(self.gram)
        top = float(values[-1])
        limit = GRAM_LIMIT.get(self.x.dtype, GRAM_LIMIT[torch.float32])
        if not 0 < top + self.least <= limit * (max(float(values[0]), 0.0) + self.least):
            return None
        # Those that are rounding alone count for nothing beside a penalty, but their vectors do: all of a fit lies in
        # them where the targets have no part in the others. So they are small, and not 0.
        singular = values.clamp_min(top * EPS**2).sqrt()
        if not self.dual:
            return singular, vectors
        self._left = with_free_rows(vectors, self.bias)
        return singular, reduced.mT.double() @ (vectors * _inverse(singular))

    def _by_svd(self) -> tuple[Tensor, Tensor]:
        """By QR of the longer side and SVD of what is left. What is within rounding is left out."""
        rows = (free_rows(self.x, self.bias) if self.dual else self.rows).double()
        if self.dual:
            across, triangle = torch.linalg.qr(rows.mT)
            u, values, vt = torch.linalg.svd(triangle.mT, full_matrices=False)
            basis, left = across @ vt.mT, with_free_rows(u, self.bias)
        else:
            along, triangle = torch.linalg.qr(rows)
            u, values, vt = torch.linalg.svd(triangle, full_matrices=False)
            basis, left = vt.mT, along @ u
        kept = values > values[:1] * (max(self.x.shape) * EPS) if values.numel() else values > 0
        self._left = left[:, kept]
        return values[kept], basis[:, kept]

    def weight(self, coordinates: Tensor, lam: Tensor) -> Tensor:
        """(D, K) at one penalty, or one for each target; 0 gives the minimum-norm fit."""
        values, basis = self.parts()
        return basis @ (shrinkage(values.unsqueeze(-1), lam) * coordinates)

    def fit(self, y: Tensor, lam: Tensor) -> Tensor:
        """The weight for centred targets."""
        if self._parts is None and self.by_moments and lam.ndim == 0 and self.x.numel():
            cross = self._cross(y)
            assert self.gram is not None
            system = Equilibrated(self.gram, lam.unsqueeze(-1))
            weight = system.solve(cross)
            if float(system.condition) <= GRAM_LIMIT[self.x.dtype]:
                return weight  # for a tenth of the decomposition's work
        return self.weight(self.coordinates(y), lam)

    def penalised(self, right: Tensor, lam: Tensor) -> Tensor:
        """(X^T X + lam I)^-1 right for right sides (D, K), with exact parts; of lam 0 the pseudoinverse."""
        values, basis = self.parts()
        inside = basis.mT @ right
        solution = basis @ (shrinkage(values.unsqueeze(-1), lam) / values.unsqueeze(-1) * inside)
        if len(values) == len(right):
            return solution
        return solution + (right - basis @ inside) * _inverse(lam)


def _inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 where they are 0."""
    return torch.where(values > 0, 1 / torch.where(values > 0, values, 1.0), 0.0)


def shrinkage(singular: Tensor, lam: Tensor) -> Tensor:
    """The factors s / (s^2 + lam), written so that squares do not underflow; 0 where s is."""
    safe = torch.where(singular > 0, singular, 1.0)
    return torch.where(singular > 0, 1 / (safe + lam / safe), 0.0)
