"""A head re-estimated on a whole data set, streamed: the evaluation of the paper beside the online one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cfl_ops._core import checks
from cfl_ops.ops.gram.accumulate import GramAccumulator, with_bar

from . import distributed
from .head import Batch
from .head_moments import Penalties, as_unit, mean_square, solve_moments

if TYPE_CHECKING:
    from .closed_form_linear import ClosedFormLinear

__all__ = ["refit"]


def refit(
    head: ClosedFormLinear,
    loader: Iterable[Any],
    backbone: nn.Module | None,
    *,
    lam: float,
    relative: bool,
    progress: bool,
) -> ClosedFormLinear:
    """See :meth:`ClosedFormLinear.refit`."""
    name = f"{head.name}.refit"
    lam = checks.number(name, "lam", lam, checks.NOT_NEGATIVE)
    relative = checks.flag(name, "relative", relative)
    if head.kappa != 1.0:
        raise ValueError(
            f"cfl_ops.{name}: a rescaled loss has a system for each class, of which no moments are kept (kappa)"
        )
    group = distributed.group_of(head.process_group)
    accumulator, error = None, None
    try:
        for batch in _batches(head, with_bar(loader, progress), backbone):
            if accumulator is None:
                accumulator = _accumulator(head, batch.classes)
            accumulator.update(*batch[:3])
    except Exception as caught:
        if group is None:
            raise
        error = caught
    if group is not None:
        accumulator = _with_others(head, name, group, accumulator, error)
    if accumulator is None:
        raise ValueError(f"cfl_ops.{name}: loader must yield batches, but there was none")
    with torch.no_grad():
        moments = accumulator.moments if group is None else accumulator.reduce(group)
        if not float(moments.count) > 0:
            raise ValueError(
                f"cfl_ops.{name}: loader must yield rows of positive weight, but there were none"
            )
        ridge = lam * as_unit(mean_square(moments, head.in_features)) if relative else lam
        zero = torch.zeros_like(head.weight)
        weight, bias = solve_moments(
            moments, zero, None if head.bias is None else torch.zeros_like(head.bias),
            Penalties(0.0, ridge, None, "mean", head.fit_bias),
        )  # fmt: skip
        # The one of a class is target_scale.
        scale = 1.0 if accumulator.num_classes is None else head.target_scale
        out = copy.deepcopy(head)
        out._pending, out._moments = [], None
        out.weight.copy_(weight * scale)
        if out.bias is not None and bias is not None:
            out.bias.copy_(bias * scale)
    return out


def _accumulator(head: ClosedFormLinear, classes: bool) -> GramAccumulator:
    return GramAccumulator(
        bias_column=head.bias is not None,
        num_classes=head.out_features if classes else None,
        acc_dtype=torch.float64,
    )


def _with_others(
    head: ClosedFormLinear,
    name: str,
    group: Any,
    accumulator: GramAccumulator | None,
    error: Exception | None,
) -> GramAccumulator | None:
    """The accumulator of this rank, empty if its loader was, when all are done; raises on all where one has failed."""
    mine = (error is not None, None if accumulator is None else accumulator.num_classes is not None)
    theirs: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(theirs, mine, group=group)
    if error is not None:
        raise error
    failed = [str(rank) for rank, (bad, _) in enumerate(theirs) if bad]
    if failed:
        raise RuntimeError(f"cfl_ops.{name}: rank {', '.join(failed)} failed (its own error says why)")
    classes = next((kind for _, kind in theirs if kind is not None), None)
    if accumulator is not None or classes is None:
        return accumulator
    empty = _accumulator(head, classes)
    rows = head.weight.new_zeros(0, head.in_features)
    empty.update(
        rows, rows.new_zeros(0, dtype=torch.int64) if classes else rows.new_zeros(0, head.out_features)
    )
    return empty


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _device_of(backbone: nn.Module, otherwise: torch.device) -> torch.device:
    """Where its parameters are, as far as they are in one place."""
    first = next(itertools.chain(backbone.parameters(), backbone.buffers()), None)
    return otherwise if first is None else first.device


def _batches(head: ClosedFormLinear, loader: Iterable[Any], backbone: nn.Module | None) -> Iterator[Batch]:
    """The batches of a loader as rows of features."""
    name = f"{head.name}.refit"
    modes = [] if backbone is None else [(module, module.training) for module in backbone.modules()]
    try:
        if backbone is not None:
            backbone.eval()
        for item in loader:
            if not isinstance(item, tuple | list) or len(item) not in (2, 3):
                raise TypeError(
                    f"cfl_ops.{name}: loader must yield (features, target), perhaps with weights of the rows, but got "
                    f"{type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
                )
            with torch.no_grad():
                x, target, *weight = item
                device = head.weight.device
                features = x if backbone is None else backbone(_moved(x, _device_of(backbone, device)))
                parts = [_moved(part, device) for part in (features, target, weight[0] if weight else None)]
                batch = head._rows(parts[0], parts[1], parts[2], False)
            yield batch
    finally:
        for module, mode in modes:
            module.training = mode
