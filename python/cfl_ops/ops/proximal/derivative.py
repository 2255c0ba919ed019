"""The derivative of a proximal step: that of the fallback, made of differentiable torch ops (so twice, too)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cfl_ops._core.op import Derivative, gradients
from cfl_ops.ops.proximal.arguments import OPTIONS, ProximalArguments
from cfl_ops.ops.solve.system import on_device

TINY_WEIGHT = 1e-30
"""Of the sum of the row weights: it changes no digit of anything, and its root is far from the end of float64."""

Solve = Callable[[ProximalArguments], tuple[Tensor, ...]]


def derivative_of(solve: Solve) -> Derivative:
    """Of the op whose fallback ``solve`` is."""

    def setup_context(ctx: Any, inputs: ProximalArguments, output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:-OPTIONS], output[-1])
        ctx.options = inputs[-OPTIONS:]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, info = ctx.saved_tensors
        saved = ProximalArguments(*tensors, *ctx.options)
        needed = zip(saved._fields, ctx.needs_input_grad, strict=True)
        wanted = [name for name, need in needed if need]

        def outputs(*varied: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            changed: dict[str, Any] = dict(zip(wanted, varied, strict=True))
            if "sample_weight" in changed:
                changed["sample_weight"] = off_zero(
                    changed["sample_weight"], saved.lam, saved.ridge, saved.lam_diag
                )
            *results, own_info = beside_failures(solve, saved._replace(**changed), info != 0)
            return tuple(results), own_info

        primals, pullback, own_info = torch.func.vjp(  # type: ignore[misc]
            outputs, *(getattr(saved, name) for name in wanted), has_aux=True
        )
        # A step which another backend has made and the fallback cannot: its derivative is not known.
        unknown = (info == 0) & (own_info != 0)

        def cotangent(primal: Tensor, grad: Tensor | None) -> Tensor:
            given = torch.zeros_like(primal) if grad is None else grad
            return torch.where(_beside(unknown, primal), torch.nan, given)

        cotangents = tuple(cotangent(*pair) for pair in zip(primals, grads[:4], strict=True))
        return gradients(ProximalArguments, **dict(zip(wanted, pullback(cotangents), strict=True)))

    return Derivative(setup_context, backward)


def off_zero(sample_weight: Tensor, lam: Tensor, ridge: Tensor | None, lam_diag: Tensor | None) -> Tensor:
    """Row weights in float64; those of zero a little above it, for a derivative.

    They enter as square roots, which have none at zero. The step has one there, but where nothing is penalised: then
    the least weight fits its row. With lam_diag every feature is.
    """
    s = sample_weight.to(torch.float64)
    penalty = on_device(lam, s) if ridge is None else on_device(lam, s) + on_device(ridge, s)
    positive = penalty > 0 if lam_diag is None else torch.ones_like(penalty, dtype=torch.bool)
    return s + torch.where(
        (s == 0) & positive.unsqueeze(-1), TINY_WEIGHT * s.detach().sum(-1, keepdim=True), 0.0
    )


def beside_failures(solve: Solve, arguments: ProximalArguments, failed: Tensor) -> tuple[Tensor, ...]:
    """What ``solve`` gives, for a derivative, with an easy problem in place of each of a batch that failed.

    Their NaN would reach the derivatives of what all share. Their head is the old one, with its derivative.
    """
    if not failed.ndim:
        return solve(arguments)

    easy = {"features": 0, "target": 0, "weight": 0, "bias": 0, "lam": 1, "ridge": 0, "lam_diag": 1,
            "sample_weight": 1}  # fmt: skip
    given = {name: getattr(arguments, name) for name in easy}
    for name in ("lam", "ridge"):  # not left on the host, where torch.where would copy them from
        given[name] = None if given[name] is None else on_device(given[name], arguments.features)
    filled: dict[str, Any] = {
        name: torch.where(_beside(failed, value), easy[name], value)
        for name, value in given.items()
        if value is not None
    }
    weight, bias, *rest = solve(arguments._replace(**filled))
    weight = torch.where(failed[..., None, None], arguments.weight, weight)
    if arguments.bias is not None:
        bias = torch.where(failed.unsqueeze(-1), arguments.bias, bias)
    return (weight, bias, *rest)


def _beside(flags: Tensor, value: Tensor) -> Tensor:
    """Flags ``(...)`` of a batch in the dimensions of a value ``(..., core)``; a penalty without a batch has none."""
    return flags.reshape(flags.shape + (1,) * max(0, value.ndim - flags.ndim))
