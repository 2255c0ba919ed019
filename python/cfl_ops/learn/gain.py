"""What a closed-form step gains over a gradient step (Theorem 5.3), and how far the features are from nothing to gain.

Both look at data, in float64: they are for a log, not for a training step.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.results import result_type
from cfl_ops.ops.solve.least_squares import lstsq

from .head import Batch, as_batch

__all__ = ["ClosedFormGain", "closed_form_gain", "feature_alignment"]


@result_type("learn.gain", "cfl_ops.learn")
class ClosedFormGain(NamedTuple):
    """How many times more a closed-form step lowers the squared loss than the best gradient step: 0-d, float64."""

    gain: Tensor
    """Measured: ``[L(W) - min L] / [L(W) - L(W - a G)]`` at the best step size a."""
    bound: Tensor
    """``1 + CV^2``, from the singular values of the features."""


@torch.no_grad()
def closed_form_gain(
    features: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None
) -> ClosedFormGain:
    r"""What solving a linear head on a batch gains over the best gradient step on it.

    .. math::
        \frac{L(W) - \min L}{L(W) - L(W - a G)} \ge 1 + \mathrm{CV}^2, \quad
        \mathrm{CV} = \frac{\mathrm{std}_p(\sigma^2)}{\mathrm{mean}_p(\sigma^2)}, \quad
        p_i \propto \|(Y - \Phi W^T)^T u_i\|^2

    (Closed-Form Last Layer Optimization, Theorem 5.3.) L is the squared loss, without a penalty; G its gradient in W;
    ``sigma_i`` and ``u_i`` are the singular values and left singular vectors of the features. The theorem holds for
    every step size a. The gain is at the best one, ``|G|^2 / (2 |Phi G^T|^2)``, where it is an equality: ``gain`` and
    ``bound`` are the same number, up to rounding. They are computed apart, the gain from a least-squares fit and the
    gradient, the bound from a singular value decomposition, so that one is a check of the other. A large number says
    that a gradient head lags behind its features; 1 that the best gradient step would do as well.

    Args:
        features: ``(..., D)``; all dimensions but the last are rows.
        target: ``(..., K)`` floating point, or class indices ``(...)`` int64; its rows may be flat.
        weight: ``(K, D)``, the head W.
        bias: ``(K,)``, or None: a feature of ones, whose weight it is.

    Returns:
        ``ClosedFormGain(gain, bound)``. Both are NaN where W is at the minimum, or there is no gradient: what the
        features explain of the residual is below ``eps max(B, D)`` of what it is the difference of.

    Raises:
        TypeError, ValueError, IndexError: shapes or dtypes do not fit, there is no row, a class is out of range, or
            there is NaN or Inf, also in the prediction.

    The scales of features, targets and weight do not matter: 1e-150 or 1e150 will do. Singular values under
    ``eps max(B, D)`` of the largest count as zero. Costs a singular value decomposition in float64.
    Not under ``fullgraph=True`` nor ``torch.export``: it looks at the data.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import closed_form_gain
        >>> features, target = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [1.0]])
        >>> closed_form_gain(features, target, torch.zeros(1, 2))
        ClosedFormGain(gain=tensor(1.3600, dtype=torch.float64), bound=tensor(1.3600, dtype=torch.float64))

    """
    op = "learn.closed_form_gain"
    checks.floating(op, "weight", weight, 2)
    if weight.ndim != 2:
        raise ValueError(f"cfl_ops.{op}: weight must have shape (K, D), but got {tuple(weight.shape)}")
    targets, width = weight.shape
    batch = _batch(op, features, target, width)
    if bias is not None:
        checks.floating(op, "bias", bias, 1)
        if bias.shape != (targets,):
            raise ValueError(f"cfl_ops.{op}: bias must have shape ({targets},), but got {tuple(bias.shape)}")
    checks.same_device(op, "features", batch.features, target=batch.target, weight=weight, bias=bias)
    if not batch.features.shape[0]:
        raise ValueError(f"cfl_ops.{op}: features must have at least 1 row, but got {tuple(features.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        _check_finite(op, name, value)
    phi, residual, size = _system(op, batch, weight, bias)
    if not phi.numel() or not targets:
        nothing = residual.new_full((), math.nan)
        return ClosedFormGain(nothing, nothing.clone())
    eps = torch.finfo(torch.float64).eps * max(phi.shape)
    u, sigma, _ = torch.linalg.svd(phi, full_matrices=False)
    explained = (u.mT @ residual).square().sum(1)
    p = torch.where(sigma > eps * sigma[0], explained, 0.0)
    some = p.sum() > (eps * size).square()
    p = p / p.sum()
    square = (sigma / sigma[0]).square()
    mean = (p * square).sum()
    bound = 1 + (p * (square - mean).square()).sum() / mean.square()

    gradient = residual.mT @ phi
    gradient = gradient / gradient.abs().amax()  # its length is no matter, and its fourth power might be none
    fitted = phi @ lstsq(phi, residual, rtol=eps)
    # L(W) - L(W - a G) at the best a is <R, Phi G^T>^2 / |Phi G^T|^2, and <R, Phi G^T> is <R^T Phi, G>.
    moved = phi @ gradient.mT
    lowered = ((residual.mT @ phi) * gradient).sum().square() / moved.square().sum()
    gain = fitted.square().sum() / lowered
    return ClosedFormGain(torch.where(some, gain, math.nan), torch.where(some, bound, math.nan))


@torch.no_grad()
def feature_alignment(features: Tensor, target: Tensor, *, center: bool = False) -> Tensor:
    r"""How much of the targets a linear head could see in the features at all, from 0 to 1.

    .. math:: \frac{\|\Phi^T Y\|_F}{\|\Phi\|_F \|Y\|_F}

    It is 0 where the features are orthogonal to the targets, or all zero (dead units): these are critical points of the
    loss at the solved head that are no minima (Closed-Form Last Layer Optimization, Theorem 5.1). The solved weight is
    zero there, so is the gradient of the features, and no step leaves them. It is 1 where features and targets are
    multiples of one vector. Log it where a loss does not move; what is small is not yet zero.

    Args:
        features: ``(..., D)``; all dimensions but the last are rows.
        target: ``(..., K)`` floating point, or class indices ``(...)`` int64; its rows may be flat.
        center: of features and targets less their means over the rows, for a head with a bias: constant features are
            nothing to it.

    Returns:
        A 0-d float64 tensor; 0 without rows. The scales of features and targets do not matter.

    Raises:
        TypeError, ValueError, IndexError: shapes or dtypes do not fit, a class is negative, or there is NaN or Inf.

    Not under ``fullgraph=True`` nor ``torch.export``: it looks at the data.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import feature_alignment
        >>> feature_alignment(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [-1.0]]))
        tensor(0., dtype=torch.float64)

    """
    op = "learn.feature_alignment"
    checks.floating(op, "features", features, 1)
    center = checks.flag(op, "center", center)
    batch = _batch(op, features, target, features.shape[-1])
    checks.same_device(op, "features", batch.features, target=batch.target)
    phi, target = _unit(batch.features)[0], batch.target
    if batch.classes:
        _check_classes(op, target, None)
        # Classes that no row has are columns of zeros, which change nothing.
        present, target = torch.unique(target, return_inverse=True)
        y = _one_hot(target, len(present))
    else:
        y = _unit(target)[0]
    if center and phi.shape[0]:
        # In units of what is left: a mean that is all but everything may leave little.
        phi, y = (_unit(_centered(value))[0] for value in (phi, y))
    lengths = torch.linalg.vector_norm(phi) * torch.linalg.vector_norm(y)
    aligned = torch.linalg.vector_norm(phi.mT @ y) / lengths
    return torch.where(lengths > 0, aligned.clamp(max=1.0), 0.0)


def _centered(value: Tensor) -> Tensor:
    """Less the mean of the rows; what rounding leaves of a constant column is zero."""
    rest = value - value.mean(0)
    eps = torch.finfo(value.dtype).eps * value.shape[0]
    return torch.where(rest.abs() <= eps * value.abs().amax(0), 0.0, rest)


def _batch(op: str, features: Any, target: Any, width: int) -> Batch:
    """The rows, of a target that has as many, finite."""
    batch = as_batch(op, features, target, None, width)
    if not batch.classes:
        checks.floating(op, "target", target, 1)
    if batch.target.shape[0] != batch.features.shape[0]:
        raise ValueError(
            f"cfl_ops.{op}: target must have the {batch.features.shape[0]} rows of features, but got shape "
            f"{tuple(target.shape)}"
        )
    _check_finite(op, "features", batch.features)
    _check_finite(op, "target", batch.target)
    return batch


def _check_finite(op: str, name: str, value: Tensor | None) -> None:
    if value is None or bool(value.isfinite().all()):
        return
    row = int((~value.isfinite().reshape(value.shape[0], -1).all(1)).nonzero()[0])
    raise ValueError(f"cfl_ops.{op}: {name} has NaN or Inf in row {row}")


def _check_classes(op: str, target: Tensor, classes: int | None) -> None:
    """Class indices are not negative, and less than the number of classes if that is known."""
    bad = target < 0 if classes is None else (target < 0) | (target >= classes)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        wanted = "not negative" if classes is None else f"from 0 to {classes - 1}"
        raise IndexError(
            f"cfl_ops.{op}: target must hold classes {wanted}, but has {int(target[row])} in row {row}"
        )


def _one_hot(target: Tensor, classes: int) -> Tensor:
    return (target.unsqueeze(-1) == torch.arange(classes, device=target.device)).double()


def _unit(value: Tensor) -> tuple[Tensor, int]:
    """A matrix in float64 with its largest element in [1/2, 1), and the power of two that was taken out."""
    value = value.double()
    largest = float(value.abs().amax()) if value.numel() else 0.0
    exponent = math.frexp(largest)[1]
    return _scaled(value, -exponent), exponent


def _scaled(value: Tensor, exponent: int) -> Tensor:
    """Times a power of two, in two steps: one alone might not be a float64."""
    half = max(-1000, min(1000, exponent))
    rest = max(-1000, min(1000, exponent - half))
    return value * 2.0**half * 2.0**rest


def _system(op: str, batch: Batch, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Features and residual, each in a unit of its own, and the size of what the residual is the difference of."""
    phi, unit = _unit(batch.features)
    if batch.classes:
        _check_classes(op, batch.target, weight.shape[0])
        y, unit_y = _one_hot(batch.target, weight.shape[0]), 0
    else:
        checks.size(op, "target", batch.target, -1, weight.shape[0], "the rows of weight")
        y, unit_y = _unit(batch.target)
    w, unit_w = _unit(weight)
    parts = [(y, y.abs(), unit_y), (-(phi @ w.mT), phi.abs() @ w.abs().mT, unit + unit_w)]
    if bias is not None:
        b, unit_b = _unit(bias)
        parts.append((-b, b.abs(), unit_b))
        # The feature of ones, in the unit of the larger.
        common = max(unit, 1)
        ones = phi.new_full((phi.shape[0], 1), 2.0 ** max(-1000, -common))
        phi = torch.cat((_scaled(phi, unit - common), ones), 1)
    most = max((part[2] for part in parts if bool(part[0].any())), default=0)
    residual = sum((_scaled(part, exponent - most) for part, _, exponent in parts), torch.zeros_like(y))
    size = sum((_scaled(part, exponent - most) for _, part, exponent in parts), torch.zeros_like(y))
    return phi, residual, torch.linalg.vector_norm(size)
