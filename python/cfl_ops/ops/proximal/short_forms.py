"""The proximal step without its gradient, and the ridge head of a batch without memory of an earlier one."""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops.ops.proximal.arguments import check_arguments
from cfl_ops.ops.proximal.step import ProximalStep, step_or_raise

__all__ = ["proximal_update", "ridge_step"]


def proximal_update(
    features: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lam: float | Tensor,
    ridge: float | Tensor = 0.0,
    lam_diag: Tensor | None = None,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    fit_bias: str = "penalized",
    method: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The new ``(weight, bias)`` of :func:`proximal_step`, for those who need no gradient.

    Example:
        >>> import torch, cfl_ops
        >>> weight, bias = cfl_ops.proximal_update(torch.eye(2), torch.ones(2, 1), torch.zeros(1, 2), lam=0.5)
        >>> weight
        tensor([[0.5000, 0.5000]])

    """
    step = step_or_raise(check_arguments(
        "proximal_update", features, target, weight, bias, lam, ridge, lam_diag, reduction, sample_weight,
        fit_bias, method,
    ))  # fmt: skip
    return step.weight, step.bias


def ridge_step(
    features: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    *,
    lam: float | Tensor,
    bias: bool = True,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    fit_bias: str = "penalized",
    method: str = "auto",
) -> ProximalStep:
    """The ridge head of this batch alone (Eq. 1-2, 10-12): a step without memory of an earlier head.

    Args:
        features: ``(..., B, D)``.
        target: ``(..., B, K)``, or class indices ``(..., B)`` int64 with ``num_classes``.
        num_classes: K for class indices.
        lam: the ridge coefficient, in the convention of ``reduction``.
        bias: whether to fit a bias.
        reduction, sample_weight, fit_bias, method: as in :func:`proximal_step`.

    Returns:
        :class:`ProximalStep`.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.ridge_step(torch.eye(2), torch.tensor([0, 1]), 2, lam=0.5, bias=False).weight
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])

    """
    checks.floating("ridge_step", "features", features, 2)
    checks.tensor("ridge_step", "target", target, 1)
    if target.dtype == torch.int64:
        if num_classes is None:
            raise TypeError("cfl_ops.ridge_step: target of class indices (int64) needs num_classes")
        outputs = checks.integer("ridge_step", "num_classes", num_classes, 1)
    else:
        checks.floating("ridge_step", "target", target, 2)
        outputs = target.shape[-1]
    dtype = features.dtype if features.dtype == torch.float64 else torch.float32
    weight = features.new_zeros(*features.shape[:-2], outputs, features.shape[-1], dtype=dtype)
    lam = checks.coefficient("ridge_step", "lam", lam, features.device)
    with_bias = checks.flag("ridge_step", "bias", bias)
    zero_bias = weight.new_zeros(weight.shape[:-1]) if with_bias else None
    return step_or_raise(check_arguments(
        "ridge_step", features, target, weight, zero_bias, 0.0, lam, None, reduction, sample_weight,
        fit_bias, method,
    ))  # fmt: skip
