"""A solve over several processes: what all ranks must agree on, and the head of the global batch."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.gram.moments import GramMoments
from cfl_ops.ops.proximal.codes import BIAS_FITS, REDUCTIONS

from . import distributed
from .distributed import NO_SAY, Choice, Ranks, Traffic
from .head import CHECKS, METHODS, Batch, squared_loss
from .head_moments import batch_moments, moments_bytes, moments_loss, pack, unpack
from .schedules import LamSchedule

if TYPE_CHECKING:
    from .closed_form_linear import ClosedFormLinear

__all__ = ["solve_together"]


def _facts(head: ClosedFormLinear, batch: Batch | None, solve: bool) -> dict[str, float | Choice]:
    """What all ranks must have alike."""
    lam, diagonal = head._lam, head.lam_diag
    schedule = isinstance(lam, LamSchedule)
    return {
        "in_features": head.in_features,
        "out_features": head.out_features,
        "method": Choice(head.method, METHODS),
        "reduction": Choice(head.reduction, tuple(REDUCTIONS)),
        "fit_bias": Choice(head.fit_bias, tuple(BIAS_FITS)),
        "check": Choice(head.check_when, CHECKS),
        "dtype of the head": Choice(head.weight.dtype, checks.FLOATS),
        "bias": Choice(head.bias is not None, (False, True)),
        "relative": Choice(head.relative, (False, True)),
        "solve": Choice(solve, (False, True)),
        "lam": lam.get_last_lam() if isinstance(lam, LamSchedule) else float(lam),
        "ridge": float(head.ridge),
        "lam (a schedule)": Choice(schedule, (False, True)),
        "lam_diag": distributed.fingerprint(diagonal),
        "kappa": head.kappa,
        "target_scale": head.target_scale,
        "decay": head.decay,
        **rows_facts(batch),
    }


def rows_facts(batch: Batch | None) -> dict[str, float | Choice]:
    """What the rows of all ranks must have alike; a rank without any has no say."""
    kinds: tuple[Any, Any, Any] = (NO_SAY, NO_SAY, NO_SAY)
    if batch is not None and batch.features.shape[0]:
        features, target, weight, _ = batch
        kinds = (features.dtype, target.dtype, None if weight is None else weight.dtype)
    return {
        "dtype of features": Choice(kinds[0], checks.FLOATS),
        "dtype of target": Choice(kinds[1], (torch.int64, *checks.FLOATS)),
        "dtype of sample_weight": Choice(kinds[2], (None, *checks.FLOATS)),
    }


def of_their_kind(ranks: Ranks, batch: Batch, outputs: int) -> Batch:
    """An empty batch as the rows of the other ranks are, if there are any."""
    if batch.features.shape[0] or not ranks.total:
        return batch
    dtype, target, weight = (ranks.known[name] for name in rows_facts(None))
    rows = batch.features.to(dtype)
    shape = (0,) if target is torch.int64 else (0, outputs)
    device = rows.device
    weights = None if weight is None else torch.zeros(0, dtype=weight, device=device)
    return Batch(rows, torch.zeros(shape, dtype=target, device=device), weights, batch.wide)


def solve_together(
    head: ClosedFormLinear,
    group: Any,
    batch: Batch | None,
    error: Exception | None,
    *,
    solve: bool,
    moments: GramMoments | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve on (or evaluate) the batches of all ranks; the loss of all, and the gradient of this rank's rows."""
    distributed.refuse_graph(head.name)
    weight, bias = head.weight, head.bias
    device = distributed.device_for(group, weight)

    def repair() -> None:
        distributed.copy_from_first(head.name, group, (weight, bias), not head._agreed)

    ranks = distributed.agree(
        head.name, group, device, 0 if batch is None else batch.features.shape[0], moments is not None,
        _facts(head, batch, solve), error, (weight, bias), repair,
    )  # fmt: skip
    head._agreed = True
    if weight.requires_grad:
        warnings.warn(
            f"cfl_ops.{head.name}: the head's weight requires grad, though it is solved: where it is part of a "
            "DistributedDataParallel module, that waits for its gradient; call head.requires_grad_(False)",
            stacklevel=5,
        )
    assert batch is not None
    batch = of_their_kind(ranks, batch, head.out_features)
    if not ranks.total and not ranks.by_moments:  # no data is no step
        return batch.features.new_zeros((), dtype=torch.float32), torch.zeros_like(batch.features)
    if not solve:
        return _evaluate(head, ranks, batch)
    order = head.in_features + int(bias is not None)
    share = (ranks.size - 1) / ranks.size
    as_features = ranks.total * distributed.row_bytes(batch)
    as_moments = 2 * moments_bytes(order, head.out_features)
    by_rows = head.rescaled or (as_features <= as_moments and not ranks.by_moments)
    costs = round(share * as_features), round(share * as_moments)
    head.traffic = Traffic("features" if by_rows else "moments", costs[0 if by_rows else 1], *costs)
    if not by_rows:
        return _solve_moments(head, ranks, batch, moments, device)
    whole = distributed.gather_rows(ranks, batch)
    try:
        loss, grad = head._solve_here(whole, *head._penalties(whole))
    except (ValueError, IndexError) as failure:
        ranks.explain_rows(failure)
        raise
    return loss, grad[ranks.mine] * ranks.size


def _solve_moments(
    head: ClosedFormLinear, ranks: Ranks, batch: Batch, moments: GramMoments | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    order, outputs = head.in_features + int(head.bias is not None), head.out_features
    failure: Exception | None = None
    try:
        mine = batch_moments(batch, outputs, head.bias is not None)
        packed = pack(mine if moments is None else mine + moments)
    except Exception as error:
        failure = error
        packed = torch.full(
            (moments_bytes(order, outputs) // 8,),
            math.nan,
            dtype=torch.float64,
            device=head.weight.device,
        )
    total = unpack(distributed.sum_over(ranks, packed), order, outputs)
    try:
        if not bool(packed.isfinite().all()):
            distributed.refuse_together(head.name, ranks, device, failure)
        head._solve_moments(total)
    except (ValueError, IndexError, LinAlgError):
        if head.check_when != "skip":
            raise
        return head._skip(batch.widened().features)
    batch = batch.widened()
    loss = moments_loss(total, head.weight, head.bias, head.reduction)
    count = total.count.clamp(min=torch.finfo(torch.float64).tiny) if head.reduction == "mean" else 1.0
    _, grad = squared_loss(batch, head.weight, head.bias, total=count / ranks.size)
    return loss.to(torch.promote_types(batch.features.dtype, torch.float32)), grad


def _evaluate(head: ClosedFormLinear, ranks: Ranks, batch: Batch) -> tuple[Tensor, Tensor]:
    loss, grad = squared_loss(
        batch, head.weight, head.bias, total=1.0, kappa=head.kappa, target_scale=head.target_scale
    )
    count = loss.new_tensor(float(batch.features.shape[0]), dtype=torch.float64)
    if batch.sample_weight is not None:
        count = batch.sample_weight.sum(dtype=torch.float64)
    sums = distributed.sum_over(ranks, torch.stack([loss.double(), count]))
    scale = (
        sums[1].clamp(min=torch.finfo(torch.float64).tiny)
        if head.reduction == "mean"
        else torch.ones_like(sums[1])
    )
    total = sums[0] / scale
    if head.check_when == "now" and not bool(total.isfinite()):
        raise ValueError(
            f"cfl_ops.{head.name}: features, target or predictions of a rank have NaN or Inf, or squares that overflow"
        )
    return total.to(loss.dtype), (grad * (ranks.size / scale)).to(grad.dtype)
