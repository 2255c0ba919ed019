"""small_pinv: pseudoinverses of full rank, for batches of small matrices side by side. A step of pinv."""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops._core.op import define_op
from cfl_ops._gpu.launch import cuda_cpp
from cfl_ops.ops.solve import cuda
from cfl_ops.ops.solve.tall import NARROW, equilibrated_inverse, identity, underdetermined


def is_small_batch(a: Tensor) -> bool:
    """Whether the op is the faster way to begin."""
    return a[..., 0, 0].numel() > 1 and min(a.shape[-2:]) <= NARROW and a.shape[-2] * a.shape[-1] <= 8192


def _small_pinv_python(a: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The pseudoinverse of matrices of full rank, and info: 1 where it is not to be used.

    It is the first pass of the general path.
    """
    t = (a.mT if underdetermined(a) else a).double()
    gram = t.mT @ t
    square = gram.diagonal(dim1=-2, dim2=-1)
    usable = ((square > 1e-250) & (square < 1e250)).all(-1)
    system = torch.where(usable[..., None, None], gram, 0.0)
    inverse, _, resolved = equilibrated_inverse(system, usable.unsqueeze(-1), limit)
    good = usable & resolved
    result = inverse @ t.mT
    if a.dtype == torch.float64:
        result = result + (identity(t.shape[-1], a) - result @ t) @ result
    result = torch.where(good[..., None, None], result, torch.nan).to(a.dtype)
    return (result.mT if underdetermined(a) else result).contiguous(), (~good).to(torch.int32)


def _small_pinv_fake(a: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    batch, (rows, cols) = a.shape[:-2], a.shape[-2:]
    return a.new_empty(*batch, cols, rows), a.new_empty(batch, dtype=torch.int32)


def _check(a: Tensor, limit: float) -> None:
    if not limit > 0:
        raise ValueError(f"cfl_ops.small_pinv: limit must be positive, but got {limit}")


SMALL_PINV = define_op(
    "small_pinv(Tensor a, float limit) -> (Tensor pinv, Tensor info)",
    python=_small_pinv_python,
    fake=_small_pinv_fake,
    shapes={"a": "M N"},
    check=_check,
    cuda=cuda_cpp(cuda.small_pinv),
    helper=True,
)
