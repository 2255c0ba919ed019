"""One training step of a backbone with a closed-form head: Algorithms 1 and 2 of the paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cfl_ops._core import checks
from cfl_ops._core.overlap import beside, can_overlap

from .distributed import group_of
from .head import Head

__all__ = ["train_step"]

ORDERS = ("head-first", "backbone-first", "backbone-first-cached")
NAME = "learn.train_step"


def train_step(
    backbone: nn.Module,
    head: Head,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    target: Tensor,
    *,
    order: str = "head-first",
    sample_weight: Tensor | None = None,
    overlap: bool | str = "auto",
) -> Tensor:
    """One step on one batch.

    Args:
        backbone: makes features ``(..., D)`` of ``x``.
        head: a :class:`ClosedFormLinear` or :class:`RecursiveHead`.
        optimizer: of the backbone's parameters.
        x: the batch.
        target: as the step of the head takes it.
        order: ``"head-first"`` is Algorithm 1: solve the head, then step the backbone at the new head; one
            forward and one backward. ``"backbone-first"`` is Algorithm 2: step the backbone at the old head,
            then solve the head on the features of the new backbone, which costs a second forward (without a
            graph). ``"backbone-first-cached"`` solves it on the features of the old one instead, so that it lags behind
            by a step: with small lam and a large rate of the backbone it can diverge where the others do not. With a
            head of zeros Algorithm 2's first backbone gradient is zero: it needs ``init="lecun"`` or a head step.
        sample_weight: weights of the rows.
        overlap: with ``"backbone-first-cached"``, whether the solve runs beside the backbone's backward pass, in a
            second thread, or on a second stream of a GPU. ``"auto"``: on a GPU, or where torch leaves a core free
            (``torch.get_num_threads()`` below the number of cores) and the solve is no matter of microseconds; never
            where the head is solved over several processes, whose collectives must come in one order.

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
    checks.choice(NAME, "order", order, ORDERS)
    if overlap != "auto":
        overlap = checks.flag(NAME, "overlap", overlap)
    optimizer.zero_grad()
    features = backbone(x)
    if order == "head-first":
        loss = head.step(features, target, sample_weight=sample_weight)
        optimizer.step()
        return loss
    old = head.loss(features, target, sample_weight=sample_weight, solve=False)
    if order == "backbone-first-cached" and _overlaps(head, features, overlap):
        return _beside(head, optimizer, features, target, sample_weight, old)
    old.backward()
    optimizer.step()
    if order == "backbone-first":
        with torch.no_grad():
            features = backbone(x)
    return head.update(features, target, sample_weight=sample_weight)[0]


# A solve of fewer multiply-adds takes less time than it takes to wake a thread.
LEAST_WORK = 10_000_000


def _overlaps(head: Head, features: Tensor, overlap: bool | str) -> bool:
    if head.process_group is not None and group_of(head.process_group) is not None:
        return False
    if overlap != "auto":
        return bool(overlap)
    rows = features.numel() // max(1, head.in_features)
    work = rows * head.in_features * (min(rows, head.in_features) + 3 * head.out_features)
    return work >= LEAST_WORK and can_overlap(features.device)


def _beside(
    head: Head,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    old: Tensor,
) -> Tensor:
    """Algorithm 2 (cached), the solve beside the backward pass: that has its gradient already and needs no head."""
    detached = features.detach()

    def solve() -> Tensor:
        return head.update(detached, target, sample_weight=sample_weight)[0]

    solved = beside(solve, features.device)
    try:
        old.backward()
    finally:
        loss: Any = solved()  # waits in any case: nothing may still write to the head when this returns
    optimizer.step()
    return loss  # type: ignore[no-any-return]
