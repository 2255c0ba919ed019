"""rescaled_proximal_step: the proximal step for the rescaled squared loss, all classes from one factor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core import checks
from cfl_ops.ops.proximal.arguments import check_arguments
from cfl_ops.ops.proximal.codes import BAD_PENALTY
from cfl_ops.ops.proximal.step import ProximalStep, raise_if_failed
from cfl_ops.ops.proximal.system import data_info
from cfl_ops.ops.solve.class_ridge import CLASS_SOLVE
from cfl_ops.ops.solve.system import on_device

__all__ = ["rescaled_proximal_step"]


def rescaled_proximal_step(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lam: float | Tensor,
    ridge: float | Tensor = 0.0,
    kappa: float = 1.0,
    target_scale: float = 1.0,
    reduction: str = "mean",
) -> ProximalStep:
    r"""One closed-form step for the squared loss that counts a sample's own class more.

    .. math::
        \ell(f, c) = \kappa (f_c - M)^2 + \sum_{i \ne c} f_i^2

    (Hui and Belkin's loss, Closed-Form Last Layer Optimization, Eq. 29-32, with a proximal term.) Each class
    has its own weighted system, which differs from a shared one on the rows of the class alone: the systems of
    :func:`class_ridge`, in float64. Loss and gradient are those of the head as it is stored.

    Args:
        features: ``(B, D)``, floating point.
        labels: class indices ``(B,)`` int64.
        weight: the old weight ``(K, D)``.
        bias: the old bias ``(K,)`` or None; penalised like a weight.
        lam: the proximal coefficient, >= 0; ``lam + ridge`` must be positive.
        ridge: the ridge coefficient, >= 0.
        kappa: weight of the own class, > 0.
        target_scale: M, the target of the own class.
        reduction: ``"mean"`` over the rows, or ``"sum"``.

    Returns:
        :class:`ProximalStep`, with the loss above and its gradient for the features.

    Raises:
        TypeError, ValueError: shapes, dtypes or coefficients do not fit, or NaN and Inf.
        IndexError: a class index is out of range.

    Costs what :func:`class_ridge` does, and ``2 B D K`` multiply-adds for loss and gradient. Differentiable.

    Example:
        >>> import torch, cfl_ops
        >>> step = cfl_ops.rescaled_proximal_step(
        ...     torch.eye(2), torch.tensor([0, 1]), torch.zeros(2, 2), lam=0.5, kappa=3.0, target_scale=2.0
        ... )
        >>> step.weight
        tensor([[1.5000, 0.0000],
                [0.0000, 1.5000]])

    """
    op = "rescaled_proximal_step"
    kappa = checks.number(op, "kappa", kappa, checks.POSITIVE)
    if not is_compiling():  # in a graph it is checked below, once there is something to tie the check to
        checks.number(op, "target_scale", target_scale, checks.POSITIVE)
    checks.tensor(op, "labels", labels, 1)
    if labels.dtype != torch.int64:
        raise TypeError(f"cfl_ops.{op}: labels must be int64 class indices, but got {labels.dtype}")
    checks.floating(op, "features", features, 2)
    checks.floating(op, "weight", weight, 2)
    if bias is not None:
        checks.floating(op, "bias", bias, 1)
    for name, value, dims in (
        ("features", features, 2),
        ("labels", labels, 1),
        ("weight", weight, 2),
        ("bias", bias, 1),
    ):
        if value is not None and value.ndim != dims:  # no batches
            raise ValueError(
                f"cfl_ops.{op}: {name} must have {dims} dimension{'s' * (dims > 1)}, but got shape {tuple(value.shape)}"
            )
    lam = checks.one_coefficient(op, "lam", lam, features.device)
    ridge = checks.one_coefficient(op, "ridge", ridge, features.device)
    own = (labels.unsqueeze(-1) == torch.arange(weight.shape[0], device=labels.device)).double()
    old = weight.clone()
    target_scale = checks.scalar(op, "target_scale", target_scale, checks.POSITIVE, [own, old])
    arguments = check_arguments(
        op, features, labels, old, bias, lam, ridge, None, reduction, None, "penalized", "auto"
    )
    lam, ridge = on_device(lam, own), on_device(ridge, own)
    good = (lam >= 0) & lam.isfinite() & (ridge >= 0) & ridge.isfinite()
    info = data_info(torch.zeros_like(good, dtype=torch.int32), features, labels, old, bias)
    info = torch.where(good, info, BAD_PENALTY)
    raise_if_failed(info, [own, old], arguments)
    dtype = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
    if features.shape[0] == 0:  # not a step
        new_bias = None if bias is None else bias.clone()
        return ProximalStep(old, new_bias, features.new_zeros((), dtype=dtype), torch.zeros_like(features))

    rows, width = features.shape
    phi, previous = features, old.double()
    if bias is not None:
        phi = torch.cat([phi, phi.new_ones(rows, 1)], -1)
        previous = torch.cat([previous, bias.double().unsqueeze(-1)], -1)
    scale = rows if reduction == "mean" else 1
    mu = scale * lam
    t = mu + scale * ridge
    anchor = previous * torch.where(t > 0, mu / torch.where(t > 0, t, 1.0), 1.0)
    design = phi.double()
    penalty, square, targets = t.expand(len(old)), 1 + (kappa - 1) * own, target_scale * own
    change, info = CLASS_SOLVE(phi, labels, targets - design @ anchor.mT, None, penalty, kappa)
    raise_if_failed(_of_solve(info), [change], arguments)
    # Refined once by its own residual; what that gains is what the head was off before.
    residual = targets - design @ (anchor.mT + change)
    again, info = CLASS_SOLVE(phi, labels, residual, -t * change, penalty, kappa)
    info = _of_solve(info)
    gain = ((design.mT @ (square * residual) - t * change) * again).sum().abs()
    best = (square * (residual - design @ again).square()).sum()
    off = ~(gain.sqrt() <= 0.4 * best.sqrt() + 0.014 * (square * targets.square()).sum().sqrt())
    solved = anchor + (change + again).mT
    new = solved[:, :width].to(weight.dtype)
    info = torch.where((info == 0) & off, min(phi.shape), info)
    info = torch.where((info == 0) & ~new.isfinite().all(), 1, info)
    final = target_scale * own - features.double() @ new.double().mT
    new_bias = None
    if bias is not None:  # what fits best beside the rounded weight
        new_bias = ((square * final).sum(0) + t * anchor[:, width]) / (square.sum(0) + t)
        new_bias = new_bias.to(bias.dtype)
        final = final - new_bias.double()
        info = torch.where((info == 0) & ~new_bias.isfinite().all(), 1, info)
    raise_if_failed(info, [new, final], arguments)
    weighted = square * final
    return ProximalStep(
        new,
        new_bias,
        ((weighted * final).sum() / scale).to(dtype),
        ((-2 / scale) * weighted @ new.double()).to(features.dtype),
    )


def _of_solve(info: Tensor) -> Tensor:
    """The info of class_solve as that of a step. Its arguments have been looked at: what it refuses is an overflow."""
    return torch.where(info < 0, 1, info)
