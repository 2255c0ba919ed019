"""cholesky_update on a GPU by the kernels of csrc/cuda/cholesky_kernel.cuh: one pass for each 32 vectors (16 in
float64), no synchronisation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

PANEL = 32
"""kPanel of cholesky_kernel.cuh."""
RANKS = {torch.float32: (1, 4, 16, 32), torch.float64: (1, 4, 16)}
"""The instantiations: a warp holds a row's part of so many vectors in each lane."""
NO_FAILURE = 2**31 - 1


def cholesky_update(kernels: Any, L: Tensor, V: Tensor, alpha: float, decay: float) -> tuple[Tensor, Tensor]:
    """The op ``cfl_ops::cholesky_update``."""
    order, batch = L.shape[-1], L.shape[:-2]
    factors = L.reshape(batch.numel(), order, order)
    out = torch.zeros(L.shape, dtype=L.dtype, device=L.device)
    raw = _passes(kernels, factors, V, alpha, decay, out.view(factors.shape))
    kernels.cholesky_choose(factors, raw, True, out.view(factors.shape))  # failed: the old factor
    return out, _codes(raw).view(batch)


def cholesky_update_(kernels: Any, L: Tensor, V: Tensor, alpha: float, decay: float) -> Tensor:
    """The op in place: the new factors come to L once it is known that they are good."""
    order, batch = L.shape[-1], L.shape[:-2]
    factors = L.reshape(batch.numel(), order, order)
    fresh = torch.empty(factors.shape, dtype=L.dtype, device=L.device)
    raw = _passes(kernels, factors, V, alpha, decay, fresh)
    if factors.data_ptr() == L.data_ptr():
        kernels.cholesky_choose(fresh, raw, False, factors)
    else:  # batch dimensions that no view can join
        lower = torch.ones(L.shape[-2:], dtype=torch.bool, device=L.device).tril()
        changed = lower & (raw.view(batch) == NO_FAILURE)[..., None, None]
        L.copy_(torch.where(changed, fresh.view(L.shape), L))
    return _codes(raw).view(batch)


def _codes(raw: Tensor) -> Tensor:
    """The kernel's least number: all good, a pivot, L not finite (-1) or V (-2)."""
    from .cholesky import BAD_L, BAD_V

    info = torch.where(raw == NO_FAILURE, 0, raw)
    return torch.where(raw == -1, BAD_L, torch.where(raw == -2, BAD_V, info)).to(torch.int32)


def _passes(kernels: Any, factors: Tensor, V: Tensor, alpha: float, decay: float, out: Tensor) -> Tensor:
    """New factors into the lower triangles of ``out``; returns the kernel's info."""
    from .cholesky import LOST_PIVOT

    matrices, order, rank = len(factors), factors.shape[-1], V.shape[-1]
    vectors = V.reshape(matrices, order, rank)
    device, dtype = factors.device, factors.dtype
    ranks, panels = RANKS[dtype], -(-order // PANEL)
    step = ranks[-1]
    passes = max(1, -(-rank // step))  # without vectors, too: signs and decay
    flags = torch.zeros(passes, matrices * panels + 1, dtype=torch.int32, device=device)
    info = torch.full((passes, matrices), NO_FAILURE, dtype=torch.int32, device=device)
    held = next(r for r in ranks if r >= min(rank, step))
    size = -(-(held + 3) // 4) * 4
    reflectors = torch.empty(matrices, panels, PANEL, size, dtype=dtype, device=device)
    lost = LOST_PIVOT * torch.finfo(dtype).eps
    for i in range(passes):
        chunk = vectors[..., i * step : (i + 1) * step]
        first = i == 0
        kernels.cholesky_update(
            factors if first else out, chunk, math.sqrt(decay) if first else 1.0, math.sqrt(abs(alpha)),
            first, alpha < 0, lost, out, reflectors, flags[i], info[i],
        )  # fmt: skip
    raw = info[0]
    for later in info[1:]:  # what came first is what is told, but a bad V always
        raw = torch.where((raw == NO_FAILURE) | (later == -2), later, raw)
    return raw
