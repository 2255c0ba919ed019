"""exact_gram: float64 accumulation of the Gram matrix alone, in CUDA C++ on a GPU: a step of gram there."""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops._core.op import define_op
from cfl_ops._gpu.launch import cuda_cpp
from cfl_ops.ops.gram import cuda
from cfl_ops.ops.gram.gram import symmetric, weighted_rows


def _fallback(x: Tensor, sample_weight: Tensor | None) -> Tensor:
    """X^T S X in float64, of x (..., B, D) in any floating-point dtype and float64 weights (..., B)."""
    x = x.double()
    return symmetric(weighted_rows(x, sample_weight).mT @ x)


EXACT_GRAM = define_op(
    "exact_gram(Tensor x, Tensor? sample_weight) -> Tensor",
    python=_fallback,
    fake=lambda x, sample_weight: x.new_empty(*x.shape[:-2], x.shape[-1], x.shape[-1], dtype=torch.float64),
    shapes={"x": "B D", "sample_weight": "float64 B"},
    cuda=cuda_cpp(cuda.exact_gram),
    helper=True,
)
