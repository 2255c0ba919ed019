"""ridge and ridge_path: ridge regression from data, at one penalty and at many. Made of other ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops.ops.solve.codes import BAD_PENALTY
from cfl_ops.ops.solve.least_squares import lstsq
from cfl_ops.ops.solve.regression import (
    check_data,
    check_penalties,
    column_means,
    free_rows,
    intercept,
    regression_error,
    result_dtype,
)
from cfl_ops.ops.solve.ridge_fit import RIDGE_FIT
from cfl_ops.ops.solve.system import on_device

__all__ = ["ridge", "ridge_path"]


def ridge(x: Tensor, y: Tensor, lam: float | Tensor, *, bias: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    r"""Ridge regression from data, in scikit-learn's convention.

    .. math:: \min_W \|Y - X W\|_F^2 + \lambda \|W\|_F^2, \quad W = (X^T X + \lambda I)^{-1} X^T Y

    (Closed-Form Last Layer Optimization, Eq. 1-2, transposed and in sum convention.) Computed in float64, so that
    float32 data give float64's answer: by the Gram matrix of the smaller side where its estimated condition allows it,
    else, however small the penalty, by QR and SVD of ``x``.

    Args:
        x: ``(..., B, D)``.
        y: ``(..., B, K)``.
        lam: a number or a 0-d tensor; a tensor of as many dimensions as there are batch dimensions ``...``, a penalty
            for each batch element; or one of one dimension more, the last of which is K, a penalty for each target
            (sizes of 1 are expanded). Not negative; 0 gives the minimum-norm fit (the number 0 is :func:`lstsq`; a
            tensor that holds 0 is differentiable where the columns are independent).
        bias: also fit an intercept, which is not penalised. It belongs to the weight as it is returned, rounded.

    Returns:
        The weight ``(..., D, K)``, or ``(weight, intercept)`` with intercept ``(..., K)``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or lam is negative, NaN or Inf.
        torch.linalg.LinAlgError: ``x`` has NaN or Inf; names the batch index.

    Differentiable (twice). Costs ``B D^2 / 2 + B D K + D^3 / 3`` multiply-adds for ``B >= D``, of ill-conditioned data
    and with a penalty for each target about ``4 B D^2 + B D K + 20 D^3``.

    Example:
        >>> import torch, cfl_ops
        >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [3.0], [5.0]])
        >>> cfl_ops.ridge(x, y, 2.0, bias=True)
        (tensor([[1.]]), tensor([2.]))
    """
    data, targets = check_data("ridge", x, y)
    bias = checks.flag("ridge", "bias", bias)
    penalty = _penalty(data, targets, lam)
    if checks.is_zero(lam):
        weight = lstsq(free_rows(data, bias), free_rows(targets, bias))
    else:
        weights, info = RIDGE_FIT(data, targets, None, penalty, bias)
        check_info("ridge", info, [weights], [data, penalty])
        weight = weights.squeeze(-3)
    weight = weight.to(result_dtype(x, y))
    if not bias:
        return weight
    offset = intercept(weight, column_means(data, bias), column_means(targets, bias))
    return weight, offset.to(weight.dtype)


def _penalty(x: Tensor, y: Tensor, lam: float | Tensor) -> Tensor:
    """In float64, ``(..., 1, 1)`` or ``(..., 1, K)``; how many dimensions it has says what each of them is."""
    given = on_device(checks.coefficient("ridge", "lam", lam, x.device), x)
    batch, targets = x.shape[:-2], y.shape[-1]
    per_target = given.ndim > len(batch)
    wanted = (*batch, targets) if per_target else batch
    fits = given.ndim in (0, len(wanted)) and all(
        size in (1, whole) for size, whole in zip(given.shape, wanted, strict=given.ndim > 0)
    )
    if not fits:
        raise ValueError(
            f"cfl_ops.ridge: lam must be a number, or have shape {tuple(batch)} (a penalty for each batch element) or "
            f"{(*batch, targets)} (for each target), but got shape {tuple(given.shape)}"
        )
    return given.expand(wanted).unsqueeze(-2) if per_target else given.expand(batch)[..., None, None]


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

    Differentiable (twice). Costs ``B D^2 / 2`` and about ``9 D^3`` multiply-adds once (of ill-conditioned data
    ``4 B D^2`` and ``20 D^3``) and ``D^2 K`` for each penalty.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.ridge_path(torch.eye(2), torch.ones(2, 1), [0.0, 1.0]).squeeze(-1)
        tensor([[1.0000, 1.0000],
                [0.5000, 0.5000]])
    """
    data, targets = check_data("ridge_path", x, y)
    penalties = check_penalties("ridge_path", lams, x.device)
    bias = checks.flag("ridge_path", "bias", bias)
    batch = data.shape[:-2]
    weights, info = RIDGE_FIT(data, targets, None, penalties.expand(*batch, -1).unsqueeze(-1), bias)
    check_info("ridge_path", info, [weights], [data])
    weights = weights.movedim(-3, 0).to(result_dtype(x, y))
    if not bias:
        return weights
    offsets = intercept(weights, column_means(data, bias), column_means(targets, bias))
    return weights, offsets.to(weights.dtype)


@error_message("ridge")
def _ridge_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    index, code, where = first_failure(info)
    if code == BAD_PENALTY:
        return ValueError(
            f"cfl_ops.ridge: {where}lam must be finite and not negative, but got {context[1][index].flatten().tolist()}"
        )
    return regression_error("ridge", info, context)


@error_message("ridge_path")
def _ridge_path_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return regression_error("ridge_path", info, context)
