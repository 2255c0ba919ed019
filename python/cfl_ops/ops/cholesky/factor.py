"""What the ops on Cholesky factors share: the checks of a factor, its derivative, its inverse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.autocast import without_autocast
from cfl_ops._core.op import transforming
from cfl_ops.ops.cholesky.codes import BAD_L, BAD_V


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
