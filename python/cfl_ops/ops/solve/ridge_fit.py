"""ridge_fit: ridge regression at one or many penalties, which ridge, ridge_path and class_ridge are made of."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core.op import Derivative, define_op, gradients
from cfl_ops.ops.solve.codes import BAD_PENALTY, NOT_FINITE, UNRESOLVED
from cfl_ops.ops.solve.eigen_ridge import GRAM_LIMIT, EigenRidge
from cfl_ops.ops.solve.narrow_ridge import NARROW_RIDGE, Equilibrated
from cfl_ops.ops.solve.regression import centred, free_rows, moments
from cfl_ops.ops.solve.tall import NARROW, may_synchronise

REFINED = 1e3
"""The condition from which a float64 solution by its Gram matrix is refined."""


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
    weight, condition = None, None
    if lam.shape[-2:] == (1, 1) and x.numel():
        weight, condition = _by_cholesky(args)
        if x.is_cpu and _all_good(lam, condition):  # the usual case, told with few questions
            return weight, torch.zeros(x.shape[:-2], dtype=torch.int32)
    batch = x.shape[:-2]
    good = ((lam >= 0) & lam.isfinite()).all(-1).all(-1)
    if weight is None or condition is None:
        weight = torch.empty(_weight_shape(args), dtype=torch.float64, device=x.device)
        condition = torch.full(batch, torch.inf, dtype=torch.float64, device=x.device)
    bad = ~x.isfinite().all(-1).all(-1)
    hard = ~(condition <= GRAM_LIMIT[torch.float32]) & good & ~bad
    info = torch.where(bad, NOT_FINITE, 0)
    if not may_synchronise(x):
        info = torch.where(hard, UNRESOLVED, info)
    elif bool(hard.any()):
        for index in hard.nonzero().tolist():
            weight[tuple(index)] = _by_singular_values(args, tuple(index))
    info = torch.where(good, info, BAD_PENALTY).to(torch.int32)
    return torch.where((info == 0)[..., None, None, None], weight, torch.nan), info


def _all_good(lam: Tensor, condition: Tensor) -> bool:
    """Whether every penalty is one, and the Gram matrices can be trusted."""
    if lam.numel() == 1 == condition.numel():
        return 0 <= lam.item() < math.inf and condition.item() <= GRAM_LIMIT[torch.float32]
    trusted = condition.numel() == 0 or float(condition.amax()) <= GRAM_LIMIT[torch.float32]
    return trusted and bool(((lam >= 0) & (lam < math.inf)).all())


def _weight_shape(args: RidgeFitArguments) -> tuple[int, ...]:
    x, y, cross, lam, _ = args
    targets = y.shape[-1] if y is not None else cross.shape[-1]  # type: ignore[union-attr]
    return (*x.shape[:-2], lam.shape[-2], x.shape[-1], targets)


def _by_singular_values(args: RidgeFitArguments, index: tuple[int, ...]) -> Tensor:
    x, lam, bias = args.x[index], args.lam[index], args.bias
    y = None if args.y is None else args.y[index]
    cross = None if args.cross is None else args.cross[index]
    alone = lam.numel() == 1  # then the Gram matrix has been tried
    whole = EigenRidge(x, bias, float(lam.min()) if lam.numel() else 0.0, exact=alone or cross is not None)
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
    """The fit at one penalty through the smaller Gram matrix, and how far it can be trusted: its condition."""
    x, y, cross, lam, bias = args
    lam = lam[..., 0, 0]
    right = None if cross is None else cross.squeeze(-3).double()
    precise = torch.float64 in (x.dtype, None if y is None else y.dtype)
    if x.shape[-2] - int(bias) >= x.shape[-1]:
        rows, targets = centred(x, bias), None if y is None else centred(y, bias)
        system = _NormalEquations(rows, lam)
        weight = system.solve(targets, right)
        if precise and system.doubtful():
            rest = rows.double() @ weight
            change = rows.mT.double() @ (-rest if targets is None else targets.double() - rest)
            change = change - lam[..., None, None] * weight
            weight = weight + system.solve(None, change if right is None else change + right)
    else:  # W = X^T A + C / lam with (X X^T + lam I) A = Y - X C / lam
        rows, total = free_rows(x, bias), None if y is None else free_rows(y, bias).double()
        if right is not None:
            right = right / lam[..., None, None]
            total = -(rows.double() @ right) if total is None else total - rows.double() @ right
        assert total is not None
        system = _NormalEquations(rows.mT, lam)
        alpha = system.solve(None, total)
        weight = rows.mT.double() @ alpha
        if precise and system.doubtful():
            change = total - rows.double() @ weight - lam[..., None, None] * alpha
            weight = weight + rows.mT.double() @ system.solve(None, change)
        if right is not None:
            weight = weight + right
            system.condition = torch.where(lam > 0, system.condition, torch.inf)
    return weight.unsqueeze(-3), system.condition


class _NormalEquations:
    """The system T^T T + lam I; its condition comes with a solution."""

    def __init__(self, t: Tensor, lam: Tensor) -> None:
        self.t, self.lam = t, lam
        self.condition = torch.empty(0)
        self._system: Equilibrated | None = None

    def solve(self, b: Tensor | None, right: Tensor | None) -> Tensor:
        """For the right side T^T b + right."""
        targets = b if right is None else right
        assert targets is not None
        if max(self.t.shape[-1], targets.shape[-1]) <= NARROW:
            solution: Tensor
            solution, self.condition = NARROW_RIDGE(self.t, b, right, self.lam)
            return solution
        cross = None
        if self._system is None:
            gram, cross = moments(self.t, self.t[..., :0] if b is None else b)
            self._system = Equilibrated(gram, self.lam.unsqueeze(-1))
        elif b is not None:
            cross = self.t.mT.double() @ b.double()
        if b is None or cross is None:
            assert right is not None
            total = right
        else:
            total = cross if right is None else cross + right
        solution = self._system.solve(total)
        self.condition = self._system.condition
        return solution

    def doubtful(self) -> bool:
        """Whether a float64 solution has lost more digits than one refinement costs."""
        return may_synchronise(self.t) and bool((self.condition > REFINED).any())


def _ridge_fit_fake(args: RidgeFitArguments) -> tuple[Tensor, Tensor]:
    x = args.x
    return x.new_empty(_weight_shape(args), dtype=torch.float64), x.new_empty(x.shape[:-2], dtype=torch.int32)


def _ridge_fit_setup_context(ctx: Any, inputs: RidgeFitArguments, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs.x, inputs.y, inputs.cross, inputs.lam, output[0])
    ctx.bias = inputs.bias


def _ridge_fit_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    """With S = X^T X + lam I, Z = S^-1 Wbar and R = Y - X W, summed over the fits: Ybar = X Z, Cbar = Z,
    Xbar = R Z^T - X Z W^T, lambar = -<Z, W> by target.

    For fewer rows than columns with A = R / lam: R Z^T = A (Wbar - X^T X Z)^T and <Z, W> = <X Z, A>, for R goes to 0
    with lam, and Z to infinity.
    """
    if grad is None:
        return gradients(RidgeFitArguments)
    x, y, cross, lam, weight = ctx.saved_tensors
    z, _ = RIDGE_FIT(x, None, grad, lam, ctx.bias)
    rows = centred(x, ctx.bias).double()
    targets = None if y is None else centred(y, ctx.bias).double()
    of_x, of_lam = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    change = pull = None
    if x.shape[-2] - int(ctx.bias) < x.shape[-1]:
        reach = through_rows(rows, grad, lam)
        if of_x or of_lam:
            if targets is not None:
                targets = targets.unsqueeze(-3).expand(*reach.shape[:-1], targets.shape[-1])
            change, pull = of_fewer_rows(rows, targets, cross, lam, grad, reach, z, weight)
    else:
        reach = rows.unsqueeze(-3) @ z
        if of_x:
            residual = -(rows.unsqueeze(-3) @ weight)
            residual = residual if targets is None else residual + targets.unsqueeze(-3)
            change = residual @ z.mT - reach @ weight.mT
        if of_lam:
            pull = (z * weight).sum(-2)
    if pull is not None and lam.shape[-1] != pull.shape[-1]:
        pull = pull.sum(-1, keepdim=True)
    return gradients(
        RidgeFitArguments,
        x=None if change is None else change.sum(-3).to(x.dtype),
        y=None if y is None else reach.sum(-3).to(y.dtype),
        cross=None if cross is None else z.to(cross.dtype),
        lam=None if pull is None else -pull,
    )


def of_fewer_rows(
    rows: Tensor,
    targets: Tensor | None,
    cross: Tensor | None,
    lam: Tensor,
    grad: Tensor,
    reach: Tensor,
    z: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """Xbar ``(..., L, B, D)`` and <Z, W> ``(..., L, K)`` of :func:`_ridge_fit_backward`, for fewer rows than columns.

    Args:
        rows: X ``(..., B, D)``.
        targets: ``(..., L, B, K)``.
        reach: X Z, of :func:`through_rows`.

    """
    across = rows.unsqueeze(-3).mT
    change, pull, of_cross = -reach @ weight.mT, torch.zeros_like(z[..., 0, :]), weight
    if targets is not None:
        alpha, _ = RIDGE_FIT(rows.mT, None, targets, lam, False)
        change = change + alpha @ (grad - across @ reach).mT
        pull, of_cross = (reach * alpha).sum(-2), weight - across @ alpha
    if cross is not None:
        change = change - through_rows(rows, cross.double(), lam) @ z.mT
        pull = pull + (z * of_cross).sum(-2)
    return change, pull


def through_rows(rows: Tensor, side: Tensor, lam: Tensor) -> Tensor:
    """X (X^T X + lam I)^-1 side for each fit: its ridge regression on X^T, in which 1 / lam does not appear.

    Args:
        rows: X ``(..., B, D)``.
        side: ``(..., L, D, K)``.
        lam: ``(..., L, 1)`` or ``(..., L, K)``.

    """
    reach: Tensor
    each = rows.mT.unsqueeze(-3).expand(*side.shape[:-1], rows.shape[-2])
    reach, _ = RIDGE_FIT(each, side, None, lam.unsqueeze(-2), False)
    reach = reach.squeeze(-3)
    return reach


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
