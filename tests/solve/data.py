"""Data and error measures that the samples and tests of the family share."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64
SINGLE_AND_DOUBLE = (torch.float32, F64)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def spd(batch: int, order: int, dtype: torch.dtype = F64) -> Tensor:
    x = randn(batch, order + 2, order)
    return (x.mT @ x).to(dtype)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def working_eps(dtype: torch.dtype) -> float:
    return torch.finfo(F64 if dtype == F64 else torch.float32).eps


def norm(m: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(m)[..., None, None]
