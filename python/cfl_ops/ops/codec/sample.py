"""sample: which weights are looked at. A hash spreads them, the same on every device, and no pattern meets it."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SAMPLE = 4096
"""A tensor's entropy is measured on as many weights, or on all of them."""
MOST_EVERY = 2**31
"""One of so many weights is the thinnest sample (csrc/cpu/codec.cpp: kMostEvery)."""


def sample_index(size: int, every: int, device: torch.device | None = None) -> Tensor:
    """One of each ``every`` weights: for stretch i of them, the one at a hash of i.

    int64 products wrap around, on every device; what is kept of them is masked.
    """
    first = torch.arange(0, size, every, device=device)
    if every == 1:
        return first
    x = torch.arange(1, first.numel() + 1, device=device) * (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ (x >> 32 & 0xFFFFFFFF)) * (0xD6E8FEB86659FD93 - 2**64)
    length = (size - first).clamp(max=every)  # the last stretch may be shorter
    return first + ((x >> 32 & 0xFFFFFFFF) * length >> 32)


def sampled(w: Tensor, every: int) -> Tensor:
    """One of each ``every`` weights of each row."""
    return w if every == 1 else w[..., sample_index(w.shape[-1], every, w.device)]
