"""cholesky: factors that follow a changing matrix, and factors of matrices that are barely definite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._library import Derivative, check_info, define_op, expand_batch, explains, first_failure
from .errors import LinAlgError

__all__ = [
    "cholesky_downdate",
    "cholesky_downdate_",
    "cholesky_downdate_ex",
    "cholesky_downdate_ex_",
    "cholesky_update",
    "cholesky_update_",
    "cholesky_update_ex",
    "cholesky_update_ex_",
]

# What a negative info says; a positive one is the order of the first pivot that is not positive.
BAD_V, BAD_L = -1, -2

# A downdate fails where it leaves less than this many eps of a squared pivot: what is left is rounding.
LOST_PIVOT = 10


# --- rank-k update: fallback, fake, derivative ----------------------------------------------------------------


def _update_python(L: Tensor, V: Tensor, alpha: float, decay: float) -> tuple[Tensor, Tensor]:
    """Column by column, a reflector turns (L_jj, row j of W) into (r, 0) and acts on the rows below.

    W is V sqrt(|alpha|). For a downdate the reflector is hyperbolic; both are stable in this form.
    """
    order, eps = L.shape[-1], torch.finfo(L.dtype).eps
    old = L.tril()
    out = old * math.sqrt(decay)
    w = V * math.sqrt(abs(alpha))
    side = -1.0 if alpha < 0 else 1.0
    pivots = []
    for j in range(order):
        sign = torch.where(out[..., j, j] < 0, -1.0, 1.0).to(out.dtype)
        column = out[..., j:, j] * sign.unsqueeze(-1)
        l, v = column[..., 0], w[..., j, :]
        # Scaled by the largest entry, so that squares neither overflow nor underflow.
        unit = torch.maximum(l, v.abs().amax(-1)) if v.shape[-1] else l
        safe_unit = torch.where(unit > 0, unit, 1.0)
        l1, v1 = l / safe_unit, v / safe_unit.unsqueeze(-1)
        square = l1 * l1 + side * (v1 * v1).sum(-1)
        lost = ~(square > LOST_PIVOT * eps * l1 * l1) if alpha < 0 else ~(square >= 0)
        r1 = square.clamp(min=0).sqrt()
        r = r1 * safe_unit
        pivots.append(lost | ~r.isfinite())
        still = r1 == 0  # a zero column of a semi-definite factor stays one
        safe_r1 = torch.where(still, 1.0, r1)
        s = (v1 / safe_r1.unsqueeze(-1)).masked_fill(still.unsqueeze(-1), 0.0)
        g = v1 / torch.where(still, 1.0, l1 + r1).unsqueeze(-1)
        c = torch.where(still, 1.0, l1 / safe_r1)
        below = w[..., j:, :]
        new = c.unsqueeze(-1) * column + side * (below @ s.unsqueeze(-1)).squeeze(-1)
        w[..., j:, :] = below - (column + new).unsqueeze(-1) * g.unsqueeze(-2)
        out[..., j:, j] = new
        out[..., j, j] = r
    bad_v = ~V.isfinite().flatten(-2).all(-1)
    bad_l = ~old.isfinite().flatten(-2).all(-1)
    info = torch.zeros(L.shape[:-2], dtype=torch.int32, device=L.device)
    if order:
        failed = torch.stack(pivots, -1)
        first = (failed.to(torch.int32).argmax(-1) + 1).to(torch.int32)
        info = torch.where(failed.any(-1), first, info)
        info = torch.where(bad_l, BAD_L, info)
        info = torch.where(bad_v, BAD_V, info)
    return torch.where((info != 0)[..., None, None], old, out), info.to(torch.int32)


def _update_python_(L: Tensor, V: Tensor, alpha: float, decay: float) -> Tensor:
    out, info = _update_python(L, V, alpha, decay)
    L.copy_(out + L.triu(1))
    return info


def _update_fake(L: Tensor, V: Tensor, alpha: float, decay: float) -> tuple[Tensor, Tensor]:
    return L.new_empty(L.shape), L.new_empty(L.shape[:-2], dtype=torch.int32)


def _update_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    L, V, ctx.alpha, ctx.decay = inputs
    ctx.save_for_backward(L, V, output[0])
    if isinstance(ctx, torch.autograd.function.FunctionCtx):
        ctx.mark_non_differentiable(output[1])


def _factor_backward(factor: Tensor, grad: Tensor) -> Tensor:
    """The symmetric gradient with respect to A of a function of its Cholesky factor (Murray 2016, Eq. 10)."""
    inner = (factor.mT @ grad.tril()).tril()
    inner = inner - 0.5 * torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    left = torch.linalg.solve_triangular(factor.mT, inner, upper=True)
    both = torch.linalg.solve_triangular(factor, left, upper=False, left=False)
    return 0.5 * (both + both.mT)


def _update_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """Through A = decay L L^T + alpha V V^T; made of differentiable ops, so twice, too."""
    if grad is None:
        return None, None, None, None
    L, V, factor = ctx.saved_tensors
    of_matrix = _factor_backward(factor, grad)
    grad_l = (2 * ctx.decay * of_matrix @ L.tril()).tril() if ctx.needs_input_grad[0] else None
    grad_v = 2 * ctx.alpha * of_matrix @ V if ctx.needs_input_grad[1] else None
    return grad_l, grad_v, None, None


UPDATE = define_op(
    "cholesky_update(Tensor L, Tensor V, float alpha, float decay) -> (Tensor L, Tensor info)",
    python=_update_python,
    fake=_update_fake,
    core_dims=(2, 2, None, None),
    derivative=Derivative(_update_setup_context, _update_backward),
)
UPDATE_ = define_op(
    "cholesky_update_(Tensor(a!) L, Tensor V, float alpha, float decay) -> Tensor info",
    python=_update_python_,
    fake=lambda L, V, alpha, decay: L.new_empty(L.shape[:-2], dtype=torch.int32),
    core_dims=(2, 2, None, None),
)
