"""What a step's info says of its data and of its head, in torch ops."""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops.ops.proximal.codes import BAD_FEATURES, BAD_TARGET, BAD_WEIGHT


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
