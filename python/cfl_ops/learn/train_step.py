"""One training step of a backbone with a closed-form head: Algorithms 1 and 2 of the paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cfl_ops._core import checks

from .closed_form_linear import ClosedFormLinear

__all__ = ["train_step"]

ORDERS = ("head-first", "backbone-first", "backbone-first-cached")


def train_step(
    backbone: nn.Module,
    head: ClosedFormLinear,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    target: Tensor,
    *,
    order: str = "head-first",
) -> Tensor:
    """One step on one batch.

    Args:
        backbone: makes features ``(..., D)`` of ``x``.
        head: the closed-form head.
        optimizer: of the backbone's parameters.
        x: the batch.
        target: as :meth:`ClosedFormLinear.step` takes it.
        order: ``"head-first"`` is Algorithm 1: solve the head, then step the backbone at the new head; one
            forward and one backward. ``"backbone-first"`` is Algorithm 2: step the backbone at the old head,
            then solve the head on the features of the new backbone, which costs a second forward (without a
            graph). ``"backbone-first-cached"`` solves it on the features of the old one instead. With a head
            of zeros Algorithm 2's first backbone gradient is zero: it needs ``init="lecun"`` or a head step.

    Raises:
        TypeError, ValueError, IndexError: target does not fit, or is not finite; before the backbone is stepped (with
            ``check="next"`` of the head what its values are is told later).

    Returns:
        The loss: at the new head for Algorithm 1 and for the refit of Algorithm 2.

    Not under ``fullgraph=True`` nor ``torch.export``: it runs the optimizer.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import ClosedFormLinear, train_step
        >>> backbone, head = torch.nn.Linear(4, 8), ClosedFormLinear(8, 3)
        >>> optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
        >>> loss = train_step(backbone, head, optimizer, torch.randn(16, 4), torch.randint(3, (16,)))

    """
    checks.choice("learn.train_step", "order", order, ORDERS)
    optimizer.zero_grad()
    features = backbone(x)
    if order == "head-first":
        loss = head.step(features, target)
        optimizer.step()
        return loss
    _loss(head, features, target).backward()
    optimizer.step()
    if order == "backbone-first":
        with torch.no_grad():
            features = backbone(x)
    loss, _ = head.update(features, target)
    return loss


def _loss(head: ClosedFormLinear, features: Tensor, target: Tensor) -> Tensor:
    """The loss at the present head, of targets that the head would take: it takes them after the backbone's step."""
    name = "learn.train_step"
    checks.tensor(name, "target", target, 0)
    rows = head(features)
    lead, classes = tuple(features.shape[:-1]), head.out_features
    now = head.check_when == "now"
    if target.dtype == torch.int64:
        if target.shape not in (lead, (math.prod(lead),)):
            raise ValueError(f"cfl_ops.{name}: target must have shape {lead}, but got {tuple(target.shape)}")
        bad = (target < 0) | (target >= classes)
        if now and bool(bad.any()):
            raise IndexError(
                f"cfl_ops.{name}: target must hold class indices from 0 to {classes - 1}, but got {int(target[bad][0])}"
            )
        wanted = target.reshape(lead).unsqueeze(-1) == torch.arange(classes, device=target.device)
    else:
        checks.floating(name, "target", target, 1)
        if target.shape not in ((*lead, classes), (math.prod(lead), classes)):
            raise ValueError(
                f"cfl_ops.{name}: target must have shape {(*lead, classes)}, but got {tuple(target.shape)}"
            )
        wanted = target.reshape(rows.shape)
    # Under autocast predictions are half, whose squares overflow at 256.
    rows = rows if rows.dtype == torch.float64 else rows.float()
    squared: Tensor = (wanted.to(torch.promote_types(wanted.dtype, rows.dtype)) - rows).square().sum()
    if now and not bool(squared.isfinite()):
        raise ValueError(
            f"cfl_ops.{name}: target or the prediction has NaN or Inf, or values whose squares overflow"
        )
    return squared / max(1, math.prod(lead)) if head.reduction == "mean" else squared
