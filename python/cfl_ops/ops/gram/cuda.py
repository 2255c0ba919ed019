"""exact_gram on a GPU by the kernel of csrc/cuda/gram_kernel.cuh: any strides, no synchronisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfl_ops._gpu.device import device_of
from cfl_ops._gpu.sources import Constants

GRAM = Constants("exact")


def exact_gram(kernels: Any, x: Tensor, sample_weight: Tensor | None) -> Tensor:
    """The op ``cfl_ops::exact_gram``: split-K, so that all multiprocessors have two blocks."""
    tile, depth = GRAM.kGramTile, GRAM.kGramDepth
    rows, cols = x.shape[-2:]
    matrices = x.shape[:-2].numel()
    out = torch.empty(*x.shape[:-2], cols, cols, dtype=torch.float64, device=x.device)
    weight = None if sample_weight is None else sample_weight.reshape(matrices, rows)
    side = -(-cols // tile)
    tiles = matrices * side * (side + 1) // 2
    blocks = 2 * device_of(x.device).multiprocessors
    split_k = max(1, min(blocks // max(1, tiles), rows // (8 * depth)))
    held = tiles if split_k > 1 else 0
    workspace = torch.empty(held, split_k, tile**2, dtype=torch.float64, device=x.device)
    arrived = torch.zeros(held, dtype=torch.int32, device=x.device)
    kernels.exact_gram(x.reshape(matrices, rows, cols), weight, workspace, arrived, out)
    return out
