"""One training step of a backbone with a closed-form head: Algorithms 1 and 2 of the paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    prediction = head(features)
    rows = prediction.reshape(-1, head.out_features)
    if target.dtype == torch.int64:
        one_hot = F.one_hot(target.reshape(-1), head.out_features).to(rows.dtype)
    else:
        one_hot = target.reshape(rows.shape)
    squared = (one_hot - rows).square().sum()
    (squared / max(1, len(rows)) if head.reduction == "mean" else squared).backward()
    optimizer.step()
    if order == "backbone-first":
        with torch.no_grad():
            features = backbone(x)
    loss, _ = head.update(features, target)
    return loss
