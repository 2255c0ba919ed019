"""The ridge fits at many penalties from one eigendecomposition: what ridge_path and ridge_cv share."""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops.ops.solve.regression import gram_of_rows, moments
from cfl_ops.ops.solve.ridge_solve import ridge_solve


class EigenRidge:
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
                self.gram = gram_of_rows(self.x)
            return None
        self.gram, cross = moments(self.x, y)
        return cross

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues, eigenvectors of the smaller side, and the basis of the weights."""
        if self._eigen is None:
            assert self.gram is not None
            values, vectors = eigh(self.gram)
            basis = vectors
            if self.dual:  # a direction without length in the rows has none in the columns
                basis = torch.where(values.unsqueeze(-2) > 0, self.x.mT.double() @ vectors, 0.0)
            self._eigen = values, vectors, basis
        return self._eigen

    def rotate(self, y: Tensor, cross: Tensor | None) -> Tensor:
        """The right sides of the targets y in the eigenbasis."""
        return self.eigen()[1].mT @ (y.double() if cross is None else cross)

    def weight(self, y: Tensor, cross: Tensor | None, lam: Tensor) -> Tensor:
        """(D, K) at one penalty, or one for each target."""
        if cross is not None and self.gram is not None and self._eigen is None and lam.ndim == 0 and lam > 0:
            return ridge_solve(self.gram, cross, lam)  # a tenth of the eigendecomposition's work
        values, _, basis = self.eigen()
        total, right = values.unsqueeze(-1) + lam, self.rotate(y, cross)
        inner = torch.where(total > 0, right / torch.where(total > 0, total, 1.0), 0.0)
        return (basis.to(y.dtype) @ inner.to(y.dtype)).double()


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues without the negative ones of rounding, and eigenvectors."""
    values, vectors = torch.linalg.eigh(gram)
    floor = values[..., -1:].abs() * (gram.shape[-1] * torch.finfo(torch.float64).eps)
    return torch.where(values > floor, values, 0.0), vectors


def shrinkage(values: Tensor, lam: Tensor) -> Tensor:
    """1 / (values + lam), and 0 where both are: the minimum-norm limit."""
    total = values + lam
    return torch.where(total > 0, 1 / torch.where(total > 0, total, 1.0), 0.0)
