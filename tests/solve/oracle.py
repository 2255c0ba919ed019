"""How ridge regressions are compared with the oracle of benches, and on what data."""

from __future__ import annotations

import numpy as np
import torch
from extended_precision import mean_loss, ridge_oracle, rounded, wide
from torch import Tensor


def ridge_head(
    x: np.ndarray, y: np.ndarray, lam: float, bias: bool = False, weight: np.ndarray | None = None
) -> np.ndarray:
    """argmin sum s |y - x w|^2 + lam |w|^2: (D, K), or with a bias, which is free, (D + 1, K)."""
    return ridge_oracle(x, y, lam, "free" if bias else "none", weight=weight)


def assert_loss_is_right(
    x: Tensor, y: Tensor, head: Tensor, best: np.ndarray, weight: np.ndarray | None = None
) -> None:
    """At most twice that of the best head in its dtype, and a thousandth of the targets' mean square."""
    x64, y64 = wide(x), wide(y)
    stored = rounded(best, head.dtype)
    size = np.square(y64) if weight is None else weight[:, None] * np.square(y64) * (len(y64) / weight.sum())
    bound = 2 * mean_loss(x64, y64, stored, weight) + 1e-3 * float(size.sum() / len(y64))
    assert mean_loss(x64, y64, wide(head), weight) <= bound


def features(
    dtype: torch.dtype, rows: int, cols: int, mean: float, scale: float, kind: str = "plain"
) -> Tensor:
    """``mean + scale * normal``; "duplicate": two equal columns, "outlier": a row 1,000 times as far."""
    z = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind == "duplicate":
        z[:, 1] = z[:, 0]
    if kind == "outlier":
        z[0] *= 1e3
    return (mean + scale * z).to(dtype)


def targets(dtype: torch.dtype, rows: int, count: int = 3) -> Tensor:
    y = torch.randn(rows, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (y + 1).to(dtype)
