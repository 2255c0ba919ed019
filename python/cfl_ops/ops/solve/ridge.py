"""ridge and ridge_path: ridge regression from data, at one penalty and at many. Made of other ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, error_message
from cfl_ops.ops.solve.eigen_ridge import EigenRidge, shrinkage
from cfl_ops.ops.solve.least_squares import lstsq
from cfl_ops.ops.solve.regression import (
    centred,
    check_data,
    check_penalties,
    gram_of_rows,
    intercept,
    moments,
    regression_error,
    result_dtype,
)
from cfl_ops.ops.solve.ridge_solve import ridge_solve

__all__ = ["ridge", "ridge_path"]


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
    data, targets = check_data("ridge", x, y)
    bias = checks.flag("ridge", "bias", bias)
    penalty = checks.coefficient("ridge", "lam", lam, x.device)
    data, x_mean = centred(data, bias)
    targets, y_mean = centred(targets, bias)
    weight = _fit(data, targets, None if checks.is_zero(lam) else penalty)
    dtype = result_dtype(x, y)
    if not bias:
        return weight.to(dtype)
    return weight.to(dtype), intercept(weight, x_mean, y_mean).to(dtype)


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
    data, targets = check_data("ridge_path", x, y)
    penalties = check_penalties("ridge_path", lams, x.device)
    bias = checks.flag("ridge_path", "bias", bias)
    data, x_mean = centred(data, bias)
    targets, y_mean = centred(targets, bias)
    whole = EigenRidge(data)
    cross = whole.moments(targets)
    assert whole.gram is not None
    _check_finite("ridge_path", whole.gram)
    values, _, basis = whole.eigen()
    rotated = whole.rotate(targets, cross)
    weights = torch.stack(
        [basis @ (shrinkage(values, lam).unsqueeze(-1) * rotated) for lam in penalties.unbind()]
    )
    dtype = result_dtype(x, y)
    if not bias:
        return weights.to(dtype)
    return weights.to(dtype), intercept(weights, x_mean, y_mean).to(dtype)


def _fit(x: Tensor, y: Tensor, lam: Tensor | None) -> Tensor:
    """(X^T X + lam I)^-1 X^T Y through the smaller side, in float64; the minimum-norm fit without a penalty."""
    if lam is None:
        return lstsq(x, y).double()
    if x.shape[-2] >= x.shape[-1]:
        return ridge_solve(*moments(x, y), lam)
    return x.mT.double() @ ridge_solve(gram_of_rows(x), y.double(), lam)


def _check_finite(op: str, gram: Tensor) -> None:
    bad = ~gram.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    check_info(op, bad.to(torch.int32), [gram], [gram])


@error_message("ridge_path")
def _ridge_path_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return regression_error("ridge_path", info, context)
