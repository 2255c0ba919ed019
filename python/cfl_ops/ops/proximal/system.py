"""What a step's info says of its data and of its head, and how its row weights enter a derivative, in torch ops."""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops.ops.proximal.codes import BAD_FEATURES, BAD_TARGET, BAD_WEIGHT
from cfl_ops.ops.solve.system import on_device

TINY_WEIGHT = 1e-30
"""Of the sum of the row weights: it changes no digit of anything, and its root is far from the end of float64."""


def data_info(info: Tensor, features: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Info, or what is wrong with the features, the target or the head, where something is."""
    good = weight.isfinite().all(-1).all(-1)
    if bias is not None:
        good = good & bias.isfinite().all(-1)
    info = torch.where(good, info, BAD_WEIGHT)
    if target.is_floating_point():
        good = target.isfinite().all(-1).all(-1)
    else:
        good = ((target >= 0) & (target < weight.shape[-2])).all(-1)
    info = torch.where(good, info, BAD_TARGET)
    return torch.where(features.isfinite().all(-1).all(-1), info, BAD_FEATURES)


def or_inaccurate(info: Tensor, error: Tensor, best: Tensor, size: Tensor, order: int) -> Tensor:
    """Info, or the order of the system where the error of the head could show in its loss.

    That is where the loss may be twice the best one and a thousandth of the targets' squares more. The numbers are
    those of csrc/cpu/proximal.cpp.

    Args:
        error: the root of what the objective can still gain, which bounds how far the residual is from the best one.
        best: the norm of the best residual.
        size: that of the targets.

    """
    return torch.where((info == 0) & ~(error <= 0.4 * best + 0.014 * size), order, info)


def off_zero(sample_weight: Tensor, lam: Tensor, ridge: Tensor | None, lam_diag: Tensor | None) -> Tensor:
    """Row weights in float64; those of zero a little above it, for a derivative.

    They enter as square roots, which have none at zero. The step has one there, but where nothing is penalised: then
    the least weight fits its row. With lam_diag every feature is.
    """
    s = sample_weight.to(torch.float64)
    penalty = on_device(lam, s) if ridge is None else on_device(lam, s) + on_device(ridge, s)
    penalised = (penalty > 0 if lam_diag is None else torch.ones_like(penalty, dtype=torch.bool)).unsqueeze(
        -1
    )
    return s + torch.where((s == 0) & penalised, TINY_WEIGHT * s.detach().sum(-1, keepdim=True), 0.0)
