"""What ridge, ridge_path and ridge_cv make of their data: checked, centred, and as moments in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, first_failure
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.gram.gram import plain_gram
from cfl_ops.ops.solve.codes import BAD_PENALTY


def check_data(op: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """X and y in their common dtype (at least float32) and with their common batch shape."""
    checks.floating(op, "x", x, 2)
    checks.floating(op, "y", y, 2)
    checks.size(op, "y", y, -2, x.shape[-2], "the rows of x")
    checks.same_device(op, "x", x, y=y)
    batch = checks.broadcastable(op, x=x.shape[:-2], y=y.shape[:-2])
    dtype = torch.promote_types(result_dtype(x, y), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    return x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])


def check_penalties(op: str, lams: Any, device: torch.device) -> Tensor:
    """The penalties of a path as a 1-d float64 tensor."""
    if isinstance(lams, Tensor):
        given = checks.real_tensor(op, "lams", lams)
        # In a graph what is checked is written to, as far as the compiler knows.
        values = given.to(device, torch.float64, copy=is_compiling())
    else:
        values = checks.numbers(op, "lams", lams).to(device)
    if values.ndim != 1 or values.numel() == 0:
        raise ValueError(
            f"cfl_ops.{op}: lams must be a sequence of at least one number, but got shape {tuple(values.shape)}"
        )
    if isinstance(lams, Tensor):
        bad = ~((values >= 0) & values.isfinite()).all()
        check_info(op, bad.to(torch.int32) * BAD_PENALTY, [values], [values.detach()])
    return values


def result_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """What the fit is rounded to, whatever it was computed in."""
    return torch.promote_types(x.dtype, y.dtype)


def promoted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype."""
    return (x, y) if x.dtype == y.dtype else (x.double(), y.double())


def moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """X^T X and X^T Y in float64."""
    gram, cross, *_ = plain_gram(*promoted(x, y), torch.float64)
    return gram, cross


def gram_of_rows(x: Tensor) -> Tensor:
    """X X^T in float64."""
    gram: Tensor = plain_gram(x.mT, None, torch.float64)[0]
    return gram


def column_means(x: Tensor, bias: bool) -> Tensor:
    """The means ``(..., 1, K)`` in float64; zero without a bias or without rows."""
    if not bias or x.shape[-2] == 0:
        return x.new_zeros(*x.shape[:-2], 1, x.shape[-1], dtype=torch.float64)
    return x.mean(-2, keepdim=True, dtype=torch.float64)


def centred(x: Tensor, bias: bool) -> Tensor:
    """X less its column means, in float64; without a bias X as it is.

    In a narrower dtype the differences would be rounded, and rows that depend on one another (centred ones always
    do) would no longer. The first row goes first, so that no mean is rounded that is far larger than the differences,
    and a constant column is zero.
    """
    if not bias or x.shape[-2] == 0:
        return x
    rows = x.double()
    rows = rows - rows[..., :1, :]
    return rows.sub_(rows.mean(-2, keepdim=True))


def free_rows(x: Tensor, bias: bool) -> Tensor:
    """The centred rows in a basis of those that sum to zero, n - 1 of the same Gram matrix; without a bias X.

    By the reflection that takes the constant vector to the first axis, where centred rows are zero. n centred rows
    would have a singular value that is rounding alone.
    """
    count = x.shape[-2]
    if not bias or count == 0:
        return x
    rows = centred(x, bias)
    v = reflector(count, rows)
    return rows[..., 1:, :] - v[1:, None] * (_factor(count) * (v @ rows)).unsqueeze(-2)


def with_free_rows(left: Tensor, bias: bool) -> Tensor:
    """The way back: columns ``(n - 1, r)`` as columns ``(n, r)`` that sum to zero."""
    if not bias:
        return left
    count = left.shape[-2] + 1
    v = reflector(count, left)
    full = torch.cat([left.new_zeros(*left.shape[:-2], 1, left.shape[-1]), left], dim=-2)
    return full - v[:, None] * (_factor(count) * (v[1:] @ left)).unsqueeze(-2)


def reflector(count: int, like: Tensor) -> Tensor:
    """The vector v of the reflection I - f v v^T, with f of :func:`_factor`."""
    v = like.new_full((count,), 1 / math.sqrt(count), dtype=torch.float64)
    v[0] = v[0] + 1
    return v


def _factor(count: int) -> float:
    """2 over the square of the reflector's length."""
    return 1 / (1 + 1 / math.sqrt(count))


def intercept(weight: Tensor, x_mean: Tensor, y_mean: Tensor) -> Tensor:
    """The intercept ``(..., K)`` in float64 of a weight, which is the one that the caller gets, rounded as it is."""
    return (y_mean - x_mean @ weight.double()).squeeze(-2)


def regression_error(op: str, info: Tensor, context: Sequence[Tensor]) -> Exception:
    """The error where the penalties are refused, or the data not finite."""
    if info.ndim == 0 and int(info) == BAD_PENALTY:
        return ValueError(
            f"cfl_ops.{op}: lams must be finite and not negative, but got {context[0].tolist()}"
        )
    error: Exception = LinAlgError(f"cfl_ops.{op}: {first_failure(info)[2]}x or y has NaN or Inf")
    return error
