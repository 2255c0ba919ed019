"""recursive_ridge_: rows that join the triangular system of a ridge regression, or leave it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import same_dtype
from cfl_ops._core.op import define_op
from cfl_ops.ops.cholesky.codes import BAD_STATE, BAD_WEIGHT, NOT_FINITE, TOO_LARGE, UNKNOWN_ROWS
from cfl_ops.ops.cholesky.factor import copy_good_
from cfl_ops.ops.cholesky.update import UPDATE


class Arguments(NamedTuple):
    """Of the op, as its schema has them."""

    factor: Tensor
    """``(..., D, D)``: the lower Cholesky factor L of Lambda, float32 or float64."""
    rotated: Tensor
    """``(..., K, D)``: z^T, the targets after the rotations of their rows: ``L^T W^T = z``."""
    x: Tensor
    """``(..., B, D)``, of any float dtype, as y and sample_weight."""
    y: Tensor
    """``(..., B, K)``."""
    sample_weight: Tensor | None
    """``(..., B)`` weights s >= 0. Rows of weight 0 are left out, whatever they hold."""
    decay: float
    """The weight of what is there."""
    floor: float
    """What the decay leaves at least of a squared pivot of L, ``L_jj^2``."""
    remove: bool
    """The rows leave: ``Lambda <- Lambda - X^T S X``."""


def _python(args: Arguments) -> tuple[Tensor, Tensor]:
    """The reflectors that fold X into L act on z as well: ``[L^T z; X Y]`` is triangularised as in a QR.

    Returns the errors ``Y - X W^T`` before the call, and info. Where that is not 0 nothing is changed, and the errors
    are NaN.
    """
    factor, rotated, x, y, sample_weight, decay, floor, remove = args
    dtype = factor.dtype
    lower, x, y = factor.tril(), x.to(dtype), y.to(dtype)
    info = torch.zeros(factor.shape[:-2], dtype=torch.int32, device=factor.device)
    bad_weight = info != 0
    scaled_x, scaled_y = x, y
    if sample_weight is not None:
        weight = sample_weight.double()
        bad_weight = ~((weight >= 0) & weight.isfinite()).all(-1)
        scale = weight.nan_to_num(0, 0, 0).clamp(min=0).sqrt().to(dtype).unsqueeze(-1)
        x, y = torch.where(scale > 0, x, 0.0), torch.where(scale > 0, y, 0.0)
        scaled_x, scaled_y = x * scale, y * scale
    error = y - torch.linalg.solve_triangular(lower, x.mT, upper=False).mT @ rotated.mT
    zero_pivot = (lower.diagonal(dim1=-2, dim2=-1) == 0).any(-1)
    known = _finite(lower) & _finite(rotated) & ~zero_pivot

    new, side = _decayed(lower, rotated, decay, floor)
    new, side, failed = _folded(new, side, torch.cat((scaled_x, scaled_y), -1), remove)
    good = _finite(error) & _finite(side)
    for condition, code in (
        (failed, UNKNOWN_ROWS if remove else TOO_LARGE),
        (~good & ~(failed & remove), TOO_LARGE),
        (~known, BAD_STATE),
        (~(_finite(x) & _finite(y)), NOT_FINITE),
        (bad_weight, BAD_WEIGHT),
    ):  # the first cause is asked for last
        info = torch.where(condition, code, info).to(torch.int32)
    copy_good_(factor, new, info)
    kept = (info == 0)[..., None, None]
    rotated.copy_(torch.where(kept, side, rotated))
    return torch.where(kept, error, torch.nan), info


def _finite(value: Tensor) -> Tensor:
    return value.isfinite().flatten(-2).all(-1)


def _decayed(lower: Tensor, rotated: Tensor, decay: float, floor: float) -> tuple[Tensor, Tensor]:
    """Both times sqrt(decay), but no pivot below sqrt(floor): where it is kept there, z follows, so that W stays.

    What lies below the rounding of such a pivot is cut off: it would end as denormal numbers.
    """
    scale, least = math.sqrt(decay), math.sqrt(floor)
    new, side = lower * scale, rotated * scale
    if floor == 0:
        return new, side
    pivots = new.diagonal(dim1=-2, dim2=-1)
    low = (pivots.abs() < least).any(-1)[..., None, None]
    weight = torch.linalg.solve_triangular(lower.mT.double(), rotated.mT.double(), upper=True)
    sign = torch.where(pivots < 0, -1.0, 1.0).to(pivots.dtype)
    kept = torch.where(pivots.abs() < least, sign * least, pivots)
    beneath = new.tril(-1)
    tiny = beneath.abs() < least * torch.finfo(new.dtype).eps
    raised = torch.where(tiny, 0.0, beneath) + torch.diag_embed(kept)
    moved = (raised.mT.double() @ weight).mT.to(side.dtype)
    return torch.where(low, raised, new), torch.where(low, moved, side)


def _folded(lower: Tensor, rotated: Tensor, rows: Tensor, remove: bool) -> tuple[Tensor, Tensor, Tensor]:
    """L and z^T after the rows ``[X Y]``, and whether that failed, by an update of ``[[L, 0], [z^T, C]]``.

    The corner C takes what is left of Y, and is thrown away. A removal must find enough in it.
    """
    order, targets = lower.shape[-1], rotated.shape[-2]
    corner = torch.zeros(*lower.shape[:-2], targets, targets, dtype=lower.dtype, device=lower.device)
    if remove and targets:
        much = 1e15 if lower.dtype == torch.float32 else 1e120
        corner = corner + torch.eye(targets, dtype=lower.dtype, device=lower.device) * much
    above = torch.cat((lower, lower.new_zeros(*lower.shape[:-1], targets)), -1)
    both = torch.cat((above, torch.cat((rotated, corner), -1)), -2)
    out, info = UPDATE(both, rows.mT, -1.0 if remove else 1.0, 1.0)
    return out[..., :order, :order], out[..., order:, :order], info != 0


def _fake(args: Arguments) -> tuple[Tensor, Tensor]:
    info = args.factor.new_empty(args.factor.shape[:-2], dtype=torch.int32)
    return args.factor.new_empty(args.y.shape), info


def _check(args: Arguments) -> None:
    op = "recursive_ridge_"
    same_dtype(op, "rotated", args.rotated, "factor", args.factor.dtype)
    checks.number(op, "decay", args.decay, checks.NOT_NEGATIVE)
    checks.number(op, "floor", args.floor, checks.NOT_NEGATIVE)


RECURSIVE_RIDGE_ = define_op(
    "recursive_ridge_(Tensor(a!) factor, Tensor(b!) rotated, Tensor x, Tensor y, Tensor? sample_weight, float decay, "
    "float floor, bool remove) -> (Tensor error, Tensor info)",
    arguments=Arguments,
    python=_python,
    fake=_fake,
    shapes={"factor": "full D D", "rotated": "full K D", "x": "B D", "y": "B K", "sample_weight": "B"},
    check=_check,
    as_data=("x", "y", "sample_weight"),
)
