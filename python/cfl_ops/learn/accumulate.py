"""Several batches for one solve of a head: gradient accumulation, equal to the large batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .distributed import group_of, row_bytes
from .global_head import solve_together
from .head import Batch, refuse_bad
from .head_moments import batch_moments, moments_bytes, moments_loss

if TYPE_CHECKING:
    from .closed_form_linear import ClosedFormLinear

__all__ = ["accumulate", "solve"]


@torch.no_grad()
def accumulate(head: ClosedFormLinear, batch: Batch) -> None:
    """See :meth:`ClosedFormLinear.accumulate`."""
    try:
        refuse_bad(head.name, batch, head.out_features)
    except (ValueError, IndexError):
        if head.check_when != "skip":
            raise
        head.skipped.add_(1)
        return
    if head._pending and _kind(batch) != _kind(head._pending[0]):
        _fold(head)
    head._pending.append(_kept(batch))
    size = sum(each.features.shape[0] * row_bytes(each) for each in head._pending)
    if size > moments_bytes(head.in_features + int(head.bias is not None), head.out_features):
        _fold(head)


def _fold(head: ClosedFormLinear) -> None:
    """Bring what is accumulated into moments."""
    if head.rescaled or not head._pending:  # a rescaled loss has none
        return
    moments = batch_moments(_joined(head._pending), head.out_features, head.bias is not None)
    head._moments = moments if head._moments is None else head._moments + moments
    head._pending = []


@torch.no_grad()
def solve(head: ClosedFormLinear) -> Tensor:
    """See :meth:`ClosedFormLinear.solve`."""
    head._own_weight()
    if head._moments is not None:
        _fold(head)
    batch = _joined(head._pending) if head._pending else _no_rows(head)
    group, moments = group_of(head.process_group), head._moments
    if group is not None:
        loss = solve_together(head, group, batch, None, solve=True, moments=moments)[0]
    elif not head._pending and moments is None:
        return head.weight.new_zeros((), dtype=torch.promote_types(head.weight.dtype, torch.float32))
    elif moments is None:
        loss = head._solve_here(batch, *head._penalties(batch))[0]
    else:
        head._solve_moments(moments)
        loss = moments_loss(moments, head.weight, head.bias, head.reduction)
        loss = loss.to(torch.promote_types(head.weight.dtype, torch.float32))
    head.discard()
    return loss


def _no_rows(head: ClosedFormLinear) -> Batch:
    rows = torch.zeros(0, head.in_features, device=head.weight.device)
    return Batch(rows, rows.new_zeros(0, head.out_features), None)


def _kept(batch: Batch) -> Batch:
    """A copy: the caller may write to what is a buffer of a loader or of a graph."""
    features, target, weight, _ = batch
    return Batch(features.clone(), target.clone(), None if weight is None else weight.clone())


def _kind(batch: Batch) -> tuple[torch.dtype, torch.dtype, bool]:
    """Batches of one kind can be joined."""
    return batch.target.dtype, batch.features.dtype, batch.sample_weight is None


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    features, targets, weights, _ = zip(*batches, strict=True)
    return Batch(torch.cat(features), torch.cat(targets), None if weights[0] is None else torch.cat(weights))
