"""What the ops on Cholesky factors share: the checks of a factor, its derivative, its inverse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.autocast import without_autocast
from cfl_ops._core.op import transforming
from cfl_ops.ops.cholesky.codes import BAD_L, BAD_V, LEAST_EIGENVALUE


def check_factor(op: str, name: str, value: Any) -> None:
    """``value`` is a batch of square matrices, float32 or float64."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.ndim < 2:
        checks.tensor(op, name, value, 2)
    if value.dtype != torch.float32 and value.dtype != torch.float64:
        raise TypeError(f"cfl_ops.{op}: {name} must be float32 or float64, but got {value.dtype}")
    if value.shape[-1] != value.shape[-2]:
        raise ValueError(f"cfl_ops.{op}: {name} must be square, but got shape {tuple(value.shape)}")


def with_bad_arguments(info: Tensor, lower: Tensor, V: Tensor) -> Tensor:
    """The info (...) of an update, which says first what is wrong with L, given its lower triangle, and V."""
    info = torch.where(lower.isfinite().flatten(-2).all(-1), info, BAD_L)
    return torch.where(V.isfinite().flatten(-2).all(-1), info, BAD_V).to(torch.int32)


def least_eigenvalue_above(factor: Tensor, least: float) -> Tensor:
    """Whether L L^T has no eigenvalue below ``least``: two steps of inverse iteration from the least pivot."""
    pivot, _ = factor.diagonal(dim1=-2, dim2=-1).square().min(-1)
    return (pivot > least) & (inverse_size(factor) * least < 1)


def inverse_size(factor: Tensor) -> Tensor:
    """``|(L L^T)^-1|``, three steps of inverse iteration: a third of it at the least, mostly.

    From the least pivot, and from a vector with a part in all directions.
    """
    at = factor.diagonal(dim1=-2, dim2=-1).argmin(-1)
    pivot = torch.zeros_like(factor[..., :1]).scatter(-2, at[..., None, None], 1.0)
    place = torch.arange(factor.shape[-1], dtype=factor.dtype, device=factor.device).unsqueeze(-1)
    growing = (1 - 2 * (place % 2)) * (1 + place / factor.shape[-1])
    vector = torch.cat((pivot, growing.expand_as(pivot)), -1)
    vector = size = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
    for _ in range(3):
        half = torch.linalg.solve_triangular(factor, vector, upper=False)
        vector = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        size = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
        vector = vector / size
    largest: Tensor = size[..., 0, :].amax(-1)
    return largest


def row_norms(matrix: Tensor) -> Tensor:
    """``(..., D, 1)``, also where squares leave the range of the dtype."""
    largest = matrix.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    norms: Tensor = unit * torch.linalg.vector_norm(matrix / unit, dim=-1, keepdim=True)
    return norms


def with_lost_digits(info: Tensor, out: Tensor, V: Tensor, alpha: float) -> Tensor:
    """The info (...) of a downdate, which also says where the new factor L' has lost its digits.

    A downdate is that of L and V changed by rounding, of eps for each row of L: so its pivots are off by
    eps sqrt(D) |L'^-1 diag(A)^1/2| |L'^-1 L|, or a fourth of that as measured. A tenth is asked for.
    """
    order = out.shape[-1]
    if alpha >= 0 or order == 0:
        return info
    w = V * math.sqrt(-alpha)
    size = row_norms(torch.cat((out, w), -1))  # sqrt(A_ii) of the old A = L' L'^T + W W^T
    size = torch.where((info == 0)[..., None, None], size, 1.0)
    scaled = torch.where(
        (info == 0)[..., None, None], out / size, torch.eye(order, dtype=out.dtype, device=out.device)
    )
    growth = torch.linalg.solve_triangular(scaled, w / size, upper=False).square().sum((-2, -1))
    unit = LEAST_EIGENVALUE * torch.finfo(out.dtype).eps * math.sqrt(order)
    digits = unit * ((1 + growth) * inverse_size(scaled)).sqrt() < 1
    worst = scaled.diagonal(dim1=-2, dim2=-1).argmin(-1).to(info.dtype) + 1
    return torch.where((info != 0) | digits, info, worst)


def copy_good_(L: Tensor, out: Tensor, info: Tensor) -> None:
    """The lower triangles of the updates that did not fail come to L; all else in L stays."""
    lower = torch.ones(L.shape[-2:], dtype=torch.bool, device=L.device).tril()
    L.copy_(torch.where(lower & (info == 0)[..., None, None], out, L))


def factor_backward(factor: Tensor, grad: Tensor) -> Tensor:
    """The symmetric gradient with respect to A of a function of its Cholesky factor (Murray 2016, Eq. 10)."""
    inner = (factor.mT @ grad.tril()).tril()
    inner = inner - 0.5 * torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    left = torch.linalg.solve_triangular(factor.mT, inner, upper=True)
    both: Tensor = torch.linalg.solve_triangular(factor, left, upper=False, left=False)
    return 0.5 * (both + both.mT)


def inverse_of_factor(factor: Tensor) -> Tensor:
    """``(L L^T)^-1``. On a GPU torch's batched one may be MAGMA's, which no CUDA graph can capture; under
    transforms its forward-mode derivative is wrong (torch 2.13).
    """
    by_solves = not factor.is_cpu or transforming()
    return inverse_by_solves(factor) if by_solves else torch.cholesky_inverse(factor)


@without_autocast
def inverse_by_solves(factor: Tensor) -> Tensor:
    """``(L L^T)^-1`` by triangular solves."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand(factor.shape)
    half: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return half.mT @ half
