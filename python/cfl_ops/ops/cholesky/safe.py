"""Cholesky factors and inverses of matrices that are barely positive definite, or only semi-definite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op, transforming
from cfl_ops._core.results import result_type
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.cholesky.codes import (
    FIRST_JITTER,
    INDEFINITE,
    LEAST_EIGENVALUE,
    MOST_ROUNDING,
    NOT_FINITE,
)
from cfl_ops.ops.cholesky.factor import (
    check_factor,
    factor_backward,
    inverse_of_factor,
    least_eigenvalue_above,
)

__all__ = ["SafeCholesky", "safe_cholesky", "safe_cholesky_ex", "spd_inverse", "spd_inverse_ex"]


@result_type("cholesky")
class SafeCholesky(NamedTuple):
    """A factor of a positive semi-definite matrix, and what had to be added to get it."""

    L: Tensor
    """``(..., D, D)``: lower triangular, with a positive diagonal."""
    jitter: Tensor
    """``(...)``: ``L L^T`` is ``a + jitter diag(a)``, plus 1 on the diagonal for each dead column."""


def safe_cholesky(a: Tensor, *, max_jitter: float = 0.5) -> SafeCholesky:
    r"""A Cholesky factor of any positive semi-definite matrix, with what had to be added to get it.

    .. math:: L L^T = a + \tau \, \mathrm{diag}(a) + \mathrm{diag}(\text{dead})

    The matrix is scaled to a unit diagonal, so that columns of very different size do not need (or hide) a
    jitter. Where its least eigenvalue is then above rounding, ``10 eps sqrt(D)`` by an estimate, tau is exactly 0;
    else tau starts at ``16 eps sqrt(D)`` and grows eightfold until that is so. The factor, and an inverse made of
    it, are off by a tenth at the most. A column whose diagonal entry is 0, or is negative and the rest of its row
    small by rounding, ``1024 eps D`` of the largest, is *dead*: its row and column of L are those of the identity.

    Args:
        a: ``(..., D, D)``, float32 or float64, symmetric; only the lower triangle is read.
        max_jitter: where to give up. No semi-definite matrix, rounding included, comes near.

    Returns:
        :class:`SafeCholesky` ``(L, jitter)``: the factor and tau ``(...)``, 0 where none was needed.

    Raises:
        TypeError, ValueError: a does not fit, or has NaN or Inf.
        torch.linalg.LinAlgError: a needs a larger tau (never a semi-definite matrix); names the batch index.

    Costs ``D^3 / 3`` FLOPs per attempt. Differentiable in a, tau held fixed.

    Example:
        >>> import torch, cfl_ops
        >>> L, jitter = cfl_ops.safe_cholesky(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
        >>> L, float(jitter)
        (tensor([[2., 0.],
                [0., 1.]]), 0.0)
        >>> bool(cfl_ops.safe_cholesky(torch.ones(2, 2)).jitter > 0)
        True

    """
    max_jitter = checks.number("safe_cholesky", "max_jitter", max_jitter, checks.NOT_NEGATIVE)
    result, info = _safe("safe_cholesky", a, max_jitter)
    check_info("safe_cholesky", info, list(result), [])
    return result


def safe_cholesky_ex(a: Tensor, *, max_jitter: float = 0.5) -> tuple[SafeCholesky, Tensor]:
    """As :func:`safe_cholesky`, but returns ``info`` too instead of raising, and never synchronises a GPU.

    ``info (...)`` int32. 0: success. 1: a is indefinite. -1: NaN or Inf in a. Where it is not 0, the factor
    is undefined. (Without a synchronisation all jitters are tried, so a GPU always pays for all attempts.)

    Example:
        >>> import torch, cfl_ops
        >>> result, info = cfl_ops.safe_cholesky_ex(-torch.eye(2))
        >>> int(info)
        1

    """
    max_jitter = checks.number("safe_cholesky_ex", "max_jitter", max_jitter, checks.NOT_NEGATIVE)
    return _safe("safe_cholesky_ex", a, max_jitter)


def spd_inverse(a: Tensor) -> Tensor:
    r"""The inverse of a positive definite matrix, also of one that only just is, or is not quite.

    .. math:: (a + \tau \, \mathrm{diag}(a) + \mathrm{diag}(\text{dead}))^{-1}

    with tau from :func:`safe_cholesky`: exactly 0 where none is needed, and of the size of rounding where it is,
    ``1024 eps D`` at the most (the error of sums of 10^6 products), with a warning. The row and column of a dead
    column (a zero on the diagonal) are those of the identity.

    Args:
        a: ``(..., D, D)``, float32 or float64, symmetric; only the lower triangle is read.

    Returns:
        ``(..., D, D)``, symmetric.

    Raises:
        TypeError, ValueError: a does not fit, or has NaN or Inf.
        torch.linalg.LinAlgError: a has a negative eigenvalue beyond rounding.

    Costs ``D^3`` FLOPs. Differentiable (twice).

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.spd_inverse(torch.tensor([[4.0, 0.0], [0.0, 0.0]])).diagonal()
        tensor([0.2500, 1.0000])

    """
    result, info = _safe("spd_inverse", a, None)
    check_info("safe_cholesky", info, list(result), [])
    jitter = result.jitter
    if not is_compiling() and not transforming() and (jitter.item() if jitter.numel() == 1 else jitter.any()):
        warnings.warn(
            f"cfl_ops.spd_inverse: a is singular to working precision, so this is the inverse of a + tau diag(a) with "
            f"tau up to {float(jitter.max()):.1e}; spd_inverse_ex returns tau and does not warn",
            stacklevel=2,
        )
    return inverse_of_factor(result.L)


def spd_inverse_ex(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`spd_inverse`, but never raises for what the data holds: returns ``(inverse, jitter, info)``.

    ``jitter`` and ``info`` are those of :func:`safe_cholesky_ex`.

    Example:
        >>> import torch, cfl_ops
        >>> inverse, jitter, info = cfl_ops.spd_inverse_ex(torch.eye(2))
        >>> int(info), float(jitter)
        (0, 0.0)

    """
    (factor, jitter), info = _safe("spd_inverse_ex", a, None)
    return inverse_of_factor(factor), jitter, info


def _safe(op: str, a: Tensor, max_jitter: float | None) -> tuple[SafeCholesky, Tensor]:
    """``max_jitter`` None: as much as rounding explains."""
    check_factor(op, "a", a)
    max_jitter = _rounding(a) if max_jitter is None else max_jitter
    factor, jitter, info = SAFE(a, float(max_jitter))
    return SafeCholesky(factor, jitter), info


def _rounding(a: Tensor) -> float:
    """The largest jitter that rounding can be blamed for."""
    return min(0.5, MOST_ROUNDING * torch.finfo(a.dtype).eps * a.shape[-1])


def _safe_python(a: Tensor, max_jitter: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factor S a S + jitter I, S = diag(a)^-1/2, with the jitter growing eightfold until that succeeds."""
    order, batch, gpu = a.shape[-1], a.shape[:-2], not a.is_cpu
    jitter = torch.zeros(batch, dtype=a.dtype, device=a.device)
    if a.numel() == 0:
        return a.new_empty(a.shape), jitter, jitter.to(torch.int32)
    scaled = a.tril()  # a fresh matrix, of which cholesky_ex reads this triangle
    least, most = scaled.flatten(-2).aminmax(dim=-1)
    finite = least.isfinite() & most.isfinite()
    diagonal = scaled.diagonal(dim1=-2, dim2=-1).clone()
    dead = ~(diagonal > 0)
    # On a CPU a look at the data is free, and most matrices need neither of the next two.
    if gpu or not bool(finite.all()):
        scaled = torch.where(finite[..., None, None], scaled, 0.0)
        dead = dead | ~finite.unsqueeze(-1)
    stray = torch.zeros_like(finite)
    if gpu or bool(dead.any()):
        # In a semi-definite matrix the rest of a dead row is zero; what is there has no business there.
        of_dead = dead.unsqueeze(-1) | dead.unsqueeze(-2)
        scale = torch.where(dead, 0.0, diagonal).amax(-1)
        rounding = min(max_jitter, _rounding(a))
        stray = torch.where(of_dead, scaled, 0.0).abs().amax((-2, -1)) > rounding * scale
        scaled = scaled.masked_fill(of_dead, 0.0)
    sqrt_diagonal = torch.where(dead, 1.0, diagonal).sqrt()
    inverse = 1 / sqrt_diagonal
    scaled.mul_(inverse.unsqueeze(-1)).mul_(inverse.unsqueeze(-2))
    scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0)

    unit = torch.finfo(a.dtype).eps * math.sqrt(order)
    step = 0.0
    factor, info = torch.linalg.cholesky_ex(scaled)
    while True:
        failed = (info != 0) | ~least_eigenvalue_above(factor, LEAST_EIGENVALUE * unit)
        step = FIRST_JITTER * unit if step == 0.0 else 8 * step
        if step > max_jitter or (not gpu and not bool(failed.any())):
            break
        shifted = scaled.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_((~dead).to(a.dtype), alpha=step)
        again, info_again = torch.linalg.cholesky_ex(shifted)
        factor = torch.where(failed[..., None, None], again, factor)
        info = torch.where(failed, info_again, info)
        jitter = torch.where(failed, step, jitter)
    code = torch.where(failed | stray, INDEFINITE, 0)
    code = torch.where(finite, code, NOT_FINITE).to(torch.int32)
    return (sqrt_diagonal.unsqueeze(-1) * factor).contiguous(), jitter, code


def _safe_fake(a: Tensor, max_jitter: float) -> tuple[Tensor, Tensor, Tensor]:
    batch = a.shape[:-2]
    return a.new_empty(a.shape), a.new_empty(batch), a.new_empty(batch, dtype=torch.int32)


def _safe_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[0], output[1])


def _safe_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Through L L^T = a + jitter diag(a), the jitter held fixed; nothing reaches a dead column."""
    if grad is None:
        return None, None
    a, factor, jitter = ctx.saved_tensors
    of_matrix = factor_backward(factor, grad)
    dead = ~(a.diagonal(dim1=-2, dim2=-1) > 0)
    of_matrix = of_matrix.masked_fill(dead.unsqueeze(-1) | dead.unsqueeze(-2), 0.0)
    # Only the lower triangle is read: an entry below the diagonal stands for two.
    of_diagonal = (1 + jitter.detach()).unsqueeze(-1) * of_matrix.diagonal(dim1=-2, dim2=-1)
    return 2 * of_matrix.tril(-1) + torch.diag_embed(of_diagonal), None


SAFE = define_op(
    "safe_cholesky(Tensor a, float max_jitter) -> (Tensor L, Tensor jitter, Tensor info)",
    python=_safe_python,
    fake=_safe_fake,
    shapes={"a": "full D D"},
    check=lambda a, max_jitter: checks.number("safe_cholesky", "max_jitter", max_jitter, checks.NOT_NEGATIVE),
    derivative=Derivative(_safe_setup_context, _safe_backward, ("jitter", "info")),
)


@error_message("safe_cholesky")
def _safe_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    _, code, where = first_failure(info)
    prefix = f"cfl_ops.safe_cholesky: {where}"
    if code == NOT_FINITE:
        return ValueError(f"{prefix}a has NaN or Inf in its lower triangle")
    error: Exception = LinAlgError(
        f"{prefix}a is not positive semi-definite: even the most jitter allowed on its diagonal is not enough"
    )
    return error
