"""Weights, and the same after a step, for the tests of deltas."""

from __future__ import annotations

import torch
from torch import Tensor


def weights(n: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def stepped(old: Tensor, lr: float, seed: int = 1) -> Tensor:
    """The weights after a step of about the same size for each, rounded to their dtype."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randn(old.numel(), generator=generator, dtype=torch.float64).clamp(-1, 1)
    return (old.double() + lr * step.view(old.shape)).to(old.dtype)
