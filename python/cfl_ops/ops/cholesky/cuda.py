"""cholesky_update on a GPU by the kernels of csrc/cuda/cholesky_kernel.cuh: one pass for each 32 vectors (16 in
float64), no synchronisation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cfl_ops._gpu.sources import RANKS, Constants
from cfl_ops.ops.cholesky.codes import BREAKDOWN_EPS
from cfl_ops.ops.cholesky.factor import with_lost_digits

CHOLESKY = Constants("cholesky")


def cholesky_update(kernels: Any, L: Tensor, V: Tensor, alpha: float, decay: float) -> tuple[Tensor, Tensor]:
    """The op ``cfl_ops::cholesky_update``."""
    order, batch = L.shape[-1], L.shape[:-2]
    factors = L.reshape(batch.numel(), order, order)
    out = torch.zeros(factors.shape, dtype=L.dtype, device=L.device)
    found, info = _passes(kernels, factors, V, alpha, decay, out)
    kernels.cholesky_choose(factors, found, True, out, info)  # failed: the old factor
    return out.view(L.shape), info.view(batch)


def cholesky_update_(kernels: Any, L: Tensor, V: Tensor, alpha: float, decay: float) -> Tensor:
    """The op in place: the new factors come to L once it is known that they are good."""
    order, batch = L.shape[-1], L.shape[:-2]
    factors = L.reshape(batch.numel(), order, order)
    fresh = torch.empty(factors.shape, dtype=L.dtype, device=L.device)
    found, info = _passes(kernels, factors, V, alpha, decay, fresh)
    kernels.cholesky_choose(fresh, found, False, factors, info)
    if factors.data_ptr() != L.data_ptr():  # batch dimensions that no view can join
        L.copy_(factors.view(L.shape))
    return info.view(batch)


def _passes(
    kernels: Any, factors: Tensor, V: Tensor, alpha: float, decay: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """New factors into the lower triangles of ``out``; what each pass found, and memory for info."""
    matrices, order, rank = len(factors), factors.shape[-1], V.shape[-1]
    vectors = V.reshape(matrices, order, rank)
    device, dtype = factors.device, factors.dtype
    panel = CHOLESKY.kPanel
    ranks, panels = RANKS[dtype], -(-order // panel)
    step = ranks[-1]
    passes = max(1, -(-rank // step))  # without vectors, too: signs and decay
    each = matrices * panels + 1
    zeros = torch.zeros(passes * (each + matrices), dtype=torch.int32, device=device)
    flags, found = zeros[: passes * each].view(passes, each), zeros[passes * each :].view(passes, matrices)
    held = next(r for r in ranks if r >= min(rank, step))
    size = -(-(held + 3) // 4) * 4
    reflectors = torch.empty(matrices, panels, panel, size, dtype=dtype, device=device)
    breakdown = BREAKDOWN_EPS * torch.finfo(dtype).eps
    for i in range(passes):
        first = i == 0
        kernels.cholesky_update(
            factors if first else out, vectors[..., i * step : (i + 1) * step], math.sqrt(decay) if first else 1.0,
            math.sqrt(abs(alpha)), first, alpha < 0, breakdown, out, reflectors, flags[i],
            found[i],
        )  # fmt: skip
    if passes > 1 and alpha < 0:  # a pass compares with the pivot that it finds, not with the first
        old = factors.diagonal(dim1=-2, dim2=-1).abs() * math.sqrt(decay)
        kept = out.diagonal(dim1=-2, dim2=-1) > math.sqrt(breakdown) * old
        which = kept.logical_not().to(torch.int32).argmax(-1).to(torch.int32) + 1
        found[0] = torch.maximum(found[0], torch.where(kept.all(-1), 0, CHOLESKY.kBadL - which))
    if alpha < 0:
        lost = with_lost_digits(found.amax(0), out.tril(), vectors, alpha)
        found[0] = torch.where(found.amax(0) == 0, torch.where(lost > 0, CHOLESKY.kBadL - lost, 0), found[0])
    return found, torch.zeros(matrices, dtype=torch.int32, device=device)
