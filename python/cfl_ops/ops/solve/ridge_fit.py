"""ridge_fit: ridge regression at one or many penalties, which ridge, ridge_path and class_ridge are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core.op import Derivative, define_op, gradients
from cfl_ops.ops.solve.codes import BAD_PENALTY, NOT_FINITE, UNRESOLVED
from cfl_ops.ops.solve.eigen_ridge import GRAM_LIMIT, EigenRidge, Equilibrated
from cfl_ops.ops.solve.regression import centred, gram_of_rows, moments
from cfl_ops.ops.solve.tall import may_synchronise


class RidgeFitArguments(NamedTuple):
    """What the op takes."""

    x: Tensor
    y: Tensor | None
    cross: Tensor | None
    """Added to X^T Y, ``(..., L, D, K)``: the gradients, in a derivative."""
    lam: Tensor
    """``(..., L, 1)`` or ``(..., L, K)`` in float64: of each fit the penalty of all targets, or that of each."""
    bias: bool
    """Whether x and y are centred first."""


def _ridge_fit_python(args: RidgeFitArguments) -> tuple[Tensor, Tensor]:
    """(X^T X + lam I)^-1 (X^T Y + C) in float64; of a singular system the minimum-norm fit."""
    x, _, _, lam, _ = args
    batch = x.shape[:-2]
    good = ((lam >= 0) & lam.isfinite()).all(-1).all(-1)
    args = args._replace(lam=torch.where(good[..., None, None], lam, 1.0))
    if lam.shape[-2:] == (1, 1) and x.numel():
        weight, hard = _by_cholesky(args)
    else:
        weight = torch.empty(_weight_shape(args), dtype=torch.float64, device=x.device)
        hard = torch.ones(batch, dtype=torch.bool, device=x.device)
    bad = ~x.isfinite().all(-1).all(-1)
    hard = hard & good & ~bad
    info = torch.where(bad, NOT_FINITE, 0)
    if not may_synchronise(x):
        info = torch.where(hard, UNRESOLVED, info)
    elif bool(hard.any()):
        for index in hard.nonzero().tolist():
            weight[tuple(index)] = _by_singular_values(args, tuple(index))
    info = torch.where(good, info, BAD_PENALTY).to(torch.int32)
    return torch.where((info == 0)[..., None, None, None], weight, torch.nan), info


def _weight_shape(args: RidgeFitArguments) -> tuple[int, ...]:
    x, y, cross, lam, _ = args
    targets = y.shape[-1] if y is not None else cross.shape[-1]  # type: ignore[union-attr]
    return (*x.shape[:-2], lam.shape[-2], x.shape[-1], targets)


def _by_singular_values(args: RidgeFitArguments, index: tuple[int, ...]) -> Tensor:
    x, y, cross, lam, bias = (value[index] if isinstance(value, Tensor) else value for value in args)
    alone = lam.numel() == 1  # then the Gram matrix has been tried
    whole = EigenRidge(x, bias, float(lam.min()), exact=alone or cross is not None)
    weights = torch.zeros(
        _weight_shape(RidgeFitArguments(x, y, cross, lam, bias)), dtype=torch.float64, device=x.device
    )
    if y is not None:
        coordinates = whole.coordinates(centred(y, bias))
        for weight, penalty in zip(weights, lam, strict=True):
            weight += whole.weight(coordinates, penalty)
    if cross is not None:
        for weight, right, penalty in zip(weights, cross.double(), lam, strict=True):
            weight += whole.penalised(right, penalty)
    return weights


def _by_cholesky(args: RidgeFitArguments) -> tuple[Tensor, Tensor]:
    """The fit at one penalty through the smaller Gram matrix, and where that is not to be used."""
    x, y, cross, lam, bias = args
    rows, lam = centred(x, bias), lam.squeeze(-1)
    targets = None if y is None else centred(y, bias)
    right = None if cross is None else cross.squeeze(-3).double()
    precise = torch.float64 in (x.dtype, None if y is None else y.dtype)
    if x.shape[-2] - int(bias) >= x.shape[-1]:
        if targets is None:
            gram, total = moments(rows, rows[..., :0])[0], right
        else:
            gram, total = moments(rows, targets)
            total = total if right is None else total + right
        assert total is not None
        system = Equilibrated(gram, lam)
        weight = system.solve(total)
        if precise and system.doubtful():
            change = (
                -(rows.mT.double() @ (rows.double() @ weight))
                if targets is None
                else rows.mT.double() @ (targets.double() - rows.double() @ weight)
            )
            change = change - lam.unsqueeze(-1) * weight
            weight = weight + system.solve(change if right is None else change + right)
    else:
        gram = gram_of_rows(rows)
        if bias:  # the constant vector, in which no right side has a part, is no longer an eigenvector of 0
            gram = gram + (gram.diagonal(dim1=-2, dim2=-1).mean(-1) / x.shape[-2])[..., None, None]
        system = Equilibrated(gram, lam)
        outside = None
        total = targets
        if right is not None:
            outside = right / torch.where(lam > 0, lam, torch.nan).unsqueeze(-1)
            total = -(rows.double() @ outside) if total is None else total.double() - rows.double() @ outside
        assert total is not None
        total = total.double()
        alpha = system.solve(total)
        if precise and system.doubtful():
            change = total - rows.double() @ (rows.mT.double() @ alpha) - lam.unsqueeze(-1) * alpha
            alpha = alpha + system.solve(change)
        weight = rows.mT.double() @ alpha
        weight = weight if outside is None else weight + outside
    limit = GRAM_LIMIT[torch.float32]
    hard = ~(system.condition <= limit)
    return weight.unsqueeze(-3), hard


def _ridge_fit_fake(args: RidgeFitArguments) -> tuple[Tensor, Tensor]:
    x = args.x
    return x.new_empty(_weight_shape(args), dtype=torch.float64), x.new_empty(x.shape[:-2], dtype=torch.int32)


def _ridge_fit_setup_context(ctx: Any, inputs: RidgeFitArguments, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs.x, inputs.y, inputs.lam, output[0])
    ctx.bias, ctx.cross_dtype = inputs.bias, None if inputs.cross is None else inputs.cross.dtype


def _ridge_fit_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    """With S = X^T X + lam I, Z = S^-1 Wbar and R = Y - X W, summed over the fits: Ybar = X Z, Cbar = Z,
    Xbar = R Z^T - X Z W^T, lambar = -<Z, W> by target.
    """
    if grad is None:
        return gradients(RidgeFitArguments)
    x, y, lam, weight = ctx.saved_tensors
    z, _ = RIDGE_FIT(x, None, grad, lam, ctx.bias)
    rows = centred(x, ctx.bias).double()
    result: dict[str, Tensor | None] = {}
    predicted, reach = rows.unsqueeze(-3) @ weight, rows.unsqueeze(-3) @ z
    residual = -predicted if y is None else centred(y, ctx.bias).double().unsqueeze(-3) - predicted
    if ctx.needs_input_grad[0]:
        result["x"] = (residual @ z.mT - reach @ weight.mT).sum(-3).to(x.dtype)
    if y is not None:
        result["y"] = reach.sum(-3).to(y.dtype)
    if ctx.cross_dtype is not None:
        result["cross"] = z.to(ctx.cross_dtype)
    each = -(z * weight).sum(-2)
    result["lam"] = each if lam.shape[-1] == each.shape[-1] else each.sum(-1, keepdim=True)
    return gradients(RidgeFitArguments, **result)


def _check(args: RidgeFitArguments) -> None:
    _, y, cross, lam, _ = args
    if y is None and cross is None:
        raise ValueError("cfl_ops.ridge_fit: y or cross must be given")
    targets = y.shape[-1] if y is not None else cross.shape[-1]  # type: ignore[union-attr]
    if lam.shape[-1] not in (1, targets):
        raise ValueError(
            f"cfl_ops.ridge_fit: lam must have size 1 or {targets} (the targets) in its last dimension, but got "
            f"shape {tuple(lam.shape)}"
        )


RIDGE_FIT = define_op(
    "ridge_fit(Tensor x, Tensor? y, Tensor? cross, Tensor lam, bool bias) -> (Tensor weight, Tensor info)",
    arguments=RidgeFitArguments,
    python=_ridge_fit_python,
    fake=_ridge_fit_fake,
    shapes={"x": "B D", "y": "B K", "cross": "L D K", "lam": "float64 L T"},
    check=_check,
    derivative=Derivative(_ridge_fit_setup_context, _ridge_fit_backward),
    composite=True,
)
